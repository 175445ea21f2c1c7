//! `cargo xtask sim`: the simulator over many seeds, or one seed with its trace.

use anyhow::Result;
use clap::Args;

use crate::process;
use crate::workspace::Workspace;

/// Options of `cargo xtask sim`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How many seeds to try
    #[arg(long, default_value_t = 5_000, value_name = "N")]
    seeds: u64,
    /// The first of them
    #[arg(long, default_value_t = 0, value_name = "S")]
    first: u64,
    /// Replay this one, event by event
    #[arg(long, conflicts_with_all = ["seeds", "first"], value_name = "S")]
    seed: Option<u64>,
    /// Part of the command that a violation prints; one seed is always traced
    #[arg(long, requires = "seed", hide = true)]
    trace: bool,
    /// Shrink it, if it fails, to the smallest plan that still does
    #[arg(long, requires = "seed", conflicts_with = "trace")]
    minimise: bool,
    /// Take the plan from this file, and only the draws from the seeds
    #[arg(long, value_name = "FILE")]
    plan: Option<std::path::PathBuf>,
}

impl Options {
    /// The first `seeds` seeds.
    pub(crate) fn seeds(seeds: u64) -> Self {
        Self {
            seeds,
            first: 0,
            seed: None,
            trace: false,
            minimise: false,
            plan: None,
        }
    }
}

/// Runs the simulator over all cores.
///
/// It is a program of its own, so that this one builds while the protocol does not, and runs as it was built for the tests:
/// optimised, with overflow checks, and without a second build.
///
/// # Errors
/// If an invariant did not hold for some seed.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    let mut command = process::cargo(workspace);
    command.args(["run", "--locked", "--package", "everstep-sim", "--"]);
    if let Some(plan) = &options.plan {
        command.arg("--plan").arg(std::path::absolute(plan)?);
    }
    match options.seed {
        Some(seed) => {
            let mode = if options.minimise {
                "--minimise"
            } else {
                "--trace"
            };
            command.args(["--seed", &seed.to_string(), mode])
        }
        None => command.args([
            "--seeds",
            &options.seeds.to_string(),
            "--first",
            &options.first.to_string(),
        ]),
    };
    process::run(&mut command)
}
