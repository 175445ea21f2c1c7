//! Everything dies, and the same command goes on.

use crate::support::{STEPS, Workbench, everstep};

#[test]
fn a_power_loss_changes_no_bit() {
    let bench = Workbench::new();
    bench.train_to_the_end("laptop", None);
    let topology = bench.cluster(2, 2, 2);
    for (round, die_at) in [70, 120].into_iter().enumerate() {
        let running = bench.start("lost", Some(&topology));
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
    assert_eq!(bench.digest("lost", None), bench.digest("laptop", None));
    assert_eq!(bench.numbers("lost"), bench.numbers("laptop"));
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
