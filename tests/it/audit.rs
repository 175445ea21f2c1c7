//! A device that lies is named and quarantined before a lie is committed; nobody else is accused.

use everstep_cluster::RunDir;
use everstep_cluster::control::{self, Injection, Reply, Request};

use crate::support::{Running, STEPS, Workbench};

/// Three workers under audit, in a run that allows faults on purpose.
fn start(bench: &Workbench, settings: &[&str]) -> Running {
    let topology = bench.cluster(3, 2, 2);
    let mut train = bench.train("run", Some(&topology));
    for setting in settings {
        train.arg("--set").arg(setting);
    }
    bench.start_command("run", train)
}

/// Makes a process of the run misbehave, once it has joined.
fn inject(bench: &Workbench, running: &Running, process: &str, fault: &Injection) -> u64 {
    let run_dir = RunDir::new(bench.path().join("run"));
    let request = Request::Inject {
        process: process.to_owned(),
        fault: fault.clone(),
    };
    let step = running.steps().find(|step| *step >= 10).unwrap();
    let reply = control::send(&run_dir, "local", &request).unwrap();
    assert_eq!(reply, Reply::Done);
    step
}

#[test]
fn a_device_that_flips_bits_is_quarantined_and_changes_no_bit() {
    let bench = Workbench::new();
    let running = start(&bench, &["audit.share=1.0", "chaos.allow=true"]);
    let lies = Injection::FlipGradientBits { share: 1.0 };
    let from = inject(&bench, &running, "worker-1", &lies);
    running.finish(&bench, "run");

    let events = bench.lines("run", "events.jsonl");
    let of_kind = |kind: &str| -> Vec<&serde_json::Value> {
        events
            .iter()
            .filter(|event| event["kind"] == kind)
            .collect()
    };
    assert!(!of_kind("fault_injected").is_empty(), "nothing was flipped");
    assert!(!of_kind("audit_mismatch").is_empty());
    let quarantined = of_kind("worker_quarantined");
    assert_eq!(quarantined.len(), 1, "{quarantined:?}");
    assert_eq!(quarantined[0]["process"], "worker-1");
    assert_eq!(quarantined[0]["permanent"], true);
    let step = quarantined[0]["step"].as_u64().unwrap();
    // In the step of its first lie: what it does after that is leased nothing.
    let first = of_kind("fault_injected")[0]["step"].as_u64().unwrap();
    assert!(
        step >= from.min(first) && step <= first + 1,
        "{step} {first}"
    );
    bench.demand_undisturbed("run");
}

#[test]
fn audits_of_honest_workers_accuse_nobody() {
    let bench = Workbench::new();
    let running = start(&bench, &["audit.share=0.5"]);
    let mut killed = 0;
    for step in running.steps() {
        if killed < 6 && step >= (killed + 1) * 25 {
            let victims = ["worker-0", "shard-1", "worker-2"];
            killed += u64::from(running.kill(victims[killed as usize % 3]));
        }
    }
    running.finish(&bench, "run");
    assert_eq!(killed, 6, "the run ended before all kills had happened");
    assert_eq!(bench.count("run", "audit_mismatch"), 0);
    assert_eq!(bench.count("run", "worker_quarantined"), 0);
    bench.demand_undisturbed("run");
}

#[test]
fn a_gradient_that_is_not_a_number_skips_its_step() {
    let bench = Workbench::new();
    let running = start(&bench, &["chaos.allow=true"]);
    inject(&bench, &running, "worker-0", &Injection::NonFiniteGradient);
    running.finish(&bench, "run");
    assert_eq!(bench.count("run", "fault_injected"), 1);
    assert_eq!(bench.count("run", "step_skipped"), 1);
    assert_eq!(bench.numbers("run").len() as u64, STEPS);
}

#[test]
fn a_run_that_does_not_allow_faults_refuses_them() {
    let bench = Workbench::new();
    let running = start(&bench, &[]);
    assert!(running.steps().any(|step| step >= 1));
    let request = Request::Inject {
        process: "worker-0".to_owned(),
        fault: Injection::NonFiniteGradient,
    };
    let run_dir = RunDir::new(bench.path().join("run"));
    let reply = control::send(&run_dir, "local", &request).unwrap();
    let Reply::Refused { message } = reply else {
        panic!("{reply:?}");
    };
    assert!(message.contains("[chaos] allow = true"), "{message}");
    running.finish(&bench, "run");
    assert_eq!(bench.count("run", "fault_injected"), 0);
}

/// Slots that a process has computed in all its lives.
fn slots(bench: &Workbench, process: &str) -> u64 {
    let file = format!("run/status/{process}.slots");
    let text = std::fs::read_to_string(bench.path().join(file)).unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("computed "))
        .unwrap();
    line.trim().parse().unwrap()
}

fn audit(bench: &Workbench, arguments: &[&str]) -> std::process::Output {
    let run_dir = bench.path().join("run");
    crate::support::everstep()
        .arg("audit")
        .args(arguments)
        .arg("--run-dir")
        .arg(run_dir)
        .output()
        .unwrap()
}

#[test]
fn a_quarantine_outlives_the_whole_cluster_until_it_is_lifted() {
    let bench = Workbench::new();
    let settings = ["audit.share=1.0", "chaos.allow=true"];
    let running = start(&bench, &settings);
    let lies = Injection::FlipGradientBits { share: 1.0 };
    inject(&bench, &running, "worker-1", &lies);
    let condemned = || bench.count("run", "worker_quarantined") > 0;
    let step = running.steps().find(|_| condemned()).unwrap();
    let refused = audit(&bench, &["clear", "worker-1"]);
    assert_eq!(refused.status.code(), Some(2), "the run is going on");
    running.power_loss();
    assert!(step < 150, "too late to see anything: {step}");
    let computed = slots(&bench, "worker-1");

    // Nobody is told to lie now, and nobody is left who remembers.
    let running = start(&bench, &[&settings[..], &["run.stop_at=150"]].concat());
    running.finish(&bench, "run");
    assert_eq!(slots(&bench, "worker-1"), computed, "it was leased slots");
    assert_eq!(bench.count("run", "worker_quarantined"), 1);
    let status = everstep_cluster::read_status(&RunDir::new(bench.path().join("run"))).unwrap();
    let shown = &status.leader.quarantined;
    assert_eq!(shown.len(), 1, "{shown:?}");
    assert_eq!(
        (shown[0].process.as_str(), shown[0].worker),
        ("worker-1", 1)
    );
    assert!(shown[0].slot.is_some() && shown[0].lied != shown[0].truth);

    let unknown = audit(&bench, &["clear", "worker-2"]);
    assert_eq!(unknown.status.code(), Some(2));
    let error = String::from_utf8(unknown.stderr).unwrap();
    assert!(
        error.contains("worker-2 is not quarantined; quarantined: worker-1"),
        "{error}"
    );
    let listed = audit(&bench, &["list"]);
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert!(
        listed.contains("worker-1 in worker-1 on local: lied in step"),
        "{listed}"
    );
    let lifted = audit(&bench, &["clear", "worker-1"]);
    assert!(lifted.status.success(), "{lifted:?}");
    assert!(audit(&bench, &["list"]).stdout.is_empty());

    start(&bench, &settings).finish(&bench, "run");
    assert!(slots(&bench, "worker-1") > computed, "it is trusted again");
    assert_eq!(bench.count("run", "worker_quarantined"), 1);
    bench.demand_undisturbed("run");
}
