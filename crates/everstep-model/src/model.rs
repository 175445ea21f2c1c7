//! A model with its parameters: gradients of slots and evaluation.

use std::sync::{Mutex, MutexGuard, PoisonError};

use everstep_optim::ComputeDtype;
use everstep_protocol::EvaluationSums;
use everstep_protocol::random::{Purpose, Stream};
use everstep_torch::{CrossEntropies, Dtype, bytes};
use tch::{Device, Kind, Tensor};

use crate::batch::{Batch, MicroBatch};
use crate::blocks::Blocks;
use crate::decoder::Decoder;
use crate::deepseek_v3::Routing;
use crate::error::ModelError;
use crate::weights::Weights;
use everstep_spec::config::ModelConfig;
use everstep_spec::spec;

/// A decoder on one device.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    device: Device,
    pub(crate) dtype: Dtype,
    weights: Weights,
    pub(crate) decoder: Decoder,
    z_loss: f64,
    document_end: Option<i64>,
    /// Where the blocks of gradients end in the vector.
    block_ends: Vec<usize>,
}

/// What a slot gives: the gradient of the sum of its token losses, and that sum.
#[derive(Clone, Debug, PartialEq)]
pub struct SlotGradient {
    /// One value per parameter, in canonical order, cut in the model's blocks ([`Model::with_blocks`]); the gradient of the sum, not of the
    /// mean.
    pub blocks: Vec<Vec<f32>>,
    /// Sum of the cross-entropies in nats; the z-loss is not in it.
    pub loss_sum: f64,
    /// Number of targets that count.
    pub tokens: u64,
}

/// The dropout seed of slot `slot` in step `step` of a run with `seed`.
pub fn dropout_seed(seed: u64, step: u64, slot: u64) -> u64 {
    Stream::new(seed, Purpose::Dropout, &[step, slot]).next_u64()
}

impl Model {
    /// A model whose parameters are all zero, to be filled by [`Self::set_parameters`].
    ///
    /// # Errors
    /// [`ModelError::Config`] for a configuration that is not valid.
    pub fn new(
        config: &ModelConfig,
        device: Device,
        dtype: ComputeDtype,
    ) -> Result<Self, ModelError> {
        Self::with_products(config, device, dtype, false)
    }

