//! Command-line arguments.

// What clap would show to users.
#![allow(missing_docs)]

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use checkpoint::CheckpointCommand;

pub mod checkpoint;

/// Trains language models on clusters that fail, without losing a step.
#[derive(Debug, Parser)]
#[command(name = "everstep", version, about)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train to the end, in the foreground; goes on where an existing run directory stands.
    Train(TrainArgs),
    /// Supervise the processes of one node of a topology.
    Node(NodeArgs),
    /// Move everything off a node and end its processes, while the run goes on.
    Drain(DrainArgs),
    /// Show leader, step and processes of a run.
    Status(RunArgs),
    /// Show the digests of parameters and optimizer state at a committed step.
    Digest(DigestArgs),
    /// Write a committed step as a Hugging Face folder.
    Export(ExportArgs),
    /// Check a Hugging Face folder and print a run file that trains on from it.
    Import(ImportArgs),
    /// Let the model continue a text.
    Generate(GenerateArgs),
    /// Print a text's tokens, their logits and the likeliest continuation as JSON.
    #[command(hide = true)]
    Logits(LogitsArgs),
    /// List, verify, compare, pin, remove and copy checkpoints.
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Make the cluster's certificates.
    Certs(CertsArgs),
    /// See and lift the quarantines of devices that lied.
    #[command(subcommand)]
    Audit(AuditCommand),
    /// Break runs on purpose.
    #[command(subcommand)]
    Chaos(ChaosCommand),
    /// One process of a topology; started by `train` and `node`.
    #[command(hide = true)]
    Process(ProcessArgs),
}

/// Which run.
#[derive(Debug, Args)]
pub struct RunFileArgs {
    /// The run file.
    #[arg(value_name = "RUN.toml")]
    pub run_file: PathBuf,
    /// Which roles live in which process and on which node; the default is one process.
    #[arg(long, value_name = "T.toml")]
    pub topology: Option<PathBuf>,
    /// Sets a field of the run file, for example `--set optimizer.lr=3e-4`.
    #[arg(long = "set", value_name = "FIELD=VALUE")]
    pub set: Vec<String>,
    /// Where the run lives; the default is `runs/<name>`.
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct TrainArgs {
    #[command(flatten)]
    pub run: RunFileArgs,
    /// Goes on although the device kind, libtorch version or kernel settings differ from those the run was started with;
    /// the weights may then differ from the undisturbed run's.
    #[arg(long)]
    pub allow_other_platform: bool,
}

#[derive(Debug, Args)]
pub struct NodeArgs {
    #[command(flatten)]
    pub run: RunFileArgs,
    /// The node of the topology that this machine is.
    #[arg(long, value_name = "NAME")]
    pub node: String,
    /// Looks for notices that this machine will be taken away: aws, gcp or azure; beside what the topology file says of the node.
    #[arg(long, value_name = "PROVIDER")]
    pub preemption: Vec<String>,
    /// Where to look instead of the provider's own address.
    #[arg(long, value_name = "URL")]
    pub preemption_endpoint: Option<String>,
    /// Seconds between SIGTERM and the end of this machine: Kubernetes and Slurm leave 30 if not told otherwise.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub grace: u64,
}

#[derive(Debug, Args)]
pub struct DrainArgs {
    /// The node.
    #[arg(value_name = "NODE")]
    pub node: String,
    /// Where the run lives.
    #[arg(long, value_name = "DIR")]
    pub run_dir: PathBuf,
    /// Seconds until the machine is taken away, if it is.
    #[arg(long, value_name = "N")]
    pub seconds_left: Option<u64>,
}

#[derive(Debug, Args)]
pub struct ProcessArgs {
    /// Where the run lives.
    #[arg(long)]
    pub run_dir: PathBuf,
    /// Name of the process in the topology.
    #[arg(long)]
    pub name: String,
}

#[derive(Debug, Args)]
pub struct RunArgs {
    /// Where the run lives.
    #[arg(long, value_name = "DIR")]
    pub run_dir: PathBuf,
    /// Prints JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct DigestArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// A committed step; the default is the last one.
    #[arg(long, value_name = "N")]
    pub step: Option<u64>,
}

#[derive(Debug, Args)]
pub struct ExportArgs {
    /// Where the run lives.
    #[arg(long, value_name = "DIR")]
    pub run_dir: PathBuf,
    /// A committed step, or 0 for what training began with; the default is the last one.
    #[arg(long, value_name = "N")]
    pub step: Option<u64>,
    /// Take the running mean of the weights (`optimizer.ema_decay`).
    #[arg(long)]
    pub ema: bool,
    /// Type of the tensors.
    #[arg(long, value_enum, default_value_t = ExportDtype::Float32)]
    pub dtype: ExportDtype,
    /// Bytes of tensors in one safetensors file at most, unless a single tensor is larger.
    #[arg(long, value_name = "N", default_value_t = everstep_spec::hugging_face::DEFAULT_SHARD_BYTES)]
    pub max_shard_bytes: u64,
    /// The folder to write; must not exist or be empty.
    #[arg(value_name = "OUT")]
    pub out: PathBuf,
}

/// Type of exported tensors.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ExportDtype {
    Float32,
    Bfloat16,
    Float16,
}

