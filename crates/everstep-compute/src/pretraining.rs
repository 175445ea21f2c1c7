//! Next-token prediction on packed text.

use everstep_data::TokenBatch;
use everstep_model::{Batch, MicroBatch, Model, dropout_seed};
use everstep_optim::Gradient;
use everstep_protocol::EvaluationSums;
use everstep_torch::DeviceKind;
use everstep_train::{ComputeError, Replica, RunConfig};

/// The worker's half of pretraining: cross-entropy of the next token.
#[derive(Debug)]
pub(crate) struct Pretraining {
    model: Model,
    seed: u64,
    micro_batches: usize,
}

impl Pretraining {
    /// What run `config` computes with `model`.
    pub(crate) fn new(config: &RunConfig, model: Model) -> Self {
        Self {
            model,
            seed: config.run.seed,
            micro_batches: config.batch.micro_batches,
        }
    }
}

impl Replica for Pretraining {
    fn is_accelerated(&self) -> bool {
        DeviceKind::of(self.model.device()) != DeviceKind::Cpu
    }

    fn set_parameters(&mut self, offset: usize, bytes: &[u8]) -> Result<(), ComputeError> {
        Ok(self.model.set_parameters(offset, bytes)?)
    }

    fn gradient(
        &mut self,
        batch: &TokenBatch,
        step: u64,
        slot: usize,
    ) -> Result<Vec<Gradient>, ComputeError> {
        let batch = micro_batches(batch, self.micro_batches)?;
        let seed = dropout_seed(self.seed, step, slot as u64);
        let gradient = self.model.gradient(&batch, seed)?;
        let block = |values| Gradient::new(values, gradient.loss_sum, gradient.tokens);
        Ok(gradient.blocks.into_iter().map(block).collect())
    }

    fn evaluate(&self, batch: &TokenBatch) -> Result<EvaluationSums, ComputeError> {
        Ok(self.model.evaluate(&micro_batches(batch, 1)?)?)
    }
}

/// A batch that cannot be cut in the run's micro-batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a batch of {rows} rows cannot be cut in {micro_batches} micro-batches")]
pub(crate) struct RowsError {
    /// Rows of the batch.
    rows: usize,
    /// Micro-batches of a slot.
    micro_batches: usize,
}

/// Cuts a batch in `count` micro-batches of equally many rows, in the order of the rows.
///
/// # Errors
/// The rows do not divide.
pub(crate) fn micro_batches(tokens: &TokenBatch, count: usize) -> Result<Batch, RowsError> {
    if count == 0 || !tokens.rows.is_multiple_of(count) {
        return Err(RowsError {
            rows: tokens.rows,
            micro_batches: count,
        });
    }
    let rows = tokens.rows / count;
    let micro_batch = |index: usize| {
        let TokenBatch {
            inputs,
            targets,
            rows,
            columns,
        } = tokens.slice_rows(index * rows, rows);
        MicroBatch {
            inputs,
            targets,
            rows,
            columns,
        }
    };
    Ok(Batch {
        micro_batches: (0..count).map(micro_batch).collect(),
    })
}

#[cfg(test)]
mod tests;
