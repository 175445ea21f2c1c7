//! A workload in two halves. What travels between them is tokens, so that a loader needs no model and a worker no data.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;

use everstep_data::{DataError, TokenBatch};
use everstep_optim::{Gradient, Layout};
use everstep_protocol::EvaluationSums;

use crate::RunConfig;

/// The loader's half: batches as a pure function of what they are for.
pub trait BatchSource: fmt::Debug + Send + Sync {
    /// The tokens of slot `slot` in step `step`.
    ///
    /// # Errors
    /// They cannot be read.
    fn batch(&self, step: u64, slot: usize) -> Result<TokenBatch, DataError>;

    /// Number of tasks of a held-out evaluation; 0 if there is nothing to evaluate on.
    fn num_evaluation_chunks(&self) -> u64;

    /// The tokens of task `chunk` of an evaluation; the same in every evaluation of the run.
    ///
    /// # Errors
    /// They cannot be read.
    fn evaluation_batch(&self, chunk: u64) -> Result<TokenBatch, DataError>;
}

/// Whatever the library that computes says went wrong.
pub type ComputeError = Box<dyn Error + Send + Sync>;

/// The worker's half: a copy of the parameters on a device. What it gives is a pure function of them, the batch and the slot's name.
pub trait Replica {
    /// Whether the device is another one than the processor, which the system accounts for.
    fn is_accelerated(&self) -> bool;

    /// Writes parameters in the compute type from element `offset` on.
    ///
    /// # Errors
    /// There are not so many, or the device fails.
    fn set_parameters(&mut self, offset: usize, bytes: &[u8]) -> Result<(), ComputeError>;

    /// The gradient of a slot, by block: of the sum, not the mean, of its token losses.
    ///
    /// # Errors
    /// The model cannot take the batch, or the device fails.
    fn gradient(
        &mut self,
        batch: &TokenBatch,
        step: u64,
        slot: usize,
    ) -> Result<Vec<Gradient>, ComputeError>;

    /// The held-out loss of one evaluation task, without dropout.
    ///
    /// # Errors
    /// The model cannot take the batch, or the device fails.
    fn evaluate(&self, batch: &TokenBatch) -> Result<EvaluationSums, ComputeError>;
}

/// What a replica is built from.
#[derive(Clone, Copy, Debug)]
pub struct ReplicaPlan<'a> {
    /// The run file.
    pub config: &'a RunConfig,
    /// How its parameters lie.
    pub layout: &'a Layout,
    /// The token that ends documents, if there is one.
    pub end_of_text: Option<u32>,
    /// Threads of one operation.
    pub threads: usize,
}

/// A library that computes.
pub trait Backend: fmt::Debug + Sync {
    /// Whether the run's device is another one than the processor.
    ///
    /// # Errors
    /// The device is not there.
    fn is_accelerated(&self, config: &RunConfig) -> Result<bool, ComputeError>;

    /// What of this machine and of the library the bits depend on, threads aside.
    ///
    /// # Errors
    /// The device is not there.
    fn environment(&self, config: &RunConfig) -> Result<BTreeMap<String, String>, ComputeError>;

    /// A replica without parameters yet, on this thread.
    ///
    /// # Errors
    /// The device is not there, or the model cannot be built.
    fn replica(&self, plan: &ReplicaPlan<'_>) -> Result<Box<dyn Replica>, ComputeError>;
}
