//! The tokens of a slot.

use tch::{Device, Tensor};

use crate::ModelError;
use everstep_spec::ModelConfig;

/// Target of a position whose loss does not count.
pub const IGNORED_TARGET: i64 = -100;

/// What a slot computes on: one or more micro-batches, in the order in which their gradients are added.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The micro-batches.
    pub micro_batches: Vec<MicroBatch>,
}

/// Sequences that go through the model together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MicroBatch {
    /// Input tokens, `rows * columns`, row by row.
    pub inputs: Vec<i64>,
    /// The token that follows each input token, or [`IGNORED_TARGET`]; as many as inputs.
    pub targets: Vec<i64>,
    /// Number of sequences.
    pub rows: usize,
    /// Length of each sequence.
    pub columns: usize,
}

impl Batch {
    /// Number of targets that count.
    pub fn tokens(&self) -> u64 {
        self.micro_batches.iter().map(MicroBatch::tokens).sum()
    }

    /// Whether a model of `config` can take the batch.
    ///
    /// # Errors
    /// Names the first micro-batch, length or token that it cannot take.
    pub fn check(&self, config: &ModelConfig) -> Result<(), ModelError> {
        if self.micro_batches.is_empty() {
            return Err(ModelError::EmptyBatch);
        }
        for (index, micro_batch) in self.micro_batches.iter().enumerate() {
            micro_batch.check(index, config)?;
        }
        Ok(())
    }
}

impl MicroBatch {
    /// Number of targets that count.
    pub fn tokens(&self) -> u64 {
        self.targets
            .iter()
            .filter(|&&target| target != IGNORED_TARGET)
            .count() as u64
    }

    pub(crate) fn check(&self, index: usize, config: &ModelConfig) -> Result<(), ModelError> {
        if self.rows == 0 || self.columns == 0 {
            return Err(ModelError::EmptyBatch);
        }
        let expected = self.rows.saturating_mul(self.columns);
        for (field, len) in [
            ("inputs", self.inputs.len()),
            ("targets", self.targets.len()),
        ] {
            if len != expected {
                return Err(ModelError::BatchShape {
                    index,
                    field,
                    len,
                    expected,
                });
            }
        }
        check_length(self.columns, config)?;
        check_tokens(&self.inputs, config)?;
        let targets = self
            .targets
            .iter()
            .filter(|&&target| target != IGNORED_TARGET);
        check_tokens(targets, config)
    }

    /// `[rows, columns]`.
    pub(crate) fn inputs_tensor(&self, device: Device) -> Tensor {
        let shape = [self.rows as i64, self.columns as i64];
        Tensor::from_slice(&self.inputs)
            .view(shape)
            .to_device(device)
    }

    /// `[rows * columns]`.
    pub(crate) fn targets_tensor(&self, device: Device) -> Tensor {
        Tensor::from_slice(&self.targets).to_device(device)
    }

    /// The tokens `places` after each position, `[rows, columns]`; 0 where nobody knows them.
    pub(crate) fn tokens_after(&self, places: usize, device: Device) -> Tensor {
        let mut tokens = Vec::with_capacity(self.inputs.len());
        for (inputs, targets) in self.sequences() {
            // The row and the one token that follows it.
            let last = targets.last().filter(|&&last| last != IGNORED_TARGET);
            let known = inputs.iter().chain(last).skip(places).copied();
            tokens.extend(known.chain(std::iter::repeat(0)).take(self.columns));
        }
        let tokens = Tensor::from_slice(&tokens).view([-1, self.columns as i64]);
        tokens.to_device(device)
    }

    /// For each position the target `places` further on, `[rows * columns]`. Ignored where it, or one on the way to it, is.
    pub(crate) fn targets_after(&self, places: usize, device: Device) -> Tensor {
        let mut shifted = Vec::with_capacity(self.targets.len());
        for (_, targets) in self.sequences() {
            shifted.extend((0..self.columns).map(|column| {
                match targets.get(column..=column + places) {
                    Some(way) if !way.contains(&IGNORED_TARGET) => way[places],
                    _ => IGNORED_TARGET,
                }
            }));
        }
        Tensor::from_slice(&shifted).to_device(device)
    }

    fn sequences(&self) -> impl Iterator<Item = (&[i64], &[i64])> {
        let inputs = self.inputs.chunks(self.columns);
        inputs.zip(self.targets.chunks(self.columns))
    }
}

pub(crate) fn check_length(columns: usize, config: &ModelConfig) -> Result<(), ModelError> {
    if columns <= config.context {
        Ok(())
    } else {
        Err(ModelError::TooLong {
            columns,
            context: config.context,
        })
    }
}

pub(crate) fn check_tokens<'a>(
    tokens: impl IntoIterator<Item = &'a i64>,
    config: &ModelConfig,
) -> Result<(), ModelError> {
    let vocab_size = config.vocab_size;
    match tokens
        .into_iter()
        .find(|&&token| !(0..vocab_size as i64).contains(&token))
    {
        None => Ok(()),
        Some(&token) => Err(ModelError::UnknownToken { token, vocab_size }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use everstep_spec::Architecture;

    #[test]
    fn what_a_model_cannot_take_is_named() {
        let config = ModelConfig {
            vocab_size: 10,
            ..ModelConfig::new(Architecture::Llama, 1, 1, 2, 3)
        };
        let batch = |inputs: &[i64], targets: &[i64], rows, columns| Batch {
            micro_batches: vec![MicroBatch {
                inputs: inputs.to_vec(),
                targets: targets.to_vec(),
                rows,
                columns,
            }],
        };
        let good = batch(&[0, 9, 1, 2], &[IGNORED_TARGET, 1, 2, 9], 2, 2);
        good.check(&config).unwrap();
        assert_eq!(good.tokens(), 3);
        let says = |batch: Batch, text: &str| {
            assert_eq!(batch.check(&config).unwrap_err().to_string(), text);
        };
        says(
            batch(&[0; 4], &[0; 4], 1, 4),
            "4 tokens in a row are too many; context=`3`",
        );
        says(
            batch(&[0; 4], &[0; 3], 2, 2),
            "micro-batch 0: targets holds 3 tokens; rows * columns=`4`",
        );
        says(
            batch(&[10], &[0], 1, 1),
            "token 10 is not in the vocabulary; vocab_size=`10`",
        );
        says(
            batch(&[0], &[-1], 1, 1),
            "token -1 is not in the vocabulary; vocab_size=`10`",
        );
        assert!(matches!(
            batch(&[], &[], 0, 2).check(&config),
            Err(ModelError::EmptyBatch)
        ));
        assert!(matches!(
            Batch::default().check(&config),
            Err(ModelError::EmptyBatch)
        ));
    }
}
