//! The sections of a run file as they are written.

use std::fmt;

use everstep_data::DataConfig;
use everstep_optim::{ComputeDtype, GroupConfig, MomentDtype, MuonConfig, Schedule};
use everstep_spec::ModelConfig;
use serde::{Deserialize, Serialize};

use crate::checkpoint_every::CheckpointEvery;
use crate::safeguards::{AuditConfig, ChaosConfig, PolicyConfig};

/// A run file before it is checked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunFile {
    /// What the run is.
    pub run: RunSection,
    /// The model.
    pub model: ModelConfig,
    /// The text and the tokenizer.
    pub data: DataConfig,
    /// The global batch.
    pub batch: BatchConfig,
    /// The optimizer.
    pub optimizer: OptimizerSection,
    /// What workers compute in and on.
    #[serde(default)]
    pub compute: ComputeConfig,
    /// Held-out evaluation.
    #[serde(default)]
    pub evaluation: EvaluationConfig,
    /// Checkpoints.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// How the cluster keeps the run.
    #[serde(default)]
    pub cluster: ClusterConfig,
    /// Slots that are computed twice and compared.
    #[serde(default)]
    pub audit: AuditConfig,
    /// Steps that are not what they should be.
    #[serde(default)]
    pub policy: PolicyConfig,
    /// Faults made on purpose.
    #[serde(default)]
    pub chaos: ChaosConfig,
}

/// `[run]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunSection {
    /// Name of the run: letters, digits, `-`, `_` and `.`; names folders in the store.
    pub name: String,
    /// Seed of every random draw. 0 if left out.
    #[serde(default)]
    pub seed: u64,
    /// Optimizer steps.
    pub steps: u64,
    /// Stops, committed, after this many steps, while schedules still go by `steps`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_at: Option<u64>,
    /// URL of the object store; a folder in the run directory if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<String>,
    /// How much the machines may differ. `strict` if left out.
    #[serde(default)]
    pub determinism: Determinism,
}

/// How much the machines of a run may differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Determinism {
    /// One kind of device, one libtorch: the same bits whatever happens.
    #[default]
    Strict,
    /// Mixed devices and faster kernels; the run's manifest says so.
    Relaxed,
}

impl Determinism {
    /// Whether mixed devices and faster kernels are let in.
    pub fn is_relaxed(self) -> bool {
        self == Self::Relaxed
    }
}

impl fmt::Display for Determinism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Strict => "strict",
            Self::Relaxed => "relaxed",
        })
    }
}

/// `[batch]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchConfig {
    /// Slots (virtual workers) of a step; independent of how many workers exist. 8 if left out.
    #[serde(default = "default_slots")]
    pub slots: usize,
    /// Windows of a step over all slots; a multiple of `slots * micro_batches`.
    pub rows: usize,
    /// Micro-batches of a slot, whose gradients are added in order. 1 if left out.
    #[serde(default = "default_micro_batches")]
    pub micro_batches: usize,
    /// Smaller batches of the first steps, in the order of their ends; none if left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ramp: Vec<RampStage>,
}

/// `[[batch.ramp]]`: the steps before `until`, from the stage before on, have fewer windows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RampStage {
    /// The first step that this is not for, counted from 0.
    pub until: u64,
    /// Windows of a step over all slots; a multiple of `slots * micro_batches`.
    pub rows: usize,
}

impl BatchConfig {
    /// Windows of step `step`, counted from 0.
    pub fn rows_at(&self, step: u64) -> usize {
        let stage = self.ramp.iter().find(|stage| step < stage.until);
        stage.map_or(self.rows, |stage| stage.rows)
    }

    /// Windows of a slot in a step.
    pub fn rows_per_slot(&self) -> usize {
        self.rows / self.slots
    }
}

fn default_slots() -> usize {
    8
}

fn default_micro_batches() -> usize {
    1
}

/// `[optimizer]`: AdamW, or Muon and AdamW, with decoupled decay; see [`everstep_optim::OptimizerConfig`] for what each field means.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerSection {
    /// Learning rate after warm-up.
    pub lr: f64,
    /// Learning rate that the schedule falls to. 0 if left out.
    #[serde(default)]
    pub min_lr: f64,
    /// Decay of the running means. `[0.9, 0.95]` if left out.
    #[serde(default = "default_betas")]
    pub betas: [f64; 2],
    /// Added to the denominator. 1e-8 if left out.
    #[serde(default = "default_eps")]
    pub eps: f64,
    /// Decoupled weight decay of matrices. 0.1 if left out.
    #[serde(default = "default_weight_decay")]
    pub weight_decay: f64,
    /// Largest global gradient norm; 0 is off. 1.0 if left out.
    #[serde(default = "default_grad_clip")]
    pub grad_clip: f64,
    /// `cosine`, `linear`, `wsd` or `constant`. Cosine if left out.
    #[serde(default)]
    pub schedule: Schedule,
    /// Steps of linear warm-up. 0 if left out.
    #[serde(default)]
    pub warmup_steps: u64,
    /// `cosine` and `linear`: the step from which on the rate is `min_lr`. `run.steps` if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay_end_step: Option<u64>,
    /// `wsd`: steps of the decay at the end. A tenth of the run if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay_steps: Option<u64>,
    /// `wsd`: the same as a fraction of `run.steps`, rounded up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay_fraction: Option<f64>,
    /// Coefficient of the z-loss, `sum(logsumexp(logits)^2)`. 0 (off) if left out.
    #[serde(default)]
    pub z_loss: f64,
    /// Type of the running means, `float32` or `bfloat16` (half the memory; `betas` up to 0.992). `float32` if left out.
    #[serde(default, skip_serializing_if = "MomentDtype::is_float32")]
    pub moments: MomentDtype,
    /// Decay of a running mean of the weights, for `everstep export --ema` and `generate --ema`. None is kept if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema_decay: Option<f64>,
    /// `[optimizer.muon]`: moves the matrices of layers by Muon instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub muon: Option<MuonConfig>,
    /// `[[optimizer.group]]`: parameters with another learning rate or weight decay.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub group: Vec<GroupConfig>,
}

