//! `everstep checkpoint` on the store of a run that was really trained.

use std::fs;
use std::path::PathBuf;
use std::process::Output;

use serde_json::Value;

use crate::s3::servers::Moto;
use crate::support::{Workbench, error_line, everstep, seconds_between, wait_for};

/// Runs `everstep checkpoint` and demands an exit code; gives stdout and stderr.
fn checkpoint(bench: &Workbench, server: Option<&Moto>, arguments: &[&str], code: i32) -> String {
    let mut command = everstep();
    command
        .arg("checkpoint")
        .args(arguments)
        .current_dir(bench.path());
    command.envs(server.map(Moto::environment).unwrap_or_default());
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let text = String::from_utf8(stdout).unwrap() + &String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(code), "{arguments:?}: {text}");
    text
}

/// What the commands that use a run's weights say, all of which refuse.
fn errors_of_its_users(bench: &Workbench) -> Vec<String> {
    let commands = [
        &["export", "exported"][..],
        &["generate", "--prompt", "ab"],
        &["digest"],
    ];
    let error = |arguments: &[&str]| {
        let mut command = everstep();
        command.args(arguments).args(["--run-dir", "run"]);
        error_line(&command.current_dir(bench.path()).output().unwrap())
    };
    commands.map(error).to_vec()
}

/// The objects of a step, without its manifest.
fn objects(bench: &Workbench, step: u64) -> Vec<PathBuf> {
    let folder = bench
        .path()
        .join(format!("run/store/it/checkpoints/{step}"));
    let paths = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.extension().is_some_and(|e| e == "st"))
        .collect()
}

