//! `everstep chaos`: a scenario from its file to its verdict, and what is refused.

use std::fs;
use std::path::PathBuf;
use std::process::{Output, Stdio};

use serde_json::Value;

use crate::s3::servers::Moto;
use crate::support::{Workbench, error_line, everstep};

/// Writes a scenario beside the workbench's run file.
fn scenario(bench: &Workbench, name: &str, body: &str) -> PathBuf {
    bench.cluster(2, 2, 2);
    let text = format!(
        "name = \"{name}\"\n[workload]\nrun = \"run.toml\"\ntopology = \"cluster-2-2-2.toml\"\nset = [\"run.steps=120\"]\n{body}"
    );
    let path = bench.path().join(format!("{name}.toml"));
    fs::write(&path, text).unwrap();
    path
}

fn chaos_run(bench: &Workbench, file: &PathBuf, arguments: &[&str]) -> Output {
    let mut command = everstep();
    command.args(["chaos", "run"]).arg(file).args(arguments);
    command.arg("--run-dir").arg(bench.path().join("chaos"));
    command.stdin(Stdio::null()).output().unwrap()
}

fn report(bench: &Workbench) -> Value {
    let bytes = fs::read(bench.path().join("chaos/report.json")).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

/// Demands exit 2 and one line with all of `parts`.
fn refused(output: &Output, parts: &[&str]) {
    let error = error_line(output);
    for part in parts {
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
}

#[test]
fn a_scenario_strikes_measures_and_compares() {
    let bench = Workbench::new();
    let body = r#"
[[fault]]
kind = "kill"
role = "worker"
after_step = 10
repeat = 2
every_steps = 30
[[fault]]
kind = "partition"
process = "shard-1"
seconds = 4
after_step = 80
[check]
digest = "undisturbed"
events = { process_lost = 3 }
"#;
    let file = scenario(&bench, "tiny", body);
    let output = chaos_run(&bench, &file, &["--seed", "5"]);
    let error = String::from_utf8_lossy(&output.stderr);
    let shown = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{error}\n{shown}");
    assert!(shown.contains("tiny (seed 5): passed, 3 faults, 3 recoveries"));

    let report = report(&bench);
    assert_eq!(report["passed"], true);
    assert_eq!(report["steps"], 120);
    assert_eq!(report["digest_equal"], true);
    assert_eq!(report["undisturbed"], report["disturbed"]);
    assert_eq!(report["faults_injected"], 3);
    assert_eq!(report["faults_recovered"], 3);
    let kills = &report["by_kind"]["kill worker"];
    assert_eq!(
        (&kills["injected"], &kills["missed"]),
        (&2.into(), &0.into())
    );
    assert!(kills["detection_seconds"]["max"].as_f64().unwrap() <= 5.0);
    assert!(kills["gap_seconds"]["max"].as_f64().unwrap() > 0.0);
    for fault in report["faults"].as_array().unwrap() {
        assert_eq!(fault["happened"], true, "{fault}");
    }
    // The proxies saw the partition: nothing of what was sent got through.
    let network = &report["faults"][2]["network"];
    assert!(network["cut"].as_u64().unwrap() > 0, "{network}");
    assert_eq!(network["cut"], network["datagrams"]);
    let picture = fs::read_to_string(bench.path().join("chaos/timeline.svg")).unwrap();
    assert!(picture.contains("shard-1") && picture.ends_with("</svg>\n"));
}

#[test]
fn a_scenario_spoils_a_store_on_s3() {
    let bench = Workbench::new();
    let body = r#"
[[fault]]
kind = "damage"
after_step = 165
[[fault]]
kind = "kill"
target = "replicas-of-a-block"
after_step = 166
[[fault]]
kind = "store_slow"
delay_ms = 200
seconds = 2.5
after_step = 250
[[fault]]
kind = "store_errors"
status = 500
share = 0.6
seconds = 2.5
after_step = 300
[[fault]]
kind = "store_outage"
seconds = 2.5
after_step = 350
[check]
digest = "undisturbed"
events = { checkpoint_damaged = 1, rollback = 1 }
"#;
    let file = scenario(&bench, "spoilt", body);
    let server = Moto::start();
    server.create_bucket("runs");
    let mut command = everstep();
    command.args(["chaos", "run"]).arg(file);
    command.arg("--run-dir").arg(bench.path().join("chaos"));
    for set in [
        "run.store=s3://runs/team",
        "run.steps=900",
        "checkpoint.every=60",
    ] {
        command.args(["--set", set]);
    }
    let command = command.envs(server.environment()).stdin(Stdio::null());
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    let shown = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{error}\n{shown}");

    let report = report(&bench);
    assert_eq!(report["steps"], 900);
    assert_eq!(report["digest_equal"], true);
    assert_eq!(report["faults_injected"], 5);
    assert_eq!(report["faults_recovered"], 5);
    let faults = report["faults"].as_array().unwrap();
    // The damaged object is found when it is needed; the checkpoint before it is used.
    let damaged = &faults[0];
    assert!(damaged["object"].is_string(), "{damaged}");
    assert_eq!(damaged["detected_by"], "checkpoint_damaged");
    // The proxy saw requests suffer, of every kind.
    for fault in &faults[2..] {
        assert!(fault["requests"].as_u64().unwrap() > 0, "{fault}");
    }
}

#[test]
fn a_scenario_that_did_not_happen_fails() {
    let bench = Workbench::new();
    let body = r#"
[[fault]]
kind = "kill"
role = "worker"
after_step = 500
[check]
digest = "undisturbed"
"#;
    let file = scenario(&bench, "late", body);
    let output = chaos_run(&bench, &file, &[]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("the scenario failed"), "{error}");
    let report = report(&bench);
    assert_eq!(report["passed"], false);
    assert_eq!(report["digest_equal"], true);
    let failures = report["failures"].to_string();
    assert!(
        failures.contains("0 faults happened; at least 1 were planned"),
        "{failures}"
    );
}

#[test]
fn mistakes_in_a_scenario_are_named() {
    let bench = Workbench::new();
    let fault = |fields: &str| {
        format!("[[fault]]\n{fields}\nafter_step = 1\n[check]\ndigest = \"undisturbed\"\n")
    };
    for (fields, parts) in [
        (
            "kind = \"explode\"\nrole = \"worker\"",
            &["wrong.toml", "fault 1: kind", "explode", "kill"][..],
        ),
        (
            "kind = \"kill\"\nprocess = \"worker-9\"",
            &["wrong.toml", "fault 1", "worker-9", "worker-1"],
        ),
        (
            "kind = \"network\"\nrole = \"worker\"\nseconds = 1",
            &["wrong.toml", "fault 1: loss", "bandwidth_mbit"],
        ),
        (
            "kind = \"store_slow\"\nseconds = 1",
            &["wrong.toml", "fault 1: kind", "s3://", "--simulate"],
        ),
    ] {
        let file = scenario(&bench, "wrong", &fault(fields));
        refused(&chaos_run(&bench, &file, &[]), parts);
        assert!(!bench.path().join("chaos").exists());
    }
}

#[test]
fn a_fault_in_a_run_that_does_not_allow_it_is_refused() {
    let bench = Workbench::new();
    let topology = bench.cluster(2, 2, 2);
    let running = bench.start("quiet", Some(&topology));
    assert!(running.steps().any(|step| step >= 5));
    let inject = |process: &str| {
        let mut command = everstep();
        command.args(["chaos", "inject", "--run-dir"]);
        command.arg(bench.path().join("quiet"));
        command.args([process, "hang-device"]).output().unwrap()
    };
    refused(&inject("worker-0"), &["[chaos] allow = true"]);
    refused(&inject("worker-7"), &["worker-7", "worker-1"]);
    running.finish(&bench, "quiet");
    assert_eq!(bench.count("quiet", "fault_injected"), 0);
    assert_eq!(bench.count("quiet", "process_lost"), 0);
}
