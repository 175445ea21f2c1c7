//! The arithmetic of training behind the protocol's state machines.

use std::sync::Arc;

use everstep_protocol::policy::{History, LossPolicy, Verdict};
use everstep_protocol::{BlockId, Decision, Digest, GradientReport, Numerics, Step};

use crate::buffer::BufferError;
use crate::config::{ConfigError, OptimizerConfig};
use crate::gradient::Gradient;
use crate::kernels;
use crate::layout::{Layout, Update};
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
        BlockState::new(self.layout.initial_values(seed, block))
    }

    /// Checks the size of a gradient that came from a peer. Panics if there is no such block.
    ///
    /// # Errors
    /// [`BufferError::Length`] if the block has another size.
    pub fn check_gradient(&self, block: BlockId, gradient: &Gradient) -> Result<(), BufferError> {
        match (self.layout.block(block).len, gradient.values.len()) {
            (expected, actual) if expected == actual => Ok(()),
            (expected, actual) => Err(BufferError::Length { expected, actual }),
        }
    }

    /// Checks the size of parameters that came from a peer. Panics if there is no such block.
    ///
    /// # Errors
    /// [`BufferError::Length`] if the block has another size.
    pub fn check_parameters(
        &self,
        block: BlockId,
        parameters: &Parameters,
    ) -> Result<(), BufferError> {
        parameters.check_len(self.layout.block(block).len)
    }

    /// Checks the size of a state that came from a peer or a disk. Panics if there is no such block.
    ///
    /// # Errors
    /// [`BufferError::Length`] if the block has another size.
    pub fn check_state(&self, block: BlockId, state: &BlockState) -> Result<(), BufferError> {
        state.check_len(self.layout.block(block).len)
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
        let decay = match self.layout.block(block).update {
            Update::Decayed => true,
            Update::Plain => false,
            Update::Muon => {
                let step = self.config.muon_step(step, decision.scale);
                let parameters = state.parameters.make_mut();
                let momentum = state.first_moment.make_mut();
                for whole in self.layout.segments(block) {
                    let range = whole.block_range;
                    muon::muon(
                        &mut parameters[range.clone()],
                        &mut momentum[range.clone()],
                        &gradient.values.as_slice()[range],
                        self.layout.matrix(whole.parameter),
                        &step,
                    );
                }
                return;
            }
            Update::Balance { rate } => {
                let excess = gradient.values.as_slice();
                kernels::balance(state.parameters.make_mut(), excess, rate);
                return;
            }
        };
        kernels::adamw(
            state.parameters.make_mut(),
            state.first_moment.make_mut(),
            state.second_moment.make_mut(),
            gradient.values.as_slice(),
            &self.config.adam_step(step, decision.scale, decay),
        );
    }

    fn parameters(&self, _block: BlockId, state: &BlockState) -> Parameters {
        Parameters::from_master(&state.parameters, self.compute_dtype)
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
