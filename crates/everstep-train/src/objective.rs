//! A workload in two halves. What travels between them is tokens, so that a loader needs no model and a worker no data.

use std::fmt;

use everstep_data::{DataError, TokenBatch};
use everstep_model::{Model, ModelError, SlotGradient};
use everstep_protocol::EvaluationSums;

/// What can fail while a slot is computed.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The batch cannot be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The model cannot take the batch.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A batch that cannot be cut in the run's micro-batches.
    #[error("a batch of {rows} rows cannot be cut in {micro_batches} micro-batches")]
    Rows {
        /// Rows of the batch.
        rows: usize,
        /// Micro-batches of a slot.
        micro_batches: usize,
    },
}

/// The loader's half: batches as a pure function of what they are for.
pub trait BatchSource: fmt::Debug + Send + Sync {
    /// The tokens of slot `slot` in step `step`.
    ///
    /// # Errors
    /// [`TrainError::Data`] if they cannot be read.
    fn batch(&self, step: u64, slot: usize) -> Result<TokenBatch, TrainError>;

    /// Number of tasks of a held-out evaluation; 0 if there is nothing to evaluate on.
    fn num_evaluation_chunks(&self) -> u64;

    /// The tokens of task `chunk` of an evaluation; the same in every evaluation of the run.
    ///
    /// # Errors
    /// [`TrainError::Data`] if they cannot be read.
    fn evaluation_batch(&self, chunk: u64) -> Result<TokenBatch, TrainError>;
}

/// The worker's half: a pure function of parameters, batch and name of the slot.
pub trait Objective: fmt::Debug + Send + Sync {
    /// The gradient of a slot: of the sum, not the mean, of its token losses.
    ///
    /// # Errors
    /// [`TrainError`] if the model cannot take the batch.
    fn gradient(
        &self,
        model: &mut Model,
        batch: &TokenBatch,
        step: u64,
        slot: usize,
    ) -> Result<SlotGradient, TrainError>;

    /// The held-out loss of one evaluation task, without dropout.
    ///
    /// # Errors
    /// [`TrainError`] if the model cannot take the batch.
    fn evaluate(&self, model: &Model, batch: &TokenBatch) -> Result<EvaluationSums, TrainError>;
}
