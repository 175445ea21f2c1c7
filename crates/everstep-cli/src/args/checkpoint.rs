//! Arguments of `everstep checkpoint`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// What to do with checkpoints.
#[derive(Debug, Subcommand)]
pub enum CheckpointCommand {
    /// List the committed checkpoints.
    Ls(LsArgs),
    /// Read a checkpoint and compare every object and block with its digest; exit 1 if something is damaged.
    Verify(VerifyArgs),
    /// Show which blocks differ between two checkpoints, and by how much.
    Diff(DiffArgs),
    /// Remove old checkpoints, and what dead uploads left.
    Prune(PruneArgs),
    /// Copy a run's checkpoints to another store; goes on where a copy was cut off.
    Cp(CpArgs),
    /// Keep a checkpoint, however old it gets.
    Pin(PinArgs),
    /// Let a pinned checkpoint go when its time has come.
    Unpin(PinArgs),
}

/// Whose checkpoints.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct PlaceArgs {
    /// A run directory, or a store's URL with the run's name at its end (`s3://bucket/prefix/run`, `file:///folder/run`).
    #[arg(value_name = "RUN")]
    pub run: Option<String>,
    /// Where the run lives.
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct LsArgs {
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Prints JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct VerifyArgs {
    #[command(flatten)]
    pub place: PlaceArgs,
    /// A committed step; the default is the last one.
    #[arg(long, value_name = "N", conflicts_with = "all")]
    pub step: Option<u64>,
    /// Every checkpoint.
    #[arg(long)]
    pub all: bool,
    /// Marks what is damaged, so that no run reads it, and lifts the marks of what is intact.
    #[arg(long)]
    pub quarantine: bool,
}

#[derive(Debug, Args)]
pub struct DiffArgs {
    /// A committed step, of another run or store with `RUN@` before it.
    #[arg(value_name = "[RUN@]STEP")]
    pub a: String,
    /// The step to compare it with.
    #[arg(value_name = "[RUN@]STEP")]
    pub b: String,
    /// Where the run lives that a bare step belongs to.
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Prints JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct PruneArgs {
    #[command(flatten)]
    pub place: PlaceArgs,
    /// Keeps the newest N intact checkpoints.
    #[arg(long, value_name = "N")]
    pub keep: usize,
    /// Keeps those of every step that K divides as well.
    #[arg(long, value_name = "K")]
    pub keep_every: Option<u64>,
    /// Keeps the M with the lowest evaluation loss as well.
    #[arg(long, value_name = "M", default_value_t = 0)]
    pub keep_best: usize,
    /// Shows what would go, and removes nothing.
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct CpArgs {
    /// A run directory, or a store's URL with the run's name at its end.
    #[arg(value_name = "SRC")]
    pub from: String,
    /// As SRC; the run keeps its name.
    #[arg(value_name = "DST")]
    pub to: String,
    /// Copies only this step; may be given several times.
    #[arg(long, value_name = "N")]
    pub step: Vec<u64>,
}

#[derive(Debug, Args)]
pub struct PinArgs {
    /// A committed step.
    #[arg(value_name = "STEP")]
    pub step: u64,
    #[command(flatten)]
    pub place: PlaceArgs,
}
