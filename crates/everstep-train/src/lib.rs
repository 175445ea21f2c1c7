//! The run file, and what a slot needs and gives; no torch.
//!
//! - [`RunConfig`]: a run file, read with overrides and checked; every mistake is one line that names file and field
//! - [`BatchSource`], [`Replica`]: a workload in two halves, what a loader serves and what a worker computes
//! - [`PretrainingData`]: the loader's half of next-token prediction on packed text
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod check;
mod checkpoint_every;
mod error;
mod groups;
mod identity;
mod overrides;
mod pretraining;
mod run_config;
mod safeguards;
mod sections;
mod syntax;
mod workload;

pub use checkpoint_every::CheckpointEvery;
pub use error::RunFileError;
pub use identity::NumericDifference;
pub use pretraining::PretrainingData;
pub use run_config::{OptimizerExtras, RunConfig};
pub use safeguards::{AuditConfig, ChaosConfig, LossSpike, NonFinite, PolicyConfig};
pub use sections::{
    BatchConfig, CheckpointConfig, ClusterConfig, ComputeConfig, Determinism, Election,
    EvaluationConfig, OptimizerSection, RunFile, RunSection,
};
pub use workload::{Backend, BatchSource, ComputeError, Replica, ReplicaPlan};
