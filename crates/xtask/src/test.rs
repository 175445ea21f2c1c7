//! `cargo xtask test`: everything that CI runs, each step named and timed.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;

use crate::harness::{self, Counts};
use crate::workspace::Workspace;
use crate::{architecture, process, setup, sim, tidy, transformers};

/// Options of `cargo xtask test`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Seeds that the simulator tries
    #[arg(long, default_value_t = 5_000)]
    sim_seeds: u64,
    /// Also compare with Hugging Face transformers, which is done anyway where `cargo xtask transformers` has run: fetches 3 GB
    #[arg(long)]
    transformers: bool,
}

/// Runs every check, also after one that failed, and ends with one line that says how many passed.
///
/// # Errors
/// If anything failed.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let start = Instant::now();
    let mut report = Report::default();
    report.check("set-up", || {
        setup::run(
            workspace,
            &setup::Options {
                tests: true,
                ..setup::Options::default()
            },
        )
    });
    let cargo = |arguments: &[&str]| process::run(process::cargo(workspace).args(arguments));
    report.check("format", || cargo(&["fmt", "--all", "--check"]));
    report.check("architecture", || architecture::check(workspace));
    report.check("tidy", || tidy::check(workspace));
    report.check("build", || cargo(&["build", "--workspace", "--locked"]));
    for arguments in harnesses(workspace) {
        report.tests(&arguments.join(" "), || {
            harness::run(process::cargo(workspace).args(&arguments))
        });
    }
    if options.transformers || transformers::is_installed(workspace) {
        report.check("transformers", || transformers::run(workspace));
    }
    report.check("simulation", || {
        sim::run(workspace, &sim::Options::seeds(options.sim_seeds))
    });
    report.check("clippy", || {
        cargo(&[
            "clippy",
            "--workspace",
            "--all-targets",
            "--locked",
            "--",
            "-D",
            "warnings",
        ])
    });
    report.close(start.elapsed())
}

/// nextest gives each test a process and a time limit and is used where it is installed; it leaves doc tests out.
fn harnesses(workspace: &Workspace) -> Vec<Vec<&'static str>> {
    let nextest = process::output(process::cargo(workspace).args(["nextest", "--version"])).is_ok();
    if nextest {
        vec![
            vec![
                "nextest",
                "run",
                "--config-file",
                ".ci/nextest.toml",
                "--workspace",
                "--locked",
                "--no-fail-fast",
            ],
            vec!["test", "--workspace", "--locked", "--doc", "--no-fail-fast"],
        ]
    } else {
        println!("cargo-nextest is not installed: using cargo's own harness");
        vec![vec!["test", "--workspace", "--locked", "--no-fail-fast"]]
    }
}

/// What was run, how long it took and how it ended.
#[derive(Debug, Default)]
struct Report {
    rows: Vec<(String, Duration, Counts)>,
}

impl Report {
    /// A step that passes or fails as a whole counts as one test.
    fn check(&mut self, name: &str, work: impl FnOnce() -> Result<()>) {
        self.step(name, || match work() {
            Ok(()) => Counts {
                passed: 1,
                failed: 0,
            },
            Err(error) => {
                eprintln!("error: {error:#}");
                Counts {
                    passed: 0,
                    failed: 1,
                }
            }
        });
    }

    /// A step that counts its tests itself.
    fn tests(&mut self, name: &str, work: impl FnOnce() -> Result<Counts>) {
        self.step(name, || {
            work().unwrap_or_else(|error| {
                eprintln!("error: {error:#}");
                Counts {
                    passed: 0,
                    failed: 1,
                }
            })
        });
    }

    fn step(&mut self, name: &str, work: impl FnOnce() -> Counts) {
        println!("\n== {name}");
        let start = Instant::now();
        let counts = work();
        let took = start.elapsed();
        println!(
            "== {name}: {} in {:.1} s",
            if counts.failed == 0 { "ok" } else { "FAILED" },
            took.as_secs_f64()
        );
        self.rows.push((name.to_owned(), took, counts));
    }

    fn close(self, total: Duration) -> Result<()> {
        println!("\n{:>8}  {:>7}  {:>7}  step", "seconds", "passed", "failed");
        let mut sum = Counts::default();
        for (name, took, counts) in &self.rows {
            println!(
                "{:>8.1}  {:>7}  {:>7}  {name}",
                took.as_secs_f64(),
                counts.passed,
                counts.failed
            );
            sum.add(*counts);
        }
        println!(
            "{:>8.1}  {:>7}  {:>7}  all\n",
            total.as_secs_f64(),
            sum.passed,
            sum.failed
        );
        println!("{} passed, {} failed", sum.passed, sum.failed);
        if sum.failed > 0 {
            bail!("some checks failed");
        }
        Ok(())
    }
}
