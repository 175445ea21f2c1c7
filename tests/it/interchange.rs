//! Models that come from Hugging Face folders and go there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::support::{Workbench, error_line, everstep};

fn success(mut command: Command) -> Output {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Runs to exit 2 and gives the one line of the error.
fn refused(mut command: Command) -> String {
    error_line(&command.output().unwrap())
}

fn export(bench: &Workbench, run_dir: &str, out: &str, options: &[&str]) -> PathBuf {
    let out = bench.path().join(out);
    let mut command = everstep();
    command.arg("export").args(options).arg(&out);
    command.arg("--run-dir").arg(bench.path().join(run_dir));
    success(command);
    out
}

/// `everstep import` of a folder; the run file lies beside the bench's.
fn import(bench: &Workbench, folder: &Path, run_file: &str) -> Command {
    let mut command = everstep();
    command.arg("import").arg(folder);
    command.arg("--train").arg(bench.path().join("corpus.txt"));
    command.arg("--out").arg(bench.path().join(run_file));
    command
}

/// `everstep train` of an imported run for a few short steps.
fn train(bench: &Workbench, run_file: &str, run_dir: &str, settings: &[&str]) -> Command {
    let mut command = everstep();
    command.arg("train").arg(bench.path().join(run_file));
    command.arg("--run-dir").arg(bench.path().join(run_dir));
    let common = [
        "run.steps=40",
        "checkpoint.every=10",
        "compute.threads=1",
        "optimizer.warmup_steps=5",
        "optimizer.lr=1e-3",
        "cluster.block_params=4096",
    ];
    for field in common.iter().chain(settings) {
        command.args(["--set", field]);
    }
    command
}

fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let entry = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        (name, fs::read(path).unwrap())
    };
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(entry).collect();
    files.sort();
    files
}

/// A trained model, exported in shards.
fn exported(bench: &Workbench, options: &[&str], settings: &[&str]) -> PathBuf {
    let mut command = bench.train("first", None);
    for field in ["run.steps=20", "evaluation.every=0"]
        .iter()
        .chain(settings)
    {
        command.args(["--set", field]);
    }
    success(command);
    export(bench, "first", "hf", options)
}

#[test]
fn what_is_exported_imported_and_exported_again_has_the_same_bytes() {
    let llama = [
        "data.tokenizer={kind = \"bpe\", vocab_size = 300}",
        "optimizer.ema_decay=0.9",
    ];
    let gpt2 = ["model.architecture=gpt2", "model.kv_heads=4"];
    for (dtype, fields) in [
        ("float32", &llama[..]),
        ("bfloat16", &gpt2),
        ("float16", &gpt2),
    ] {
        let bench = Workbench::new();
        let options = ["--max-shard-bytes", "20000", "--dtype", dtype];
        let folder = exported(&bench, &options, fields);
        let names: Vec<String> = files(&folder).into_iter().map(|(name, _)| name).collect();
        for file in [
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "model.safetensors.index.json",
        ] {
            assert!(names.iter().any(|name| name == file), "{file}: {names:?}");
        }
        success(import(&bench, &folder, "second.toml"));
        success(train(&bench, "second.toml", "second", &["run.stop_at=1"]));
        let step_0 = [&options[..], &["--step", "0"]].concat();
        let again = export(&bench, "second", "again", &step_0);
        assert_eq!(files(&folder), files(&again), "{dtype}");
        // It did train: the next step's weights are others.
        let trained = export(&bench, "second", "trained", &options);
        assert_ne!(files(&folder), files(&trained), "{dtype}");
    }
}

#[test]
fn the_mean_of_the_weights_is_exported_if_there_is_one() {
    let bench = Workbench::new();
    let trained = exported(&bench, &[], &["optimizer.ema_decay=0.9"]);
    let [mean, first, first_mean] = [
        ("mean", &["--ema"][..]),
        ("first-weights", &["--step", "0"]),
        ("first-mean", &["--ema", "--step", "0"]),
    ]
    .map(|(out, options)| files(&export(&bench, "first", out, options)));
    assert_ne!(mean, files(&trained));
    assert_ne!(mean, first);
    assert_eq!(first, first_mean);

    let mut command = bench.train("none", None);
    command.args(["--set", "run.stop_at=1"]);
    success(command);
    let mut command = everstep();
    command.arg("generate").arg("--ema");
    command.arg("--run-dir").arg(bench.path().join("none"));
    let line = refused(command);
    assert!(
        line.starts_with("--ema: ")
            && line.ends_with("none keeps no running mean of its weights; `optimizer.ema_decay` of its run file would have"),
        "{line}"
    );
}

