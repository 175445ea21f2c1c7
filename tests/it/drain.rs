//! Nodes leave while the run goes on, and lose nothing: neither a bit nor a step's time.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::support::{Workbench, everstep, seconds_between};

/// Three nodes on this machine, with a worker and a shard each; two of them have a coordinator and a loader too.
fn three_nodes(bench: &Workbench) -> PathBuf {
    let mut text = String::new();
    for node in ["a", "b", "c"] {
        text += &format!("[[node]]\nname = \"{node}\"\n\n");
        let all = ["coordinator", "loader", "shard", "worker"];
        for role in all.into_iter().skip(if node == "c" { 2 } else { 0 }) {
            text += &format!(
                "[[process]]\nname = \"{role}-{node}\"\nnode = \"{node}\"\nroles = [\"{role}\"]\n\n"
            );
        }
    }
    text += "[cluster]\nreplication = 2\n";
    let file = bench.path().join("three-nodes.toml");
    fs::write(&file, text).unwrap();
    file
}

fn drain(bench: &Workbench, run_dir: &str, node: &str) {
    let output = everstep()
        .args(["drain", node, "--run-dir"])
        .arg(bench.path().join(run_dir))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}\n{}", bench.logs(run_dir));
}

fn of_kind<'a>(events: &'a [Value], kind: &'a str) -> impl Iterator<Item = &'a Value> {
    events.iter().filter(move |event| event["kind"] == kind)
}

/// Drains a node in the middle of a run, the leader's if none is named; returns the events.
fn drained(bench: &Workbench, node: Option<&str>) -> Vec<Value> {
    let topology = three_nodes(bench);
    let running = bench.start("run", Some(&topology));
    let mut is_asked = false;
    for step in running.steps() {
        if step >= 40 && !is_asked {
            let events = bench.lines("run", "events.jsonl");
            let leads = of_kind(&events, "leader_elected").last().unwrap();
            drain(
                bench,
                "run",
                node.unwrap_or(leads["node"].as_str().unwrap()),
            );
            is_asked = true;
        }
    }
    running.finish(bench, "run");
    assert!(is_asked);
    bench.demand_undisturbed("run");
    bench.lines("run", "events.jsonl")
}

#[test]
fn a_drained_node_leaves_within_a_few_steps_and_nothing_is_computed_twice() {
    let bench = Workbench::new();
    let events = drained(&bench, Some("c"));
    let logs = || bench.logs("run");
    for process in ["shard-c", "worker-c"] {
        let of = |kind: &'static str| {
            of_kind(&events, kind)
                .filter(|event| event["process"] == process)
                .collect::<Vec<_>>()
        };
        let [started] = of("drain_started")[..] else {
            panic!("{process}: {}", logs());
        };
        let [finished] = of("drain_finished")[..] else {
            panic!("{process}: {}", logs());
        };
        assert_eq!(started["node"], "c");
        let steps = finished["step"].as_u64().unwrap() - started["step"].as_u64().unwrap();
        assert!(steps < 100, "{process} left after {steps} steps");
        assert_eq!(of("process_lost").len(), 0, "{}", logs());
        assert_eq!(of("process_stopped").len(), 1, "{}", logs());
    }
    let moved: u64 = of_kind(&events, "drain_finished")
        .map(|event| event["blocks_moved"].as_u64().unwrap())
        .sum();
    assert!(moved > 0, "the shard held nothing");
    assert_eq!(bench.count("run", "rollback"), 0);
    let restarted: Vec<&Value> = of_kind(&events, "process_restarted").collect();
    assert!(restarted.is_empty(), "{restarted:?}\n{}", logs());
    assert_eq!(bench.count("run", "leader_elected"), 1, "{}", logs());
}

#[test]
fn a_drained_leader_hands_over_to_the_standby() {
    let bench = Workbench::new();
    let events = drained(&bench, None);
    let leaders: Vec<&Value> = of_kind(&events, "leader_elected").collect();
    let [old, new] = leaders[..] else {
        panic!("{leaders:?}\n{}", bench.logs("run"));
    };
    assert_ne!(old["process"], new["process"]);
    let stopped = of_kind(&events, "process_stopped").filter(|event| event["node"] == old["node"]);
    assert_eq!(stopped.count(), 4, "{}", bench.logs("run"));
    assert_eq!(
        of_kind(&events, "process_lost").collect::<Vec<_>>(),
        Vec::<&Value>::new(),
        "{}",
        bench.logs("run")
    );
    assert_eq!(bench.count("run", "rollback"), 0);
    let finished: Vec<&Value> = of_kind(&events, "drain_finished").collect();
    assert_eq!(finished.len(), 4);
    // The leader goes last.
    assert_eq!(finished[3]["process"], old["process"]);
}

#[test]
fn the_last_node_commits_what_it_holds_before_it_leaves() {
    let bench = Workbench::new();
    let topology = bench.cluster(2, 2, 2);
    let running = bench.start("run", Some(&topology));
    let asked = running.steps().find(|step| *step >= 60).unwrap();
    drain(&bench, "run", "local");
    let status = running.end();
    assert_eq!(status.code(), Some(1), "{}", bench.logs("run"));
    let said = fs::read_to_string(bench.path().join("run.stderr")).unwrap();
    assert!(
        said.contains("which is committed; the same command goes on"),
        "{said}"
    );
    let events = bench.lines("run", "events.jsonl");
    let committed = of_kind(&events, "checkpoint_committed")
        .map(|event| event["step"].as_u64().unwrap())
        .max()
        .unwrap();
    // Not the one that was due at step 50.
    assert!(committed >= asked, "{committed} is before {asked}");
    let started = of_kind(&events, "drain_started").next().unwrap();
    let last = of_kind(&events, "process_stopped").last().unwrap();
    let seconds = seconds_between(started, last);
    assert!(seconds < 10.0, "left after {seconds} s");
    assert_eq!(
        bench.numbers("run").len() as u64,
        committed,
        "steps beyond it were lost"
    );

    // It goes on from there.
    let running = bench.start("run", Some(&topology));
    running.finish(&bench, "run");
    assert_eq!(bench.count("run", "rollback"), 0);
    bench.demand_undisturbed("run");
}

#[test]
fn a_signal_to_a_run_of_one_process_costs_no_step() {
    let bench = Workbench::new();
    let running = bench.start("run", None);
    let asked = running.steps().find(|step| *step >= 60).unwrap();
    running.signal_agent(Signal::SIGINT);
    let status = running.end();
    assert_eq!(status.code(), Some(1), "{status}\n{}", bench.logs("run"));
    let numbers = bench.numbers("run").len() as u64;
    let committed = of_kind(&bench.lines("run", "events.jsonl"), "checkpoint_committed")
        .filter_map(|event| event["step"].as_u64())
        .max();
    assert!(
        numbers >= asked && committed == Some(numbers),
        "{asked} {numbers} {committed:?}\n{}",
        bench.logs("run")
    );
    bench.start("run", None).finish(&bench, "run");
    bench.demand_undisturbed("run");
}
