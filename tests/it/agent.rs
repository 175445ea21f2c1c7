//! The agent dies, its processes hang, it is told to leave: nothing of it changes a bit.

use everstep_cluster::RunDir;
use everstep_cluster::control::{self, Injection, Reply, Request};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::{STEPS, Workbench, everstep, seconds_between};

#[test]
fn processes_outlive_their_agent_and_the_next_one_adopts_them() {
    let bench = Workbench::new();
    let topology = bench.cluster(2, 2, 2);
    let running = bench.start("run", Some(&topology));
    let mut steps = running.steps();
    assert!(steps.any(|step| step >= 20));
    drop(steps);
    let before = running.processes();
    running.kill_agent();

    // Nobody is there, and steps are committed all the same.
    let orphaned_at = bench.numbers("run").len();
    while bench.numbers("run").len() < orphaned_at + 10 {
        std::thread::yield_now();
    }

    let running = bench.start("run", Some(&topology));
    let mut steps = running.steps();
    let is_adopted = |_| bench.count("run", "process_adopted") == before.len();
    assert!(steps.any(is_adopted), "{}", bench.logs("run"));
    drop(steps);
    assert_eq!(running.processes(), before, "{}", bench.logs("run"));
    // What it adopted it restarts like its own.
    assert!(running.kill("worker-1"));
    running.finish(&bench, "run");

    assert_eq!(bench.count("run", "process_adopted"), before.len());
    let events = bench.lines("run", "events.jsonl");
    let lost = events
        .iter()
        .filter(|event| event["kind"] == "process_lost");
    assert!(lost.clone().count() > 0 && lost.clone().all(|event| event["process"] == "worker-1"));
    assert_eq!(bench.count("run", "process_restarted"), 1);
    assert_eq!(bench.count("run", "rollback"), 0);
    bench.demand_undisturbed("run");

    // One that comes when all is over says so.
    let late = bench.train("run", Some(&topology)).output().unwrap();
    let error = String::from_utf8_lossy(&late.stderr);
    assert!(late.status.success(), "{error}");
    let expected = format!("the run has finished: step {STEPS} is committed");
    assert!(error.contains(&expected), "{error}");
    assert_eq!(bench.count("run", "process_started"), before.len() + 1);
}

#[test]
fn what_ends_while_no_agent_watches_is_told_and_replaced() {
    let bench = Workbench::new();
    let topology = bench.cluster(2, 2, 2);
    let running = bench.start("run", Some(&topology));
    assert!(running.steps().any(|step| step >= 20));
    let loader = running
        .processes()
        .into_iter()
        .find_map(|(name, pid)| pid.filter(|_| name == "loader"));
    let loader = Pid::from_raw(loader.unwrap());
    running.kill_agent();
    kill(loader, Signal::SIGKILL).unwrap();

    bench.train_to_the_end("run", Some(&topology));
    let events = bench.lines("run", "events.jsonl");
    let lost: Vec<&Value> = events
        .iter()
        .filter(|event| event["kind"] == "process_lost")
        .collect();
    assert_eq!(lost.len(), 1, "{lost:?}");
    assert_eq!(lost[0]["process"], "loader");
    assert_eq!(lost[0]["reason"], "it ended while no agent watched");
    assert_eq!(bench.count("run", "process_restarted"), 1);
    bench.demand_undisturbed_digest("run");
}

#[test]
fn a_second_agent_is_refused() {
    let bench = Workbench::new();
    let topology = bench.cluster(1, 1, 1);
    let running = bench.start("run", Some(&topology));
    assert!(running.steps().any(|step| step >= 1));
    let second = bench.train("run", Some(&topology)).output().unwrap();
    let error = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(2), "{error}");
    assert!(
        error.contains("node local has an agent already (pid "),
        "{error}"
    );
    assert_eq!(error.lines().count(), 1, "{error}");
    running.finish(&bench, "run");
}

