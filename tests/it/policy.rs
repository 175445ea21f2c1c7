//! Spikes of the loss are skipped by a verdict that no failure changes, and a run that only skips ends with one error.

use std::fs;

use serde_json::Value;

use crate::support::{Running, STEPS, Workbench};

const POLICY: [&str; 3] = [
    "policy.loss_spike=skip",
    "policy.spike_sd=4",
    "policy.spike_window=20",
];

/// Text with some lines of noise, which no model that has learned the rest expects.
fn with_noise() -> Workbench {
    let bench = Workbench::new();
    let mut state = 1_u32;
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        char::from(b'!' + ((state >> 16) % 90) as u8)
    };
    let text: String = (0..4000)
        .map(|line| match line % 400 {
            399 => (0..96).map(|_| noise()).chain(['\n']).collect(),
            _ => format!("line {line}: {} steps are not lost\n", line * line % 977),
        })
        .collect();
    fs::write(bench.path().join("corpus.txt"), text).unwrap();
    bench
}

fn start(bench: &Workbench, run_dir: &str, is_cluster: bool, settings: &[&str]) -> Running {
    let topology = is_cluster.then(|| bench.cluster(3, 2, 2));
    let mut train = bench.train(run_dir, topology.as_deref());
    for setting in settings {
        train.arg("--set").arg(setting);
    }
    bench.start_command(run_dir, train)
}

fn of_kind(bench: &Workbench, run_dir: &str, kind: &str) -> Vec<Value> {
    let mut events = bench.lines(run_dir, "events.jsonl");
    events.retain(|event| event["kind"] == kind);
    events
}

/// Each skipped step once, with the numbers that it was judged by: a leader that begins where another died says them again.
fn spikes(bench: &Workbench, run_dir: &str) -> Vec<(u64, String)> {
    let told = |event: &Value| {
        let judged = format!("{} {} {}", event["loss"], event["mean"], event["sd"]);
        (event["step"].as_u64().unwrap(), judged)
    };
    let mut spikes: Vec<_> = of_kind(bench, run_dir, "loss_spike")
        .iter()
        .map(told)
        .collect();
    spikes.sort();
    spikes.dedup();
    spikes
}

#[test]
fn spikes_are_skipped_alike_whatever_is_killed_around_them() {
    let bench = with_noise();
    start(&bench, "laptop", false, &POLICY).finish(&bench, "laptop");
    start(&bench, "off", false, &[]).finish(&bench, "off");
    let expected = spikes(&bench, "laptop");
    assert!(expected.len() >= 4, "{expected:?}");
    assert!(expected.iter().all(|(step, _)| *step >= 20), "{expected:?}");
    let skipped = bench.count("laptop", "step_skipped");
    assert_eq!(skipped, expected.len());
    assert_eq!(bench.count("off", "step_skipped"), 0);
    assert_ne!(bench.digest("laptop", None), bench.digest("off", None));

    // In logs a step is known by how many are committed with it: `step` steps are committed when step `step` is in work.
    let running = start(&bench, "run", true, &POLICY);
    let mut killed = Vec::new();
    let victims = ["worker-0", "coordinator", "shard-0", "worker-1"];
    let mut steps = running.steps();
    for (number, (spike, _)) in expected.iter().take(victims.len()).enumerate() {
        let _ = steps.find(|step| step >= spike);
        killed.extend(running.kill_first_alive(&[victims[number]]));
    }
    // A spike is behind the last checkpoint when everything goes at once.
    let (last, _) = expected[expected.len() - 1];
    let is_late = steps.any(|step| step > last);
    drop(steps);
    running.power_loss();
    assert!(is_late, "the run ended before the power went");
    assert_eq!(killed.len(), victims.len(), "{killed:?}");
    start(&bench, "run", true, &POLICY).finish(&bench, "run");

    assert!(bench.count("run", "process_lost") >= victims.len());
    assert_eq!(spikes(&bench, "run"), expected);
    assert_eq!(bench.digest("run", None), bench.digest("laptop", None));
    assert_eq!(bench.numbers("run"), bench.numbers("laptop"));
}

#[test]
fn a_run_that_skips_too_much_ends_with_one_error() {
    let bench = Workbench::new();
    let settings = [
        "policy.loss_spike=skip",
        "policy.spike_sd=0.01",
        "policy.spike_window=5",
        "policy.skip_limit=3",
        "checkpoint.every=5",
    ];
    let end_of = |run_dir: &str, is_cluster: bool| {
        let status = start(&bench, run_dir, is_cluster, &settings).end();
        let said = fs::read_to_string(bench.path().join(format!("{run_dir}.stderr"))).unwrap();
        let errors: Vec<String> = said
            .lines()
            .filter(|line| line.starts_with("error: "))
            .map(str::to_owned)
            .collect();
        assert_eq!(errors.len(), 1, "{said}");
        assert_eq!(status.code(), Some(1), "{said}");
        errors[0].clone()
    };
    let error = end_of("laptop", false);
    assert!(
        error.starts_with("error: 3 steps in a row before step "),
        "{error}"
    );
    assert!(error.contains("policy.skip_limit"), "{error}");
    let steps = bench.numbers("laptop");
    assert!((steps.len() as u64) < STEPS);
    // The same end on a cluster, again after it, and with everything it says in the log.
    for _ in 0..2 {
        assert_eq!(end_of("run", true), error);
        assert_eq!(bench.numbers("run"), steps);
    }
    assert!(spikes(&bench, "run").len() >= 3);
}