#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The folder: config.json, model.safetensors or its shards with their index, tokenizer.json.
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
    /// Text to train on: files, globs or folders.
    #[arg(long, value_name = "PATH", required = true, num_args = 1..)]
    pub train: Vec<PathBuf>,
    /// The tokenizer, if it is not in the folder.
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Where the run file goes, must not exist; printed if left out.
    #[arg(long, value_name = "RUN.toml")]
    pub out: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct LogitsArgs {
    /// Where the run lives.
    #[arg(long, value_name = "DIR")]
    pub run_dir: PathBuf,
    /// A committed step, or 0; the default is the last one.
    #[arg(long, value_name = "N")]
    pub step: Option<u64>,
    /// The text.
    #[arg(long)]
    pub prompt: String,
    /// How many tokens to continue it by.
    #[arg(long, default_value_t = 32)]
    pub max_tokens: usize,
}

#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// Where the run lives.
    #[arg(long, value_name = "DIR")]
    pub run_dir: PathBuf,
    /// A committed step, or 0 for what training began with; the default is the last one.
    #[arg(long, value_name = "N")]
    pub step: Option<u64>,
    /// Take the running mean of the weights (`optimizer.ema_decay`).
    #[arg(long)]
    pub ema: bool,
    /// The text to go on from.
    #[arg(long, default_value = "\n")]
    pub prompt: String,
    /// Most tokens to generate.
    #[arg(long, default_value_t = 200)]
    pub max_tokens: usize,
    /// 0 takes the most likely token; higher is more varied.
    #[arg(long, default_value_t = 0.8)]
    pub temperature: f64,
    /// Samples from the smallest set of tokens with at least this probability.
    #[arg(long, default_value_t = 0.95)]
    pub top_p: f64,
    /// Samples from this many most likely tokens at most; 0 does not limit.
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Samples of different seeds differ; the same seed gives the same text.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// How many samples.
    #[arg(long, default_value_t = 1)]
    pub samples: u64,
}

#[derive(Debug, Args)]
pub struct CertsArgs {
    /// The topology whose processes get certificates.
    #[arg(long, value_name = "T.toml")]
    pub topology: PathBuf,
    /// Folder for the authority and the certificates; an existing authority is used again.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

#[derive(Debug, Subcommand)]
pub enum AuditCommand {
    /// Show who is quarantined and why.
    List(RunArgs),
    /// Trust a process's workers again from the next start on; the run must be stopped.
    Clear(AuditClearArgs),
}

#[derive(Debug, Args)]
pub struct AuditClearArgs {
    /// Name of the process in the topology.
    #[arg(value_name = "PROCESS", required_unless_present = "all")]
    pub process: Option<String>,
    /// All that are quarantined.
    #[arg(long, conflicts_with = "process")]
    pub all: bool,
    /// Where the run lives.
    #[arg(long, value_name = "DIR")]
    pub run_dir: PathBuf,
}

#[derive(Debug, Subcommand)]
pub enum ChaosCommand {
    /// Run a scenario: train undisturbed, train disturbed, compare and measure.
    Run(ChaosRunArgs),
    /// Make a process of a running cluster misbehave; its run file must allow it (`[chaos] allow = true`).
    Inject(ChaosInjectArgs),
}

#[derive(Debug, Args)]
pub struct ChaosInjectArgs {
    /// Where the run lives.
    #[arg(long, value_name = "DIR")]
    pub run_dir: PathBuf,
    /// Name of the process in the topology.
    #[arg(value_name = "PROCESS")]
    pub process: String,
    /// What it does.
    #[command(subcommand)]
    pub fault: InjectedFault,
}

/// A fault inside a process.
#[derive(Debug, Subcommand)]
pub enum InjectedFault {
    /// Flip one bit of the gradient in a share of its slots from now on; 0 ends it.
    FlipGradientBits {
        /// Share of slots, 0 to 1.
        share: f64,
    },
    /// The next slot's gradient is not a number.
    NonFiniteGradient,
    /// The compute thread blocks for ever in its next task.
    HangDevice,
    /// Every task of the compute thread takes so much longer from now on; 0 ends it.
    SlowDevice {
        /// Milliseconds.
        delay_ms: u64,
    },
    /// An actor panics.
    Panic {
        /// coordinator, loader, worker or shard.
        role: String,
    },
}

#[derive(Debug, Args)]
pub struct ChaosRunArgs {
    /// The scenario file.
    #[arg(value_name = "SCENARIO.toml")]
    pub file: PathBuf,
    /// Draws targets and the faults of storms; the same seed draws the same.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Where both runs and the report go, must not exist yet; the default is `runs/chaos-<name>-<seed>`.
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// Sets a field of the run file, for example `--set run.steps=500`.
    #[arg(long = "set", value_name = "FIELD=VALUE")]
    pub set: Vec<String>,
    /// Compares with this finished run instead of training undisturbed first.
    #[arg(long, value_name = "DIR")]
    pub undisturbed: Option<PathBuf>,
    /// Runs the scenario in the simulator instead, in virtual time; writes nothing.
    #[arg(long, conflicts_with_all = ["undisturbed", "run_dir"])]
    pub simulate: bool,
    /// Prints the report as JSON.
    #[arg(long)]
    pub json: bool,
}
