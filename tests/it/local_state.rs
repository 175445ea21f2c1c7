//! What a process keeps on its own disk is torn, lost, garbled, or cannot be written: it ends with one reason and comes back, under an
//! incarnation that it never had.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{Running, Workbench};

/// Incarnations of every process, in the order in which it had them: none may come twice.
fn demand_new_incarnations(bench: &Workbench) {
    let mut seen: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for event in bench.lines("run", "events.jsonl") {
        if event["kind"] == "process_started" {
            let process = event["process"].as_str().unwrap().to_owned();
            let incarnation = event["incarnation"].as_u64().unwrap();
            seen.entry(process).or_default().push(incarnation);
        }
    }
    for (process, incarnations) in seen {
        assert!(
            incarnations.is_sorted_by(|a, b| a < b),
            "{process}: {incarnations:?}"
        );
    }
}

fn of_kind(bench: &Workbench, kind: &str) -> Vec<serde_json::Value> {
    let mut events = bench.lines("run", "events.jsonl");
    events.retain(|event| event["kind"] == kind);
    events
}

#[test]
fn damaged_ledgers_are_set_aside_and_their_processes_join_as_new_ones() {
    let bench = Workbench::new();
    let topology = bench.cluster(2, 2, 2);
    let running = bench.start("run", Some(&topology));
    assert!(running.steps().any(|step| step >= 60), "ended early");
    running.power_loss();

    let ledger = |process: &str| bench.path().join("run/ledger").join(process);
    let database = |process: &str| ledger(process).join("db/db");
    // A torn write, one that was lost although it was acknowledged, wrong bytes, and a lost folder.
    let generation = ledger("worker-0").join("generation");
    fs::write(&generation, &fs::read(&generation).unwrap()[..1]).unwrap();
    let log = fs::OpenOptions::new()
        .write(true)
        .open(database("shard-0"))
        .unwrap();
    log.set_len(0).unwrap();
    let mut bytes = fs::read(database("shard-1")).unwrap();
    bytes.iter_mut().for_each(|byte| *byte ^= 0x55);
    fs::write(database("shard-1"), bytes).unwrap();
    fs::remove_dir_all(ledger("coordinator").join("db")).unwrap();

    bench.start("run", Some(&topology)).finish(&bench, "run");
    let mut damaged: Vec<String> = of_kind(&bench, "ledger_damaged")
        .iter()
        .map(|event| event["process"].as_str().unwrap().to_owned())
        .collect();
    damaged.sort();
    assert_eq!(damaged, ["coordinator", "shard-0", "shard-1", "worker-0"]);
    demand_new_incarnations(&bench);
    bench.demand_undisturbed("run");
}

/// From now on the process cannot make any file longer than this; what it writes beyond is torn, and it gets SIGXFSZ.
fn limit_files(running: &Running, process: &str, bytes: u64) {
    let processes = running.processes();
    let (_, pid) = processes.iter().find(|(name, _)| name == process).unwrap();
    let pid = pid.expect("it lives");
    let status = Command::new("prlimit")
        .arg(format!("--pid={pid}"))
        .arg(format!("--fsize={bytes}"))
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn a_process_that_cannot_write_ends_and_comes_back() {
    let bench = Workbench::new();
    let topology = bench.cluster(2, 2, 2);
    let running = bench.start("run", Some(&topology));
    let mut steps = running.steps();
    let len = |path: &Path| fs::metadata(path).unwrap().len();
    let lost = |process: &str| {
        let events = of_kind(&bench, "process_lost");
        let of_agent = |event: &&serde_json::Value| {
            let reason = event["reason"].as_str().unwrap();
            event["process"] == process && reason.starts_with("the agent saw it end: ")
        };
        let found: Vec<String> = events
            .iter()
            .filter(of_agent)
            .map(|event| event["reason"].as_str().unwrap().to_owned())
            .collect();
        found
    };
    // A worker counts its slots in a file; the leader is in the middle of a line of the metrics.
    assert!(steps.any(|step| step >= 20), "ended early");
    limit_files(&running, "worker-0", 10);
    assert!(steps.any(|_| !lost("worker-0").is_empty()), "ended early");
    assert!(steps.any(|step| step >= 60), "ended early");
    let metrics = bench.path().join("run/metrics.jsonl");
    limit_files(&running, "coordinator", len(&metrics) + 40);
    assert!(
        steps.any(|_| !lost("coordinator").is_empty()),
        "ended early"
    );
    drop(steps);
    running.finish(&bench, "run");

    for process in ["worker-0", "coordinator"] {
        let reasons = lost(process);
        assert_eq!(reasons.len(), 1, "{reasons:?}");
        assert!(!reasons[0].contains('\n'), "{reasons:?}");
    }
    assert_eq!(bench.count("run", "process_restarted"), 2);
    demand_new_incarnations(&bench);
    bench.demand_undisturbed("run");
}

/// A file of a mount that only the run's processes see.
fn inside(running: &Running, path: PathBuf) -> PathBuf {
    let processes = running.processes();
    let pid = processes.iter().find_map(|(_, pid)| *pid).unwrap();
    PathBuf::from(format!("/proc/{pid}/root{}", path.display()))
}

#[test]
fn a_full_disk_is_named_and_waited_for() {
    let bench = Workbench::new();
    let topology = bench.cluster(2, 2, 2);
    let ledger = bench.path().join("run/ledger");
    fs::create_dir_all(&ledger).unwrap();
    let train = bench.train("run", Some(&topology));
    // A small disk for the ledgers, in a mount namespace of the run's own.
    let mut command = Command::new("unshare");
    command
        .args(["--user", "--map-root-user", "--mount", "sh", "-c"])
        .arg("mount -t tmpfs -o size=32m none \"$0\" && exec \"$@\"")
        .arg(&ledger)
        .arg(train.get_program())
        .args(train.get_args());
    for (name, value) in train.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let running = bench.start_command("run", command);
    let mut steps = running.steps();
    assert!(steps.any(|step| step >= 20), "ended early");

    let filler = inside(&running, ledger.join("filler"));
    let full = fs::write(&filler, vec![1; 64 << 20]).unwrap_err();
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    assert!(running.kill("worker-0"));
    let is_named = |event: &serde_json::Value| {
        let reason = event["reason"].as_str().unwrap();
        event["process"] == "worker-0"
            && reason.contains("ledger `")
            && reason.contains("No space left on device")
    };
    let named = || of_kind(&bench, "process_lost").iter().any(is_named);
    // The other worker goes on alone.
    assert!(steps.any(|_| named()), "ended early");
    // Through a process that lives: the one of before may be the worker.
    fs::remove_file(inside(&running, ledger.join("filler"))).unwrap();
    drop(steps);
    running.finish(&bench, "run");
    demand_new_incarnations(&bench);
    bench.demand_undisturbed("run");
}
