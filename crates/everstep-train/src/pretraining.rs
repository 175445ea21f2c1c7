//! Next-token prediction on packed text.

use std::sync::Arc;

use everstep_data::{DataError, Dataset, FillIn, SampleOrder, TokenBatch, ValidationWindows};
use everstep_model::{Batch, MicroBatch, Model, SlotGradient, dropout_seed};
use everstep_protocol::EvaluationSums;

use crate::objective::{BatchSource, Objective, TrainError};
use crate::run_config::RunConfig;

/// The loader's half of pretraining: windows of a dataset in the run's order.
#[derive(Clone, Debug)]
pub struct PretrainingData {
    dataset: Arc<Dataset>,
    order: SampleOrder,
    validation: ValidationWindows,
    evaluation_rows: usize,
    fill_in: Option<FillIn>,
}

impl PretrainingData {
    /// The batches of run `config` over `dataset`.
    ///
    /// # Errors
    /// [`DataError::TooShort`] if the training split is shorter than one window.
    pub fn new(config: &RunConfig, dataset: Arc<Dataset>) -> Result<Self, DataError> {
        let (batch, context) = (&config.batch, config.context());
        let order = dataset.order(config.run.seed, context, batch.slots, batch.rows_per_slot())?;
        let stages = batch.ramp.iter();
        let order = order.with_ramp(
            stages
                .map(|stage| (stage.until, stage.rows / batch.slots))
                .collect(),
        );
        let validation = dataset.validation_windows(context, config.evaluation.max_windows);
        let rate = config.data.fill_in_rate;
        let fill_in = match rate > 0.0 {
            true => Some(FillIn::new(rate, config.run.seed, dataset.tokenizer())?),
            false => None,
        };
        Ok(Self {
            dataset,
            order,
            validation,
            evaluation_rows: config.evaluation.rows,
            fill_in,
        })
    }

    /// The dataset.
    pub fn dataset(&self) -> &Dataset {
        &self.dataset
    }
}

impl BatchSource for PretrainingData {
    fn batch(&self, step: u64, slot: usize) -> Result<TokenBatch, TrainError> {
        Ok(self
            .dataset
            .batch(&self.order, self.fill_in.as_ref(), step, slot)?)
    }

    fn num_evaluation_chunks(&self) -> u64 {
        self.validation.chunks(self.evaluation_rows)
    }

    fn evaluation_batch(&self, chunk: u64) -> Result<TokenBatch, TrainError> {
        Ok(self
            .dataset
            .validation_chunk(&self.validation, chunk, self.evaluation_rows)?)
    }
}

/// The worker's half of pretraining: cross-entropy of the next token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pretraining {
    seed: u64,
    micro_batches: usize,
}

impl Pretraining {
    /// The objective of run `config`.
    pub fn new(config: &RunConfig) -> Self {
        Self {
            seed: config.run.seed,
            micro_batches: config.batch.micro_batches,
        }
    }
}

impl Objective for Pretraining {
    fn gradient(
        &self,
        model: &mut Model,
        batch: &TokenBatch,
        step: u64,
        slot: usize,
    ) -> Result<SlotGradient, TrainError> {
        let batch = micro_batches(batch, self.micro_batches)?;
        Ok(model.gradient(&batch, dropout_seed(self.seed, step, slot as u64))?)
    }

    fn evaluate(&self, model: &Model, batch: &TokenBatch) -> Result<EvaluationSums, TrainError> {
        Ok(model.evaluate(&micro_batches(batch, 1)?)?)
    }
}

/// Cuts a batch in `count` micro-batches of equally many rows, in the order of the rows.
///
/// # Errors
/// [`TrainError::Rows`] if the rows do not divide.
pub fn micro_batches(tokens: &TokenBatch, count: usize) -> Result<Batch, TrainError> {
    if count == 0 || !tokens.rows.is_multiple_of(count) {
        return Err(TrainError::Rows {
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
