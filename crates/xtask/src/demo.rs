//! `cargo xtask demo`: a small model is trained on real text while its processes are killed, and no bit changes.

mod corpus;
mod curve;
mod follow;
mod picture;
mod scenario;
mod terminal;
mod victims;
mod watch;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::Value;

use self::curve::Curve;
use self::follow::JsonLines;
use self::scenario::Scenario;
use self::victims::Kill;
use self::watch::Watch;
use crate::workspace::Workspace;
use crate::{process, setup};

/// Options of `cargo xtask demo`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The chaos file: what is trained, on which cluster, and who is killed when
    #[arg(long, default_value = "chaos/fast/kill-worker-and-shard.toml")]
    scenario: PathBuf,
    /// The cluster of the undisturbed repetition; another one, because neither kills nor placement may change a bit
    #[arg(long, default_value = "topology/laptop.toml")]
    undisturbed_topology: PathBuf,
    /// At most so much text, in MB
    #[arg(long, default_value_t = 24)]
    corpus_mb: usize,
    /// Changes to the run file, as `everstep train --set` takes them
    #[arg(long = "set", value_name = "FIELD=VALUE")]
    set: Vec<String>,
}

/// Runs the demo from a bare checkout to the two digests.
///
/// # Errors
/// If anything that the demo claims did not happen.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    setup::run(workspace, &setup::Options::default())?;
    process::run(process::cargo(workspace).args([
        "build",
        "--release",
        "--locked",
        "--package",
        "everstep-cli",
    ]))?;
    let start = Instant::now();
    let demo = Demo::new(workspace, options)?;

    println!("\n== text");
    let corpus = corpus::gather(
        workspace,
        &demo.runs.join("demo-corpus.jsonl"),
        options.corpus_mb * 1_000_000,
    )?;
    println!(
        "{:.1} MB of Rust and Markdown in {} files of {} crates: {}",
        corpus.text_bytes as f64 / 1e6,
        corpus.documents,
        corpus.crates,
        corpus.file.display()
    );

    println!("\n== training, with kills");
    let disturbed = demo.train_disturbed(&corpus.file)?;

    println!(
        "\n== the first {} steps again, undisturbed, on {}",
        disturbed.step,
        options.undisturbed_topology.display()
    );
    let undisturbed = demo.train_undisturbed(&corpus.file, disturbed.step)?;

    println!("\n== result");
    demo.show(&disturbed, &undisturbed)?;
    println!(
        "{:.0} s in all, without the build",
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

/// What the disturbed run left for the comparison.
#[derive(Debug)]
struct Disturbed {
    kills: Vec<Kill>,
    /// The first checkpoint after the kills.
    step: u64,
    /// What `everstep digest` said of that step.
    digest: Value,
}

/// Where everything is.
#[derive(Debug)]
struct Demo<'a> {
    options: &'a Options,
    scenario: Scenario,
    root: &'a Path,
    everstep: PathBuf,
    runs: PathBuf,
}

impl<'a> Demo<'a> {
    fn new(workspace: &'a Workspace, options: &'a Options) -> Result<Self> {
        let target = workspace.target();
        let demo = Self {
            options,
            scenario: Scenario::read(&workspace.root().join(&options.scenario))?,
            root: workspace.root(),
            everstep: target.join("release/everstep"),
            runs: workspace.root().join("runs"),
        };
        // An earlier demo would be resumed, and a finished one has nothing left to kill.
        for folder in [demo.disturbed_dir(), demo.undisturbed_dir()] {
            if folder.exists() {
                fs::remove_dir_all(&folder)
                    .with_context(|| format!("cannot remove the old {}", folder.display()))?;
            }
        }
        Ok(demo)
    }

    fn disturbed_dir(&self) -> PathBuf {
        self.runs.join("demo")
    }

    fn undisturbed_dir(&self) -> PathBuf {
        self.runs.join("demo-undisturbed")
    }

    fn everstep(&self, arguments: &[&str], run_dir: &Path) -> Command {
        let mut command = Command::new(&self.everstep);
        command
            .current_dir(self.root)
            .args(arguments)
            .arg("--run-dir")
            .arg(run_dir);
        command
    }

    fn train(&self, topology: &Path, corpus: &Path, run_dir: &Path) -> Command {
        let mut command = self.everstep(&["train"], run_dir);
        command
            .arg(&self.scenario.workload.run)
            .arg("--topology")
            .arg(topology);
        command.arg("--set").arg(format!(
            "data.train=[{}]",
            Value::from(corpus.to_string_lossy().as_ref())
        ));
        for change in &self.options.set {
            command.arg("--set").arg(change);
        }
        command
    }

    fn json(&self, arguments: &[&str], run_dir: &Path) -> Result<Value> {
        let text = process::output(self.everstep(arguments, run_dir).arg("--json"))?;
        serde_json::from_str(&text)
            .with_context(|| format!("`everstep {}` gave no JSON", arguments.join(" ")))
    }