fn default_betas() -> [f64; 2] {
    [0.9, 0.95]
}

fn default_eps() -> f64 {
    1e-8
}

fn default_weight_decay() -> f64 {
    0.1
}

fn default_grad_clip() -> f64 {
    1.0
}

/// `[compute]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ComputeConfig {
    /// Type of parameters and activations in workers, `float32` or `bfloat16`; master weights are always float32.
    pub dtype: ComputeDtype,
    /// Whether matrix products round their factors to 8 bits with a scale for each tile, as DeepSeek-V3 does; needs `dtype = "bfloat16"`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub fp8: bool,
    /// Whether backward computes each layer again instead of keeping what it needs of it: the same bits in less memory, a third slower.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub recompute: bool,
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// Intra-op threads of a worker; if left out the machine's cores divided by its workers, 1 or 2. A run without a topology has a worker for
    /// each core, or for each so many.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
}

impl Default for ComputeConfig {
    fn default() -> Self {
        Self {
            dtype: ComputeDtype::Float32,
            fp8: false,
            recompute: false,
            device: "auto".into(),
            threads: None,
        }
    }
}

/// `[evaluation]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvaluationConfig {
    /// The held-out loss is taken every so many steps and after the last; 0 is off.
    pub every: u64,
    /// Windows that one task evaluates. 32 if left out.
    pub rows: usize,
    /// Largest number of windows, spread evenly over the split; 0 is the whole split.
    pub max_windows: u64,
}

impl Default for EvaluationConfig {
    fn default() -> Self {
        Self {
            every: 0,
            rows: 32,
            max_windows: 0,
        }
    }
}

/// `[checkpoint]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointConfig {
    /// How often one is taken, beside the one after the last step: a number of steps, a time such as `"5m"`, or `"auto"`. 100 steps if
    /// left out.
    pub every: CheckpointEvery,
    /// Committed checkpoints that are kept, the newest ones. 3 if left out.
    pub keep: usize,
    /// Those of steps that this number divides are kept for ever. None if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_every: Option<u64>,
    /// So many newest ones are also kept on the disks of those who wrote them, in the run directory, and restored from there: a node reads
    /// its own copy before the store's. 0 if left out.
    pub keep_local: usize,
    /// So many with the lowest held-out loss are kept as well. 0 if left out.
    pub keep_best: usize,
    /// While the run goes on, committed checkpoints are read again at so many bytes a second at most, one after the other, and
    /// compared with their digests; 0 is never. 4 MiB if left out.
    pub scrub_bytes_per_s: u64,
    /// A snapshot that is larger waits for the store in a file of the run directory instead of in memory; 0 is always. 64 MiB if left
    /// out.
    pub memory_bytes: u64,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self {
            every: CheckpointEvery::Steps(100),
            keep: 3,
            keep_every: None,
            keep_local: 0,
            keep_best: 0,
            scrub_bytes_per_s: 4 << 20,
            memory_bytes: 64 << 20,
        }
    }
}

/// `[cluster]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClusterConfig {
    /// Replicas of each block, the primary included. 1 if left out.
    pub replication: u32,
    /// Largest number of parameters in a block. 2^20 if left out.
    pub block_params: usize,
    /// A slot that is not done after this long is leased to a second worker too. 30,000 if left out.
    pub lease_ms: u64,
    /// How the leader is chosen. `store` if left out.
    pub election: Election,
    /// Whether tensors between processes of one node go through shared memory, and not over QUIC. `true` if left out. No bit depends on it.
    pub shared_memory: bool,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        Self {
            replication: 1,
            block_params: 1 << 20,
            lease_ms: 30_000,
            election: Election::Store,
            shared_memory: true,
        }
    }
}

/// How the leader is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Election {
    /// By create-if-absent in the object store; standbys take over.
    #[default]
    Store,
    /// One coordinator, restarted by its agent.
    Static,
}