    /// As [`Self::new`]; the matrix products of layers round their factors to E4M3 with scales for tiles, in forward and backward
    /// (DeepSeek-V3 §3.3): what FP8 does to the numbers, at bfloat16's speed. Embedding, output, router, norms and attention itself
    /// do not.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn new_fp8(config: &ModelConfig, device: Device) -> Result<Self, ModelError> {
        Self::with_products(config, device, ComputeDtype::Bfloat16, true)
    }

    fn with_products(
        config: &ModelConfig,
        device: Device,
        dtype: ComputeDtype,
        is_fp8: bool,
    ) -> Result<Self, ModelError> {
        config.validate()?;
        let dtype = match dtype {
            ComputeDtype::Float32 => Dtype::F32,
            ComputeDtype::Bfloat16 => Dtype::Bf16,
        };
        let mut weights = Weights::new(spec::parameters(config), device, dtype, is_fp8);
        let decoder = Decoder::new(&mut weights, config, device);
        weights.finish();
        Ok(Self {
            config: config.clone(),
            device,
            dtype,
            block_ends: vec![weights.num_elements()],
            weights,
            decoder,
            z_loss: 0.0,
            document_end: None,
        })
    }

    /// Adds `coefficient * sum(logsumexp(logits)^2)` to the loss whose gradient is taken (PaLM's z-loss); 0 for none.
    ///
    /// # Errors
    /// [`ModelError::Option`] for a coefficient below 0.
    pub fn with_z_loss(mut self, coefficient: f64) -> Result<Self, ModelError> {
        if !(coefficient.is_finite() && coefficient >= 0.0) {
            let value = coefficient.to_string();
            return Err(ModelError::Option {
                field: "z_loss",
                value,
                allowed: "0 or more",
            });
        }
        self.z_loss = coefficient;
        Ok(self)
    }

    /// Lets no token see those of another document of its window, where `end` is the last token of each document. Generation, whose
    /// prompts are one document, is as before.
    #[must_use]
    pub fn with_document_end(mut self, end: u32) -> Self {
        self.document_end = Some(i64::from(end));
        self
    }

    /// Gives gradients in blocks of these lengths, so that nobody needs to cut them; one block if it was not called.
    ///
    /// # Panics
    /// If they are not as long as the parameters together.
    #[must_use]
    pub fn with_blocks(mut self, lens: impl IntoIterator<Item = usize>) -> Self {
        let mut end = 0;
        let ends = lens.into_iter().map(|len| {
            end += len;
            end
        });
        self.block_ends = ends.collect();
        assert_eq!(end, self.num_elements(), "the blocks are another model's");
        self
    }

    /// Keeps only the input of each layer for backward, which computes the rest again: the same bits, slower, in less memory.
    #[must_use]
    pub fn with_recomputation(mut self) -> Self {
        self.decoder.is_recomputed = true;
        self
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where it computes.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Number of parameters.
    pub fn num_elements(&self) -> usize {
        self.weights.num_elements()
    }

    /// Writes parameters from element `offset` of the flat vector on: little-endian elements of the compute type, or of float32 if they are
    /// biases of routers.
    ///
    /// # Errors
    /// [`ModelError::Torch`] if the bytes are no whole elements or do not fit; nothing is then changed.
    pub fn set_parameters(&mut self, offset: usize, bytes: &[u8]) -> Result<(), ModelError> {
        Ok(self.weights.write_bytes(offset, bytes)?)
    }

    /// Writes parameters from element `offset` on, rounding to the compute type.
    ///
    /// # Errors
    /// As [`Self::set_parameters`].
    pub fn set_parameters_f32(&mut self, offset: usize, values: &[f32]) -> Result<(), ModelError> {
        Ok(self.weights.write_f32(offset, values)?)
    }

    /// The gradient of a slot: micro-batch by micro-batch in their order, added in float32.
    ///
    /// `dropout_seed` names the slot ([`dropout_seed`]); it matters only if the configuration drops anything.
    ///
    /// # Errors
    /// What [`Batch::check`] says. libtorch's own failures (out of memory, a lost device) panic: they are not the
    /// batch's fault, and the supervisor restarts what holds the model.
    pub fn gradient(
        &mut self,
        batch: &Batch,
        dropout_seed: u64,
    ) -> Result<SlotGradient, ModelError> {
        batch.check(&self.config)?;
        let mut blocks = Blocks::new(&self.block_ends);
        let mut loss_sum = 0.0;
        for (index, micro_batch) in batch.micro_batches.iter().enumerate() {
            let seed = Stream::new(dropout_seed, Purpose::Dropout, &[index as u64]).next_u64();
            let drop = self.config.dropout;
            let drawing = (drop > 0.0).then(|| seeded_generator(seed));
            let (objective, losses, routing) = self.forward(micro_batch, drop);
            // Backward draws again what it computes again.
            let drawing = drawing.filter(|_| self.decoder.is_recomputed);
            let leaves = self.weights.leaves();
            let inputs: Vec<&Tensor> = leaves.iter().map(|(_, leaf)| leaf).collect();
            let gradients = Tensor::run_backward(&[objective], &inputs, false, false);
            std::mem::drop(drawing);
            let of_leaves = leaves.iter().map(|(range, _)| range).zip(&gradients);
            let of_routers = routing.excess.iter().map(|(range, excess)| (range, excess));
            for (range, gradient) in of_leaves.chain(of_routers) {
                if index == 0 {
                    blocks.append(range, gradient)?;
                } else {
                    blocks.add(range, gradient)?;
                }
            }
            loss_sum += sum(&losses)?;
        }
        Ok(SlotGradient {
            blocks: blocks.values,
            loss_sum,
            tokens: batch.tokens(),
        })
    }

    /// Sum of the cross-entropies of a batch in nats, without dropout, the number of targets that count, and the experts' loads.
    ///
    /// # Errors
    /// What [`Batch::check`] says.
    pub fn evaluate(&self, batch: &Batch) -> Result<EvaluationSums, ModelError> {
        batch.check(&self.config)?;
        let mut sums = EvaluationSums::default();
        for micro_batch in &batch.micro_batches {
            let mut routing = Routing::default();
            let losses = tch::no_grad(|| {
                let mask = self.mask(micro_batch);
                let hidden = self.hidden(micro_batch, 0.0, mask.as_ref(), Some(&mut routing));
                let targets = micro_batch.targets_tensor(self.device);
                self.decoder.cross_entropies(&hidden, &targets, 0.0).losses
            });
            sums.add(&EvaluationSums {
                loss_sum: sum(&losses)?,
                tokens: 0,
                expert_choices: self.expert_choices(micro_batch, &routing)?,
            });
        }
        sums.tokens = batch.tokens();
        Ok(sums)
    }

    /// How often each expert was chosen, layer after layer.
    fn expert_choices(
        &self,
        micro_batch: &MicroBatch,
        routing: &Routing,
    ) -> Result<Vec<u64>, ModelError> {
        let Some(moe) = &self.config.moe else {
            return Ok(Vec::new());
        };
        let num_choices = (micro_batch.rows * micro_batch.columns * moe.experts_per_token) as f64;
        let mut choices = Vec::new();
        for (range, excess) in &routing.excess {
            let mut values = vec![0.0; range.len()];
            bytes::read_f32(excess, &mut values)?;
            // The excess is exact below 2^24, and far nearer than half a choice above it.
            let count = |&excess: &f32| (f64::from(excess) + num_choices) / moe.experts as f64;
            choices.extend(values.iter().map(|excess| count(excess).round() as u64));
        }
        Ok(choices)
    }

    /// Float32 logits, `rows * columns * vocab_size`, of a micro-batch's inputs, without dropout.
    ///
    /// # Errors
    /// What [`Batch::check`] says.
    pub fn logits(&self, micro_batch: &MicroBatch) -> Result<Vec<f32>, ModelError> {
        micro_batch.check(0, &self.config)?;
        let logits = tch::no_grad(|| self.micro_logits(micro_batch));
        let mut values = vec![0.0; logits.numel()];
        bytes::read_f32(&logits, &mut values)?;
        Ok(values)
    }

    /// What is differentiated (a scalar), each token's cross-entropy, and what the routers did.
    fn forward(&self, micro_batch: &MicroBatch, drop: f64) -> (Tensor, Tensor, Routing) {
        let mut routing = Routing::default();
        let mask = self.mask(micro_batch);
        let mask = mask.as_ref();
        let hidden = self.hidden(micro_batch, drop, mask, Some(&mut routing));
        let further = self.further_losses(&hidden, micro_batch, drop, mask, &mut routing);
        let targets = micro_batch.targets_tensor(self.device);
        let CrossEntropies {
            mut objective,
            losses,
        } = self.decoder.cross_entropies(&hidden, &targets, self.z_loss);
        if let Some(further) = further {
            objective += further;
        }
        for loss in &routing.losses {
            objective += loss;
        }
        (objective, losses, routing)
    }

    /// λ / D times the cross-entropies of all tokens after the next one (DeepSeek-V3, equations 24 and 25), if modules predict them.
    fn further_losses(
        &self,
        hidden: &Tensor,
        micro_batch: &MicroBatch,
        drop: f64,
        mask: Option<&Tensor>,
        routing: &mut Routing,
    ) -> Option<Tensor> {
        let mtp = self.config.mtp.as_ref()?;
        let tokens_after: Vec<Tensor> = (1..=mtp.modules)
            .map(|places| micro_batch.tokens_after(places, self.device))
            .collect();
        let made = self
            .decoder
            .predictions(hidden, &tokens_after, drop, mask, routing);
        let sums = made.iter().zip(1..).map(|(hidden, places)| {
            let targets = micro_batch.targets_after(places, self.device);
            self.decoder
                .cross_entropies(hidden, &targets, 0.0)
                .objective
        });
        let sum = sums.reduce(|sum, next| sum + next)?;
        Some(sum * (mtp.loss / mtp.modules as f64))
    }

    fn micro_logits(&self, micro_batch: &MicroBatch) -> Tensor {
        let mask = self.mask(micro_batch);
        let hidden = self.hidden(micro_batch, 0.0, mask.as_ref(), None);
        self.decoder.logits(&hidden)
    }

    fn hidden(
        &self,
        micro_batch: &MicroBatch,
        drop: f64,
        mask: Option<&Tensor>,
        routing: Option<&mut Routing>,
    ) -> Tensor {
        // A thread that computes for the first time takes over the pinned number of threads only when it is asked.
        tch::get_num_threads();
        let tokens = micro_batch.inputs_tensor(self.device);
        self.decoder.hidden(&tokens, drop, mask, None, routing)
    }

    /// Who sees whom, `[rows, 1, columns, columns]`, if documents are kept apart.
    fn mask(&self, micro_batch: &MicroBatch) -> Option<Tensor> {
        let ends = micro_batch
            .inputs_tensor(self.device)
            .eq(self.document_end?)
            .to_kind(Kind::Int64);
        // A document's end still belongs to it.
        let document_bt = ends.cumsum(1, Kind::Int64) - ends;
        let same_bqk = document_bt
            .unsqueeze(2)
            .eq_tensor(&document_bt.unsqueeze(1));
        Some(same_bqk.tril(0).unsqueeze(1))
    }
}

/// libtorch's generators belong to the process: whoever draws from them holds this from seeding to the last draw.
fn seeded_generator(seed: u64) -> MutexGuard<'static, ()> {
    static GENERATOR: Mutex<()> = Mutex::new(());
    // A panic while drawing leaves nothing behind that seeding does not replace.
    let guard = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    tch::manual_seed(seed.cast_signed());
    guard
}

/// Added one by one in float64, so that neither threads nor vector widths matter.
fn sum(losses: &Tensor) -> Result<f64, ModelError> {
    let mut values = vec![0.0; losses.numel()];
    bytes::read_f32(losses, &mut values)?;
    Ok(values.iter().map(|&value| f64::from(value)).sum())
}