#[test]
fn an_orphan_that_nobody_adopts_ends() {
    let bench = Workbench::new();
    let topology = bench.cluster(1, 1, 1);
    let mut train = bench.train("run", Some(&topology));
    train
        .env("EVERSTEP_ORPHAN_SECONDS", "1")
        .args(["--set", "run.steps=1000000"]);
    let running = bench.start_command("run", train);
    assert!(running.steps().any(|step| step >= 5));
    let pids = running.processes();
    running.kill_agent();
    let proc = |pid: i32| std::path::PathBuf::from(format!("/proc/{pid}/exe"));
    for (_, pid) in pids {
        let pid = pid.unwrap();
        // A zombie that nobody waits for has no executable any more.
        while std::fs::read_link(proc(pid)).is_ok() {
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_stopped_worker_is_noticed_ended_and_replaced() {
    let bench = Workbench::new();
    let topology = bench.cluster(2, 2, 2);
    let running = bench.start("run", Some(&topology));
    let mut stopped = Vec::new();
    let mut steps = running.steps();
    for victim in ["worker-0", "shard-1", "worker-1"] {
        let next = (stopped.len() as u64 + 1) * 40;
        assert!(steps.any(|step| step >= next), "{}", bench.logs("run"));
        stopped.extend(running.signal(victim, Signal::SIGSTOP));
    }
    drop(steps);
    running.finish(&bench, "run");
    assert_eq!(stopped.len(), 3);
    let events = bench.lines("run", "events.jsonl");
    let hung: Vec<&Value> = events
        .iter()
        .filter(|event| event["kind"] == "process_hung")
        .collect();
    assert_eq!(hung.len(), 3, "{hung:?}");
    for event in hung {
        assert!(event["seconds"].as_f64().unwrap() < 1.5, "{event}");
        let lost = events
            .iter()
            .find(|other| {
                other["kind"] == "process_lost"
                    && other["process"] == event["process"]
                    && other["reason"].as_str().unwrap().contains("hung for")
            })
            .unwrap();
        assert!(seconds_between(event, lost) < 1.0, "{event} {lost}");
    }
    bench.demand_undisturbed("run");
}

#[test]
fn a_stop_leaves_nothing_behind_and_the_run_goes_on_another_time() {
    let bench = Workbench::new();
    let topology = bench.cluster(2, 2, 2);
    let running = bench.start("run", Some(&topology));
    assert!(running.steps().any(|step| step >= 60));
    let pids = running.processes();
    running.signal_agent(Signal::SIGTERM);
    assert_eq!(running.end().code(), Some(1));
    for (name, pid) in pids {
        let executable = std::fs::read_link(format!("/proc/{}/exe", pid.unwrap()));
        assert!(executable.is_err(), "{name} is alive");
    }
    let socket = bench.path().join("run/control/local.sock");
    assert!(!socket.exists());
    bench.train_to_the_end("run", Some(&topology));
    bench.demand_undisturbed_digest("run");
}

#[test]
fn a_deadlocked_compute_thread_is_noticed_ended_and_replaced() {
    let bench = Workbench::new();
    // Its only worker: with another one, the run could end before a second has passed.
    let topology = bench.cluster(1, 2, 2);
    let mut train = bench.train("run", Some(&topology));
    train.args(["--set", "chaos.allow=true"]);
    let running = bench.start_command("run", train);
    assert!(running.steps().any(|step| step >= 20));
    let run_dir = RunDir::new(bench.path().join("run"));
    let inject = |process: &str| {
        let request = Request::Inject {
            process: process.to_owned(),
            fault: Injection::HangDevice,
        };
        control::send(&run_dir, "local", &request).unwrap()
    };
    assert!(matches!(inject("worker-7"), Reply::Refused { .. }));
    assert!(matches!(inject("shard-0"), Reply::Refused { .. }));
    assert_eq!(inject("worker-0"), Reply::Done);
    running.finish(&bench, "run");
    let events = bench.lines("run", "events.jsonl");
    let hung: Vec<&Value> = events
        .iter()
        .filter(|event| event["kind"] == "process_hung")
        .collect();
    assert_eq!(hung.len(), 1, "{hung:?}");
    assert_eq!(hung[0]["process"], "worker-0");
    assert!(
        hung[0]["reason"].as_str().unwrap().contains("no CPU time"),
        "{}",
        hung[0]
    );
    assert_eq!(bench.count("run", "process_restarted"), 1);
    bench.demand_undisturbed("run");

    let drain = |node: &str| {
        let output = everstep()
            .args(["drain", node, "--run-dir"])
            .arg(run_dir.path())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2));
        String::from_utf8(output.stderr).unwrap()
    };
    assert_eq!(
        drain("nowhere"),
        "error: there is no node nowhere; nodes are: local\n"
    );
    let nobody = drain("local");
    assert!(
        nobody.contains("no agent of node local listens on") && nobody.lines().count() == 1,
        "{nobody}"
    );
}
