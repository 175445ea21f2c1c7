//! The arithmetic of training behind the protocol's state machines.

use std::sync::Arc;

use everstep_protocol::policy::{History, LossPolicy, Verdict};
use everstep_protocol::{BlockId, Decision, Digest, GradientReport, Numerics, Step};
use rayon::prelude::*;

use crate::buffer::{BufferError, FloatBuffer};
use crate::config::{ConfigError, OptimizerConfig};
use crate::gradient::Gradient;
use crate::kernels;
use crate::layout::{Layout, Update};
use crate::moments::{Bfloat16, Moment, MomentDtype};
use crate::muon;
use crate::parameters::{ComputeDtype, Parameters};
use crate::state::BlockState;

/// Sums, decisions and updates of one run, on `f32` blocks. Clones share the layout.
#[derive(Clone, Debug)]
pub struct TrainingNumerics {
    layout: Arc<Layout>,
    config: OptimizerConfig,
    compute_dtype: ComputeDtype,
    policy: LossPolicy,
}

impl TrainingNumerics {
    /// Numerics of a run.
    ///
    /// # Errors
    /// [`ConfigError`] if a field of `config` holds what it may not.
    pub fn new(
        layout: Arc<Layout>,
        config: OptimizerConfig,
        compute_dtype: ComputeDtype,
    ) -> Result<Self, ConfigError> {
        config.validate()?;
        Ok(Self {
            layout,
            config,
            compute_dtype,
            policy: LossPolicy::default(),
        })
    }

    /// The same, with this policy for spikes of the loss; without, there are none.
    #[must_use]
    pub fn with_policy(mut self, policy: LossPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// The layout.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The optimizer's configuration.
    pub fn config(&self) -> &OptimizerConfig {
        &self.config
    }

    /// Type that workers compute in.
    pub fn compute_dtype(&self) -> ComputeDtype {
        self.compute_dtype
    }

    /// State of a block before step 0. Panics if there is no such block.
    pub fn initial_state(&self, seed: u64, block: BlockId) -> BlockState {
        self.first_state(self.layout.initial_values(seed, block))
    }

    /// State before step 0 of a block that begins with these parameters.
    pub fn first_state(&self, parameters: impl Into<FloatBuffer>) -> BlockState {
        let is_averaged = self.config.ema_decay.is_some();
        BlockState::new(parameters, self.config.moments, is_averaged)
    }

    /// Checks the size of a gradient that came from a peer.
    ///
    /// # Errors
    /// [`BufferError::Length`] if the block has another size, 0 if there is none.
    pub fn check_gradient(&self, block: BlockId, gradient: &Gradient) -> Result<(), BufferError> {
        match (self.block_len(block), gradient.values.len()) {
            (expected, actual) if expected == actual => Ok(()),
            (expected, actual) => Err(BufferError::Length { expected, actual }),
        }
    }

    /// Checks the size of parameters that came from a peer.
    ///
    /// # Errors
    /// As [`Self::check_gradient`].
    pub fn check_parameters(
        &self,
        block: BlockId,
        parameters: &Parameters,
    ) -> Result<(), BufferError> {
        parameters.check(self.block_len(block), self.dtype_of(block))
    }

    /// Checks the size of a state that came from a peer or a disk.
    ///
    /// # Errors
    /// As [`Self::check_gradient`].
    pub fn check_state(&self, block: BlockId, state: &BlockState) -> Result<(), BufferError> {
        let len = self.block_len(block);
        let moments = self.config.moments.words(len);
        let average = self.config.ema_decay.map_or(0, |_| len);
        state.check_lens([len, moments, moments, average])
    }

    /// In which type workers read a block: biases of routers are float32 in every compute type.
    fn dtype_of(&self, block: BlockId) -> ComputeDtype {
        match self.layout.blocks().get(block as usize) {
            Some(block) if matches!(block.update, Update::Balance { .. }) => ComputeDtype::Float32,
            _ => self.compute_dtype,
        }
    }

    fn block_len(&self, block: BlockId) -> usize {
        let block = self.layout.blocks().get(block as usize);
        block.map_or(0, |block| block.len)
    }

    /// One step of the block's update, with moments of type `M`.
    fn update<M: Moment>(
        &self,
        block: BlockId,
        step: Step,
        scale: f32,
        gradient: &[f32],
        state: &mut BlockState,
    ) {
        let parameters = state.parameters.make_mut();
        let len = parameters.len();
        let place = self.layout.block(block);
        match place.update {
            Update::Decayed | Update::Plain => kernels::adamw(
                parameters,
                M::view(state.first_moment.make_mut(), len),
                M::view(state.second_moment.make_mut(), len),
                gradient,
                &self.config.adam_step(step, scale, &place),
            ),
            Update::Muon => {
                let step = self.config.muon_step(step, scale, &place);
                let momentum = M::view(state.first_moment.make_mut(), len);
                let (mut parameters, mut momentum, mut gradient) = (parameters, momentum, gradient);
                let mut matrices = Vec::new();
                for whole in self.layout.segments(block) {
                    let own = ..whole.block_range.len();
                    let parts = (
                        parameters.split_off_mut(own),
                        momentum.split_off_mut(own),
                        gradient.split_off(own),
                    );
                    let (Some(parameters), Some(momentum), Some(gradient)) = parts else {
                        unreachable!("the matrices of a block are as long as it is");
                    };
                    let shape = self.layout.matrix(whole.parameter);
                    matrices.push((parameters, momentum, gradient, shape));
                }
                // Each is computed by one thread, whichever, to the same bits.
                matrices
                    .into_par_iter()
                    .for_each(|(parameters, momentum, gradient, shape)| {
                        muon::muon(parameters, momentum, gradient, shape, &step);
                    });
            }
            Update::Balance { rate } => kernels::balance(parameters, gradient, rate),
        }
    }
}

impl Numerics for TrainingNumerics {
    type Gradient = Gradient;
    type Parameters = Parameters;
    type State = BlockState;

