//! Every name that a dashboard or a query may rely on: spans, their fields, metrics with unit and labels.
//!
//! Open spans with these constants: `tracing::info_span!(names::span::STEP, step, epoch)`.

/// Span names, in the order of a step. All are at level `INFO`.
pub mod span {
    /// One training step, from the first lease to the last publish. Root of the step's trace; on the coordinator.
    /// Fields: `run`, `epoch`, `step`.
    pub const STEP: &str = "step";
    /// A worker's work on the slots that were leased to it. Fields: `epoch`, `step`, `slot`.
    pub const LEASE: &str = "lease";
    /// Fetching a slot's batch from the loader. Fields: `step`, `slot`, `micro`.
    pub const BATCH: &str = "batch";
    /// Forward and backward pass of one micro-batch. Fields: `step`, `slot`, `micro`.
    pub const FORWARD_BACKWARD: &str = "forward_backward";
    /// Sending partial sums to the primaries. Fields: `step`, `slot`, `bytes`.
    pub const PUSH: &str = "push";
    /// Summing a block's partials along the canonical tree; on a shard. Fields: `epoch`, `step`, `block`.
    pub const REDUCE: &str = "reduce";
    /// Sending a reduced gradient to the block's backups. Fields: `step`, `block`, `bytes`.
    pub const REPLICATE: &str = "replicate";
    /// Deriving the step's decision from the blocks' reports; on the coordinator. Fields: `epoch`, `step`.
    pub const DECIDE: &str = "decide";
    /// The optimizer's update of the blocks that a shard holds. Fields: `epoch`, `step`.
    pub const APPLY: &str = "apply";
    /// Sending new parameters to the workers. Fields: `step`, `bytes`.
    pub const PUBLISH: &str = "publish";
    /// A worker taking over new parameters. Fields: `step`, `bytes`.
    pub const PULL: &str = "pull";
    /// Copying a shard's blocks for a checkpoint. Fields: `step`, `bytes`.
    pub const SNAPSHOT: &str = "snapshot";
    /// Uploading a snapshot and committing its manifest. Fields: `step`, `bytes`.
    pub const UPLOAD: &str = "upload";
    /// Loading a checkpoint. Fields: `step`, `bytes`.
    pub const RESTORE: &str = "restore";
    /// Held-out evaluation. Fields: `step`.
    pub const EVALUATE: &str = "evaluate";
    /// Becoming the leader. Fields: `epoch`.
    pub const ELECT: &str = "elect";
    /// Making a backup the primary of its blocks. Fields: `epoch`, `step`.
    pub const PROMOTE: &str = "promote";
    /// Filling a new backup from snapshot and log. Fields: `epoch`, `step`, `bytes`.
    pub const SEED: &str = "seed";
}

/// Field names of spans and log lines. Each means the same everywhere.
pub mod field {
    /// The run's id.
    pub const RUN: &str = "run";
    /// The leader's epoch.
    pub const EPOCH: &str = "epoch";
    /// The training step.
    pub const STEP: &str = "step";
    /// The slot (virtual worker).
    pub const SLOT: &str = "slot";
    /// The micro-batch inside a slot.
    pub const MICRO: &str = "micro";
    /// The parameter block.
    pub const BLOCK: &str = "block";
    /// The process that is spoken about, not the one that speaks.
    pub const PROCESS: &str = "process";
    /// The machine of that process.
    pub const NODE: &str = "node";
    /// A size in bytes.
    pub const BYTES: &str = "bytes";
}

/// Resource attributes of every exported span.
pub mod resource {
    /// Always `everstep`, unless `OTEL_SERVICE_NAME` says otherwise.
    pub const SERVICE_NAME: &str = "service.name";
    /// The process's name in the topology.
    pub const SERVICE_INSTANCE: &str = "service.instance.id";
    /// The version of this software.
    pub const SERVICE_VERSION: &str = "service.version";
    /// The machine.
    pub const HOST: &str = "host.name";
    /// The run's id.
    pub const RUN: &str = "everstep.run.id";
}

/// A number that is recorded over time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metric {
    /// Its key in `metrics.jsonl` and its tag in TensorBoard.
    pub name: &'static str,
    /// Its unit, in UCUM spelling; `1` for a pure number.
    pub unit: &'static str,
    /// The labels that its series carry.
    pub labels: &'static [&'static str],
    /// What it tells.
    pub help: &'static str,
}

/// Metrics of a committed step.
pub mod metric {
    use super::Metric;

    /// Mean training loss.
    pub const LOSS: Metric = Metric {
        name: "loss",
        unit: "nat",
        labels: &["run"],
        help: "mean training loss per token of the step",
    };
    /// Held-out loss.
    pub const VALIDATION_LOSS: Metric = Metric {
        name: "validation_loss",
        unit: "nat",
        labels: &["run"],
        help: "mean loss per token on held-out text, after the step",
    };
    /// Gradient norm.
    pub const GRAD_NORM: Metric = Metric {
        name: "grad_norm",
        unit: "1",
        labels: &["run"],
        help: "global L2 norm of the gradient before clipping",
    };
    /// Learning rate.
    pub const LR: Metric = Metric {
        name: "lr",
        unit: "1",
        labels: &["run"],
        help: "learning rate of the step",
    };
    /// Tokens of the step.
    pub const TOKENS: Metric = Metric {
        name: "tokens",
        unit: "{token}",
        labels: &["run"],
        help: "tokens in the step's global batch",
    };
    /// Throughput.
    pub const TOKENS_PER_SECOND: Metric = Metric {
        name: "tokens_per_second",
        unit: "{token}/s",
        labels: &["run"],
        help: "tokens of the step over its wall time",
    };
    /// Step time.
    pub const STEP_SECONDS: Metric = Metric {
        name: "step_seconds",
        unit: "s",
        labels: &["run"],
        help: "wall time from the previous commit to this one",
    };
    /// Balance of experts.
    pub const EXPERT_LOAD: Metric = Metric {
        name: "expert_load",
        unit: "1",
        labels: &["run"],
        help: "how many times the mean of its layer the fullest expert was chosen",
    };

    /// All of them, in the order of `metrics.jsonl`.
    pub const ALL: &[Metric] = &[
        LOSS,
        GRAD_NORM,
        LR,
        TOKENS,
        TOKENS_PER_SECOND,
        STEP_SECONDS,
        VALIDATION_LOSS,
        EXPERT_LOAD,
    ];
}
