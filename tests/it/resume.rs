//! Everything dies, and the same command goes on.

use std::fs;
use std::process::Command;

use crate::support::{STEPS, Workbench, everstep};

#[test]
fn a_power_loss_changes_no_bit() {
    let bench = Workbench::new();
    let topology = bench.cluster(2, 2, 2);
    for (round, die_at) in [70, 120].into_iter().enumerate() {
        let mut command = bench.train("lost", Some(&topology));
        // Snapshots wait in files, which become objects by name.
        command.args(["--set", "checkpoint.memory_bytes=0"]);
        let running = bench.start_command("lost", command);
        let reached = running.steps().find(|step| *step >= die_at);
        assert!(
            reached.is_some(),
            "round {round} ended early: {}",
            bench.logs("lost")
        );
        running.power_loss();
    }
    bench.train_to_the_end("lost", Some(&topology));
    assert!(
        bench.count("lost", "rollback") > 0,
        "nothing was lost: the test did not test"
    );
    bench.demand_undisturbed("lost");
}

#[test]
fn tensors_through_shared_memory_and_over_quic_give_the_same_bits() {
    let bench = Workbench::new();
    let topology = bench.cluster(2, 2, 2);
    for (run_dir, shared_memory) in [("memory", true), ("quic", false)] {
        let mut train = bench.train(run_dir, Some(&topology));
        let setting = format!("cluster.shared_memory={shared_memory}");
        let output = train.args(["--set", &setting]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        bench.demand_undisturbed(run_dir);
        let lanes = bench
            .logs(run_dir)
            .matches("frames go through shared memory")
            .count();
        assert_eq!(lanes > 0, shared_memory, "{run_dir}: {lanes}");
    }
}

/// The checkpoints of a run, as another run directory of the same run finds them.
fn with_checkpoints_of(bench: &Workbench, run_dir: &str, other: &str) {
    let copied = Command::new("cp")
        .arg("-r")
        .args([bench.path().join(run_dir), bench.path().join(other)])
        .status();
    assert!(copied.unwrap().success());
}

#[test]
fn what_many_shards_and_workers_saved_others_resume() {
    let bench = Workbench::new();
    let saved = bench.cluster(4, 3, 2);
    let mut train = bench.train("saved", Some(&saved));
    let output = train.args(["--set", "run.stop_at=75"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(bench.digest("saved", None)["step"], 75);
    for (workers, shards, replication) in [(1, 1, 1), (2, 2, 2), (1, 5, 2)] {
        let run_dir = format!("resumed-{workers}-{shards}");
        with_checkpoints_of(&bench, "saved", &run_dir);
        let topology = bench.cluster(workers, shards, replication);
        bench.train_to_the_end(&run_dir, Some(&topology));
        bench.demand_undisturbed(&run_dir);
    }
}

#[test]
fn a_node_restores_what_it_kept_and_asks_the_store_for_the_rest() {
    let bench = Workbench::new();
    let topology = bench.cluster(1, 2, 1);
    let train = || {
        let mut train = bench.train("kept", Some(&topology));
        train.args(["--set", "checkpoint.keep_local=1"]);
        train
    };
    let running = bench.start_command("kept", train());
    running.wait_for_event("checkpoint_committed", |event| event["step"] == 50);
    running.power_loss();
    // One of them finds that its copies are damaged.
    let of_process = |name: &str| fs::read_dir(bench.path().join("kept/local").join(name));
    let damaged = of_process("shard-1").unwrap().map(|file| {
        let path = file.unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        bytes.iter_mut().for_each(|byte| *byte ^= 1);
        fs::write(path, bytes).unwrap();
    });
    assert!(damaged.count() > 0, "nothing was kept");
    assert!(of_process("shard-0").unwrap().count() > 0);
    bench.start_command("kept", train()).finish(&bench, "kept");

    let restored = bench.events("kept", "state_restored");
    let sum = |field: &str, process: &str| -> u64 {
        let of_it = restored.iter().filter(|event| event["process"] == process);
        of_it.map(|event| event[field].as_u64().unwrap()).sum()
    };
    assert!(sum("blocks", "shard-0") > 0, "{restored:?}");
    assert_eq!(sum("local_blocks", "shard-0"), sum("blocks", "shard-0"));
    assert!(sum("blocks", "shard-1") > 0, "{restored:?}");
    assert_eq!(sum("local_blocks", "shard-1"), 0);
    bench.demand_undisturbed("kept");
}

#[test]
fn a_run_stopped_early_has_the_long_runs_bits_and_goes_on() {
    let bench = Workbench::new();
    bench.train_to_the_end("whole", None);
    let stopped = bench
        .train("part", None)
        .args(["--set", "run.stop_at=100"])
        .output()
        .unwrap();
    assert!(
        stopped.status.success(),
        "{}",
        String::from_utf8_lossy(&stopped.stderr)
    );
    assert_eq!(bench.digest("part", None), bench.digest("whole", Some(100)));
    bench.train_to_the_end("part", None);
    assert_eq!(bench.digest("part", None)["step"], STEPS);
    assert_eq!(bench.digest("part", None), bench.digest("whole", None));
}

#[test]
fn a_finished_run_generates_the_same_text_twice_and_exports() {
    let bench = Workbench::new();
    bench.train_to_the_end("run", None);
    let generate = |seed: &str| {
        let mut command = everstep();
        command
            .arg("generate")
            .arg("--run-dir")
            .arg(bench.path().join("run"));
        command.args(["--prompt", "line 12", "--max-tokens", "40", "--seed", seed]);
        let output = command.output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(generate("1"), generate("1"));
    assert_ne!(generate("1"), generate("2"));
    assert!(generate("1").starts_with("line 12"), "{}", generate("1"));

    let out = bench.path().join("hf");
    let exported = everstep()
        .arg("export")
        .arg("--run-dir")
        .arg(bench.path().join("run"))
        .arg(&out)
        .output()
        .unwrap();
    assert!(
        exported.status.success(),
        "{}",
        String::from_utf8_lossy(&exported.stderr)
    );
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        assert!(out.join(file).exists(), "{file}");
    }
}