    /// Sums into the memory of whichever side nobody else holds.
    fn sum(&self, left: Gradient, right: Gradient) -> Gradient {
        Gradient {
            values: left.values.add(right.values),
            loss_sum: left.loss_sum + right.loss_sum,
            tokens: left.tokens + right.tokens,
        }
    }

    /// A gradient or loss that is not finite has infinite norm and loss: NaN would differ from itself, and its payload from
    /// machine to machine.
    fn report(&self, block: BlockId, gradient: &Gradient) -> GradientReport {
        let values = gradient.values.as_slice();
        let (squared_norm, load_excess) = match self.layout.block(block).update {
            Update::Decayed | Update::Muon | Update::Plain => (kernels::squared_norm(values), 0.0),
            Update::Balance { .. } => (0.0, f64::from(values.iter().copied().fold(0.0, f32::max))),
        };
        let canonical = |value: f64| {
            if value.is_finite() {
                value
            } else {
                f64::INFINITY
            }
        };
        GradientReport {
            squared_norm: canonical(squared_norm),
            finite: squared_norm.is_finite() && gradient.loss_sum.is_finite(),
            loss_sum: canonical(gradient.loss_sum),
            tokens: gradient.tokens,
            load_excess,
            history: History::default(),
        }
    }

    /// Skips a step whose gradient or loss is not finite, one without tokens, and one whose loss is a spike.
    fn decide(&self, step: Step, reports: &[GradientReport]) -> Decision {
        let _ = step;
        let (loss_sum, tokens) = reports
            .first()
            .map_or((0.0, 0), |report| (report.loss_sum, report.tokens));
        let divisor = tokens.max(1) as f64;
        // In block order: another order could give another last bit.
        let squared_norm = reports
            .iter()
            .fold(0.0, |sum, report| sum + report.squared_norm);
        let gradient_norm = squared_norm.sqrt() / divisor;
        let is_finite = tokens > 0 && reports.iter().all(|report| report.finite);
        let loss = loss_sum / divisor;
        let before = reports
            .first()
            .map(|report| report.history)
            .unwrap_or_default();
        let (verdict, history) = self.policy.judge(&before, loss, is_finite);
        let apply = verdict == Verdict::Apply;
        Decision {
            apply,
            is_spike: verdict == Verdict::Spike,
            history,
            scale: if apply {
                (self.config.clip_factor(gradient_norm) / divisor) as f32
            } else {
                0.0
            },
            gradient_norm,
            loss,
            tokens,
            load_excess: reports
                .iter()
                .fold(0.0, |most, report| report.load_excess.max(most)),
        }
    }

    /// One step of the block's update; a skipped step leaves the state as it is.
    fn apply(
        &self,
        block: BlockId,
        step: Step,
        decision: &Decision,
        gradient: &Gradient,
        state: &mut BlockState,
    ) {
        if !decision.apply {
            return;
        }
        let gradient = gradient.values.as_slice();
        let update = match self.config.moments {
            MomentDtype::Float32 => Self::update::<f32>,
            MomentDtype::Bfloat16 => Self::update::<Bfloat16>,
        };
        update(self, block, step, decision.scale, gradient, state);
        if let Some(decay) = self.config.ema_decay {
            let weight = (1.0 - decay) as f32;
            kernels::average(
                state.average.make_mut(),
                state.parameters.as_slice(),
                weight,
            );
        }
    }

    fn parameters(&self, block: BlockId, state: &BlockState) -> Parameters {
        Parameters::from_master(&state.parameters, self.dtype_of(block))
    }

    fn history(&self, state: &BlockState) -> History {
        state.history
    }

    fn remember(&self, decision: &Decision, state: &mut BlockState) {
        state.history = decision.history;
    }

    /// The first half of BLAKE3 over every block's values, loss and tokens.
    fn digest(&self, gradients: &[Gradient]) -> Digest {
        let mut hasher = blake3::Hasher::new();
        for gradient in gradients {
            hasher.update(gradient.values.as_bytes());
            hasher.update(&gradient.loss_sum.to_bits().to_le_bytes());
            hasher.update(&gradient.tokens.to_le_bytes());
        }
        let mut bytes = hasher.finalize_xof();
        let mut half = || {
            let mut half = [0; 8];
            bytes.fill(&mut half);
            u64::from_le_bytes(half)
        };
        Digest([half(), half()])
    }
}

#[cfg(test)]
mod tests;