fn flip_last_byte(path: &PathBuf) {
    let mut bytes = fs::read(path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn checkpoints_are_listed_verified_compared_copied_and_pruned() {
    let bench = Workbench::new();
    bench.train_to_the_end("run", None);
    let run = |arguments: &[&str], code: i32| checkpoint(&bench, None, arguments, code);
    let listed = || -> Vec<Value> {
        serde_json::from_str(&run(&["ls", "--run-dir", "run", "--json"], 0)).unwrap()
    };
    let steps =
        |all: &[Value]| -> Vec<u64> { all.iter().map(|c| c["step"].as_u64().unwrap()).collect() };
    let all = listed();
    assert_eq!(steps(&all), [50, 100, 150, 200]);
    let digest = bench.digest("run", None);
    assert_eq!(all[3]["parameters"], digest["parameters"]);
    assert_eq!(all[3]["optimizer"], digest["optimizer"]);
    assert_eq!(run(&["ls", "run"], 0), run(&["ls", "--run-dir", "run"], 0));
    let url = format!("file://{}/run/store/it", bench.path().display());
    assert_eq!(run(&["ls", &url], 0), run(&["ls", "run"], 0));
    let text = run(&["verify", "run", "--all"], 0);
    assert_eq!(text.matches(" is intact: ").count(), 4, "{text}");

    let text = run(&["diff", "100", "100", "--run-dir", "run"], 0);
    assert!(text.starts_with("0 of "), "{text}");
    let text = run(&["diff", "run@50", &format!("{url}@100")], 0);
    assert!(text.contains("parameters differ, by at most"), "{text}");

    // To a bucket and back: the same bits under the same digests.
    let server = Moto::start();
    server.create_bucket("copies");
    let remote = |arguments: &[&str], code: i32| checkpoint(&bench, Some(&server), arguments, code);
    let bucket = "s3://copies/team/it";
    let text = remote(&["cp", "run", bucket], 0);
    assert!(
        text.contains("4 checkpoints copied, 0 there already"),
        "{text}"
    );
    let text = remote(&["cp", "run", bucket], 0);
    assert!(
        text.contains("0 checkpoints copied, 4 there already: 0 objects sent"),
        "{text}"
    );
    remote(&["verify", bucket, "--all"], 0);
    let back = format!("file://{}/back/it", bench.path().display());
    remote(&["cp", bucket, &back, "--step", "200"], 0);
    let text = run(&["diff", "run@200", &format!("{back}@200")], 0);
    assert!(text.starts_with("0 of "), "{text}");

    // Damage is named in a line of its own; marked, nobody reads it.
    let victim = &objects(&bench, 200)[0];
    flip_last_byte(victim);
    let name = victim.file_name().unwrap().to_str().unwrap();
    let text = run(&["verify", "run"], 1);
    assert!(text.contains(name) && text.contains("BLAKE3"), "{text}");
    let text = run(
        &[
            "cp",
            "run",
            &format!("file://{}/half/it", bench.path().display()),
        ],
        1,
    );
    assert!(
        text.contains("3 checkpoints copied") && text.contains(name),
        "{text}"
    );
    run(&["verify", "run", "--quarantine"], 1);
    assert_eq!(listed()[3]["quarantined"], true);
    assert_eq!(bench.digest("run", None)["step"], 150);
    flip_last_byte(victim);
    run(&["verify", "run", "--step", "200", "--quarantine"], 0);
    assert_eq!(bench.digest("run", None), digest);

    run(&["pin", "50", "run"], 0);
    run(&["pin", "60", "run"], 2);
    let orphan = bench.path().join("run/store/it/checkpoints/120");
    fs::create_dir(&orphan).unwrap();
    let file = fs::File::create(orphan.join("blocks-000000-000000-dead-0.st")).unwrap();
    file.set_modified(std::time::UNIX_EPOCH).unwrap();
    let text = run(&["prune", "run", "--keep", "1", "--dry-run"], 0);
    assert!(
        text.contains("would remove: 2 checkpoints, 1 orphans"),
        "{text}"
    );
    assert_eq!(listed().len(), 4);
    run(&["prune", "run", "--keep", "1"], 0);
    assert_eq!(steps(&listed()), [50, 200]);
    assert!(!orphan.exists());
    run(&["unpin", "50", "run"], 0);
    run(&["prune", "run", "--keep", "1"], 0);
    assert_eq!(steps(&listed()), [200]);
    bench.demand_undisturbed_digest("run");
}

#[test]
fn mistakes_with_checkpoints_are_one_line() {
    let bench = Workbench::new();
    let output = bench
        .train("run", None)
        .args(["--set", "run.stop_at=50"])
        .output()
        .unwrap();
    assert!(output.status.success());
    let server = Moto::start();
    server.create_bucket("there");
    for (arguments, part) in [
        (&["ls", "nowhere"][..], "nowhere"),
        (&["ls", "file:///nowhere/it"], "there is no run here"),
        (&["ls", "s3://there"], "end the URL with the run's name"),
        (
            &["ls", "s3://wrong/it"],
            "run `it` does not exist in store `s3://wrong`",
        ),
        (
            &["ls", "s3://there/it"],
            "run `it` does not exist in store `s3://there`",
        ),
        (&["cp", "run", "s3://wrong/it"], "the bucket does not exist"),
        (&["cp", "run", "s3://there/other"], "a run keeps its name"),
        (&["prune", "run", "--keep", "0"], "at least 1"),
        (&["diff", "50", "50"], "which run?"),
        (
            &["verify", "run", "--step", "60"],
            "step 60 has no committed checkpoint",
        ),
    ] {
        let text = checkpoint(&bench, Some(&server), arguments, 2);
        let errors: Vec<&str> = text.lines().filter(|l| l.starts_with("error: ")).collect();
        assert!(
            errors.len() == 1 && errors[0].contains(part),
            "{arguments:?}: {text}"
        );
    }

    // A manifest of a newer version: the run is refused and stays as it is.
    let manifest = bench
        .path()
        .join("run/store/it/checkpoints/50/MANIFEST.json");
    let text = fs::read_to_string(&manifest).unwrap();
    let (head, body) = text.split_once("\"body\"").unwrap();
    let digest = head.split('"').find(|part| part.len() == 64).unwrap();
    let head = head
        .replace("\"version\": 3", "\"version\": 9")
        .replace(digest, &"0".repeat(64));
    fs::write(&manifest, head + "\"body\"" + body).unwrap();
    let newer = fs::read(&manifest).unwrap();
    let output = bench.train("run", None).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("MANIFEST.json` has version 9"), "{error}");
    let copy = format!("file://{}/copy/it", bench.path().display());
    for error in errors_of_its_users(&bench) {
        assert!(error.contains("MANIFEST.json` has version 9"), "{error}");
    }
    for arguments in [
        &["ls", "run"][..],
        &["verify", "run"],
        &["prune", "run", "--keep", "1"],
        &["cp", "run", &copy],
    ] {
        let text = checkpoint(&bench, None, arguments, 2);
        assert!(text.contains("MANIFEST.json` has version 9"), "{text}");
    }
    assert_eq!(fs::read(&manifest).unwrap(), newer);
}

#[test]
fn weights_of_another_run_of_the_same_name_are_refused() {
    let bench = Workbench::new();
    for (run_dir, seed) in [("run", "run.seed=7"), ("other", "run.seed=8")] {
        let mut train = bench.train(run_dir, None);
        train.args(["--set", "run.stop_at=50", "--set", seed]);
        assert!(train.output().unwrap().status.success());
    }
    let store = |run_dir: &str| bench.path().join(run_dir).join("store");
    fs::remove_dir_all(store("run")).unwrap();
    fs::rename(store("other"), store("run")).unwrap();
    for error in errors_of_its_users(&bench) {
        assert!(
            error.contains("run `it` exists with another identity: seed is `8` and not `7`"),
            "{error}"
        );
    }
}

#[test]
fn checkpoints_by_time_come_by_the_clock_and_the_status_says_so() {
    let bench = Workbench::new();
    let run = fs::read_to_string(bench.run_file()).unwrap();
    let by_time = run.replace("[checkpoint]\nevery = 50", "[checkpoint]\nevery = \"1s\"");
    assert_ne!(run, by_time);
    fs::write(bench.run_file(), by_time).unwrap();
    let topology = bench.cluster(2, 2, 2);
    let running = bench.start_slow("run", &topology, 10);
    let is_early = |event: &Value| event["step"].as_u64() < Some(200);
    let first = running.wait_for_event("checkpoint_committed", is_early);
    let after = |event: &Value| is_early(event) && event["step"].as_u64() > first["step"].as_u64();
    let second = running.wait_for_event("checkpoint_committed", after);
    assert!(seconds_between(&first, &second) > 0.5);
    let cadence = wait_for("the measured interval", || {
        let cadence = running.status()["store"]["cadence"].clone();
        cadence["upload_seconds"].is_number().then_some(cadence)
    });
    assert_eq!(cadence["every"], "1s");
    assert_eq!(cadence["interval_seconds"], 1.0);
    running.finish(&bench, "run");
    bench.demand_undisturbed_digest("run");
}

#[test]
fn the_scrub_finds_a_damaged_checkpoint_before_it_is_needed() {
    let bench = Workbench::new();
    let stopped = bench
        .train("run", None)
        .args(["--set", "run.stop_at=100"])
        .output()
        .unwrap();
    assert!(stopped.status.success());
    // Not the newest, so nobody but the scrub has a reason to read it.
    flip_last_byte(&objects(&bench, 50)[0]);
    let topology = bench.cluster(2, 2, 2);
    let mut train = bench.train("run", Some(&topology));
    train.args(["--set", "chaos.allow=true"]);
    let running = bench.start_command("run", train);
    running.wait_for_step(103);
    for worker in ["worker-0", "worker-1"] {
        running.slow_down(worker, 20);
    }
    let damaged = running.wait_for_event("checkpoint_damaged", |_| true);
    assert_eq!(damaged["step"], 50);
    let listed: Vec<Value> =
        serde_json::from_str(&checkpoint(&bench, None, &["ls", "run", "--json"], 0)).unwrap();
    let of = |step| listed.iter().find(|c| c["step"] == step).unwrap();
    assert_eq!(of(50)["quarantined"], true);
    assert_eq!(of(100)["quarantined"], false);
    running.finish(&bench, "run");
    assert_eq!(bench.count("run", "checkpoint_damaged"), 1);
    bench.demand_undisturbed_digest("run");
}
