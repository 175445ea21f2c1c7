//! `cargo xtask sim`: the simulator over many seeds, or one seed with its trace.

use anyhow::{Result, bail};
use clap::Args;

/// Options of `cargo xtask sim`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How many seeds to try
    #[arg(long, default_value_t = 2_000)]
    seeds: u64,
    /// Replay this one with its trace
    #[arg(long, conflicts_with = "seeds")]
    seed: Option<u64>,
}

impl Options {
    pub(crate) fn seeds(seeds: u64) -> Self {
        Self { seeds, seed: None }
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    bail!("{options:?}")
}
