//! Next-token prediction on packed text.

use std::sync::Arc;

use everstep_data::{DataError, Dataset, FillIn, SampleOrder, TokenBatch, ValidationWindows};

use crate::run_config::RunConfig;
use crate::workload::BatchSource;

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
    fn batch(&self, step: u64, slot: usize) -> Result<TokenBatch, DataError> {
        self.dataset
            .batch(&self.order, self.fill_in.as_ref(), step, slot)
    }

    fn num_evaluation_chunks(&self) -> u64 {
        self.validation.chunks(self.evaluation_rows)
    }

    fn evaluation_batch(&self, chunk: u64) -> Result<TokenBatch, DataError> {
        self.dataset
            .validation_chunk(&self.validation, chunk, self.evaluation_rows)
    }
}