#[test]
fn an_imported_run_gives_the_same_bits_on_any_cluster_and_after_any_stop() {
    let bench = Workbench::new();
    let folder = exported(&bench, &["--dtype", "bfloat16"], &[]);
    success(import(&bench, &folder, "second.toml"));
    success(train(&bench, "second.toml", "whole", &[]));
    let digest = |run_dir: &str| bench.digest(run_dir, Some(40));
    let drawn = bench.digest("first", Some(20));
    assert_ne!(digest("whole")["parameters"], drawn["parameters"]);

    // On three shards with backups, stopped on the way; then the folder goes.
    let cluster = bench.cluster(2, 3, 2);
    let mut part = train(&bench, "second.toml", "part", &["run.stop_at=7"]);
    part.arg("--topology").arg(&cluster);
    success(part);
    let moved = bench.path().join("moved");
    fs::rename(&folder, &moved).unwrap();
    success(train(&bench, "second.toml", "part", &[]));
    assert_eq!(digest("part"), digest("whole"));

    // The same weights in another place, in shards of another type, are the same run; others are not.
    let init = |folder: &Path| format!("model.init={:?}", folder.display().to_string());
    let options = ["--max-shard-bytes", "9000", "--step", "0"];
    let other = export(&bench, "part", "other", &options);
    success(train(&bench, "second.toml", "part", &[&init(&other)]));
    let tokenizer = other.join("tokenizer.json").display().to_string();
    let tokenizer = format!("data.tokenizer.path={tokenizer:?}");
    let settings = [&*init(&other), &tokenizer];
    success(train(&bench, "second.toml", "elsewhere", &settings));
    assert_eq!(digest("elsewhere"), digest("whole"));
    let trained = export(&bench, "part", "trained", &[]);
    let error = refused(train(&bench, "second.toml", "part", &[&init(&trained)]));
    assert!(
        error.contains("second.toml: model.init_digest: is "),
        "{error}"
    );
    let loose = fs::read_to_string(bench.path().join("second.toml")).unwrap();
    let loose: Vec<&str> = loose
        .lines()
        .filter(|line| !line.starts_with("init_digest"))
        .collect();
    fs::write(bench.path().join("loose.toml"), loose.join("\n")).unwrap();
    let error = refused(train(&bench, "loose.toml", "part", &[&init(&trained)]));
    assert!(error.contains("model.init_digest was "), "{error}");
    assert_eq!(digest("part"), digest("whole"));
}

#[test]
fn what_cannot_be_imported_is_named() {
    let bench = Workbench::new();
    let folder = exported(&bench, &["--max-shard-bytes", "20000"], &[]);
    let again = bench.path().join("hf");
    let mut command = everstep();
    command.arg("export").arg(&again);
    command.arg("--run-dir").arg(bench.path().join("first"));
    let error = refused(command);
    assert!(
        error.ends_with("hf: is in the way; allowed: a folder that does not exist or is empty"),
        "{error}"
    );

    success(import(&bench, &folder, "second.toml"));
    let error = refused(import(&bench, &folder, "second.toml"));
    assert!(
        error.contains("second.toml: cannot be written: "),
        "{error}"
    );
    let error = refused(train(&bench, "second.toml", "refused", &["model.layers=3"]));
    assert!(
        error.contains("second.toml: model.layers: is 3; allowed: 1, which ")
            && error.ends_with("hf has"),
        "{error}"
    );
    let zeros = format!("model.init_digest={:?}", "0".repeat(64));
    let error = refused(train(&bench, "second.toml", "refused", &[&zeros]));
    assert!(
        error.contains("second.toml: model.init_digest: is 0000"),
        "{error}"
    );
    assert!(!bench.path().join("refused/run.toml").exists());

    let edit = |change: &dyn Fn(&mut Value)| {
        let file = folder.join("config.json");
        let mut json = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        change(&mut json);
        fs::write(file, json.to_string()).unwrap();
    };
    edit(&|json| json["rope_parameters"] = json!({"rope_type": "longrope"}));
    let says = "config.json: rope_type=`longrope` has no counterpart; allowed: default, linear, llama3, yarn";
    let error = refused(import(&bench, &folder, "third.toml"));
    assert!(error.ends_with(says), "{error}");
    let error = refused(train(&bench, "second.toml", "refused", &[]));
    assert!(
        error.contains("second.toml: model.init: ") && error.ends_with(says),
        "{error}"
    );
    edit(&|json| json["rope_parameters"] = json!(null));
    fs::remove_file(folder.join("tokenizer.json")).unwrap();
    let error = refused(import(&bench, &folder, "third.toml"));
    assert!(
        error.contains("tokenizer.json") && error.contains("--tokenizer"),
        "{error}"
    );
    let shard = first_shard(&folder);
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() - 1]).unwrap();
    let error = refused(import(&bench, &folder, "third.toml"));
    assert!(error.contains("but its header speaks of"), "{error}");
    assert!(!bench.path().join("third.toml").exists());
}

fn first_shard(folder: &Path) -> PathBuf {
    let names = files(folder).into_iter().map(|(name, _)| name);
    let mut shards = names.filter(|name| name.ends_with(".safetensors"));
    folder.join(shards.next().unwrap())
}