    /// Trains to the end, killing as planned, and takes the digest of the first checkpoint after the kills.
    fn train_disturbed(&self, corpus: &Path) -> Result<Disturbed> {
        let run_dir = self.disturbed_dir();
        let command = self.train(&self.scenario.workload.topology, corpus, &run_dir);
        let watch = Watch::new(self, &run_dir).train(command)?;
        for kill in &watch.kills {
            kill.must_have_happened()?;
        }
        let (step, digest) = watch
            .compared
            .context("the run committed no checkpoint after the kills")?;
        Ok(Disturbed {
            kills: watch.kills,
            step,
            digest,
        })
    }

    /// Trains up to `step` without a fault and takes its digest.
    fn train_undisturbed(&self, corpus: &Path, step: u64) -> Result<Value> {
        let run_dir = self.undisturbed_dir();
        let mut command = self.train(&self.options.undisturbed_topology, corpus, &run_dir);
        process::run(command.arg("--set").arg(format!("run.stop_at={step}")))?;
        self.json(&["digest", "--step", &step.to_string()], &run_dir)
    }

    /// Draws the curve, lets the model write, and compares.
    fn show(&self, disturbed: &Disturbed, undisturbed: &Value) -> Result<()> {
        let run_dir = self.disturbed_dir();
        let dataset = run_dir.join("data/dataset.json");
        let text = fs::read_to_string(&dataset)
            .with_context(|| format!("cannot read {}", dataset.display()))?;
        let dataset: Value = serde_json::from_str(&text).context("dataset.json is no JSON")?;
        let entropy = dataset["unigram_entropy"]
            .as_f64()
            .context("dataset.json names no unigram_entropy")?;
        let killed = |kill: &Kill| {
            kill.victim
                .as_ref()
                .map(|(victim, step, _)| (*step, victim.name.clone()))
        };
        let kills: Vec<(u64, String)> = disturbed.kills.iter().filter_map(killed).collect();
        let count = kills.len();
        let mut rows = JsonLines::read(&run_dir.join("metrics.jsonl"))?;
        rows.extend(JsonLines::read(&run_dir.join("events.jsonl"))?);
        let curve = Curve::new(&rows, kills, entropy);

        let equal = same(&disturbed.digest, undisturbed)?;
        let picture = run_dir.join("loss.png");
        let title = if equal {
            format!("{count} processes killed, not one bit changed")
        } else {
            format!("{count} processes killed: the digests differ")
        };
        let subtitle = format!(
            "{} steps on {}",
            curve.steps(),
            self.scenario.workload.topology.display()
        );
        picture::draw(&curve, &title, &subtitle, &picture)?;
        println!("{}", terminal::draw(&curve));
        println!("picture: {}", picture.display());

        println!("\na sample that the model wrote:");
        let prompt = "/// Returns the";
        let sample = process::output(&mut self.everstep(
            &[
                "generate",
                "--prompt",
                prompt,
                "--max-tokens",
                "160",
                "--temperature",
                "0.7",
            ],
            &run_dir,
        ))?;
        println!("{}", indented(sample.trim_end()));

        for kill in &disturbed.kills {
            if let (Some((victim, step, _)), Some(after)) = (&kill.victim, kill.replaced_after) {
                let name = &victim.name;
                println!(
                    "{name} (pid {}) killed after step {step}, replaced {:.1} s later",
                    victim.pid,
                    after.as_secs_f64()
                );
            }
        }
        let loss = curve.last().context("the run wrote no metrics")?;
        println!("loss {loss:.3} nats per token; unigram entropy of the text {entropy:.3}");
        println!("\nat step {}:", disturbed.step);
        for what in DIGESTS {
            println!(
                "{what:>10}  with kills   {}",
                disturbed.digest[what].as_str().unwrap_or("-")
            );
            println!(
                "{:>10}  undisturbed  {}",
                "",
                undisturbed[what].as_str().unwrap_or("-")
            );
        }
        ensure!(equal, "the digests differ: the kills changed the result");
        ensure!(
            loss < entropy,
            "the loss did not fall below the unigram entropy"
        );
        println!("equal: {count} kills changed nothing\n");
        Ok(())
    }
}

/// What `everstep digest --json` says of a step.
const DIGESTS: [&str; 2] = ["parameters", "optimizer"];

/// Whether two digests of a step are equal; both must be there.
fn same(left: &Value, right: &Value) -> Result<bool> {
    let read = |digest: &Value, what: &str| -> Result<String> {
        let text = digest[what].as_str().filter(|text| !text.is_empty());
        text.map(str::to_owned)
            .with_context(|| format!("`everstep digest` names no `{what}`: {digest}"))
    };
    let mut equal = true;
    for what in DIGESTS {
        equal &= read(left, what)? == read(right, what)?;
    }
    Ok(equal)
}

fn indented(text: &str) -> String {
    text.lines()
        .map(|line| format!("    {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn digests_are_compared_field_by_field() {
        let digest =
            |parameters: &str| json!({"step": 3, "parameters": parameters, "optimizer": "b"});
        assert!(same(&digest("a"), &digest("a")).unwrap());
        assert!(!same(&digest("a"), &digest("c")).unwrap());
        assert!(
            same(&digest("a"), &json!({"parameters": "a"}))
                .unwrap_err()
                .to_string()
                .contains("optimizer")
        );
    }
}
