//! The optimizer's part of a run file.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use everstep_protocol::Step;

use crate::kernels::AdamStep;
use crate::layout::{Block, Update};
use crate::moments::MomentDtype;
use crate::muon::{MuonConfig, MuonStep};
use crate::schedule::Schedule;

/// AdamW, or Muon and AdamW, with decoupled decay, clipping by global norm and a learning-rate schedule. Everything is a pure function of the
/// step's number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Learning rate after warm-up.
    pub lr: f64,
    /// Learning rate that the schedule falls to. 0 if left out.
    #[serde(default)]
    pub min_lr: f64,
    /// Decay of the running means of gradients and of squared gradients. `[0.9, 0.95]` if left out.
    #[serde(default = "default_betas")]
    pub betas: [f64; 2],
    /// Added to the denominator. `1e-8` if left out.
    #[serde(default = "default_eps")]
    pub eps: f64,
    /// Decoupled weight decay of matrices (norms and biases have none). `0.1` if left out.
    #[serde(default = "default_weight_decay")]
    pub weight_decay: f64,
    /// Largest global norm of the mean gradient; larger ones are scaled down to it. 0 is off; `1.0` if left out.
    #[serde(default = "default_grad_clip")]
    pub grad_clip: f64,
    /// How the learning rate falls. Cosine if left out.
    #[serde(default)]
    pub schedule: Schedule,
    /// Steps of linear warm-up. 0 if left out.
    #[serde(default)]
    pub warmup_steps: u64,
    /// `cosine` and `linear`: the step from which on the learning rate is `min_lr`. `num_steps` if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay_end_step: Option<u64>,
    /// `wsd`: length of the decay at the end of the run. A tenth of `num_steps` if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay_steps: Option<u64>,
    /// Type of the running means. `float32` if left out.
    #[serde(default, skip_serializing_if = "MomentDtype::is_float32")]
    pub moments: MomentDtype,
    /// Decay of a running mean of the parameters, updated after every step that is applied. None is kept if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema_decay: Option<f64>,
    /// Steps of the run.
    pub num_steps: u64,
    /// Moves the matrices of layers by Muon instead. AdamW for all if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub muon: Option<MuonConfig>,
    /// Parameters for which something differs; of several groups the first one that names a parameter has it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub group: Vec<GroupConfig>,
}

/// What differs for some parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupConfig {
    /// Their names, as `everstep export` writes them; `*` stands for anything.
    pub parameters: Vec<String>,
    /// Factor on the learning rate; 0 freezes them. 1 if left out.
    #[serde(default = "default_lr_scale")]
    pub lr_scale: f64,
    /// Their weight decay, also of norms and biases. As for others if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
}

fn default_lr_scale() -> f64 {
    1.0
}

fn default_betas() -> [f64; 2] {
    [0.9, 0.95]
}

fn default_eps() -> f64 {
    1e-8
}

fn default_weight_decay() -> f64 {
    0.1
}

fn default_grad_clip() -> f64 {
    1.0
}

/// A field that holds what it may not.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("`{field}` is {value}; allowed: {allowed}")]
pub struct ConfigError {
    /// Name of the field.
    pub field: &'static str,
    /// What it holds.
    pub value: String,
    /// What it may hold.
    pub allowed: String,
}

/// Smallest `eps`: a normal `f32`, well above 0 so that no quotient of small moments overflows.
const EPS_MIN: f64 = 1e-30;

/// torch's `clip_grad_norm_` adds this to the norm.
const CLIP_EPS: f64 = 1e-6;

/// A mean in bfloat16 that decays more slowly stands still: a step changes it by less than half of its last bit, 2^-8 of it.
const BFLOAT16_DECAY_MAX: f64 = 0.992;

impl OptimizerConfig {
    /// A configuration with every default, for runs that are built in code.
    pub fn new(lr: f64, num_steps: u64) -> Self {
        Self {
            lr,
            min_lr: 0.0,
            betas: default_betas(),
            eps: default_eps(),
            weight_decay: default_weight_decay(),
            grad_clip: default_grad_clip(),
            schedule: Schedule::default(),
            warmup_steps: 0,
            decay_end_step: None,
            decay_steps: None,
            moments: MomentDtype::default(),
            ema_decay: None,
            num_steps,
            muon: None,
            group: Vec::new(),
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`ConfigError`] for the first field that holds what it may not.
    pub fn validate(&self) -> Result<(), ConfigError> {
        number(
            "lr",
            self.lr,
            self.lr > 0.0 && self.lr <= 1e3,
            "a number above 0, at most 1000",
        )?;
        let allowed = format!("0 to `lr` ({})", self.lr);
        number(
            "min_lr",
            self.min_lr,
            (0.0..=self.lr).contains(&self.min_lr),
            &allowed,
        )?;
        for beta in self.betas {
            if !(0.0..1.0).contains(&beta) {
                let value = format!("{:?}", self.betas);
                return Err(error("betas", value, "two numbers from 0 to less than 1"));
            }
        }
        number(
            "eps",
            self.eps,
            (EPS_MIN..=1.0).contains(&self.eps),
            "1e-30 to 1",
        )?;
        let decays = self.weight_decay >= 0.0 && self.lr * self.weight_decay < 1.0;
        number(
            "weight_decay",
            self.weight_decay,
            decays,
            "0 or more, and less than 1 / `lr`",
        )?;
        let clips = self.grad_clip >= 0.0 && self.grad_clip.is_finite();
        number("grad_clip", self.grad_clip, clips, "0 (off) or more")?;
        // Beyond 2^53 a step has no exact f64.
        number(
            "num_steps",
            self.num_steps,
            (1..=1 << 53).contains(&self.num_steps),
            "1 to 2^53",
        )?;
        self.validate_moments()?;
        self.validate_groups()?;
        if let Some(decay) = self.ema_decay {
            let is_decay = (0.0..1.0).contains(&decay);
            number("ema_decay", decay, is_decay, "0 or more, below 1")?;
        }
        if let Some(muon) = &self.muon {
            number(
                "muon.momentum",
                muon.momentum,
                (0.0..1.0).contains(&muon.momentum),
                "0 or more, below 1",
            )?;
            number(
                "muon.rms",
                muon.rms,
                muon.rms > 0.0 && muon.rms <= 1e3,
                "a number above 0, at most 1000",
            )?;
        }
        self.validate_schedule()
    }

    fn validate_groups(&self) -> Result<(), ConfigError> {
        let count = self.group.len();
        let is_allowed = count <= usize::from(u8::MAX);
        number("group", count, is_allowed, "at most 255 of them")?;
        for group in &self.group {
            let scale = group.lr_scale;
            let is_scale = (0.0..=1e3).contains(&scale);
            number("group.lr_scale", scale, is_scale, "0 to 1000")?;
            let decay = group.weight_decay.unwrap_or(self.weight_decay);
            let decays = decay >= 0.0 && self.lr * scale * decay < 1.0;
            let allowed = "0 or more, and less than 1 / (`lr` * `lr_scale`)";
            number("group.weight_decay", decay, decays, allowed)?;
        }
        Ok(())
    }

    fn validate_moments(&self) -> Result<(), ConfigError> {
        let momentum = self.muon.as_ref().map_or(0.0, |muon| muon.momentum);
        let decays = self.betas.into_iter().chain([momentum]);
        let slowest = decays.fold(0.0, f64::max);
        if self.moments == MomentDtype::Bfloat16 && slowest > BFLOAT16_DECAY_MAX {
            let allowed = format!(
                "\"float32\" with a decay of {slowest} (`betas`, `muon.momentum`): a mean in bfloat16 that decays more slowly than {BFLOAT16_DECAY_MAX} stands still"
            );
            return Err(error("moments", "\"bfloat16\"", &allowed));
        }
        Ok(())
    }

    fn validate_schedule(&self) -> Result<(), ConfigError> {
        let schedule = self.schedule.name();
        if let (Some(value), Schedule::Wsd | Schedule::Constant) =
            (self.decay_end_step, self.schedule)
        {
            let allowed = format!(
                "nothing with `schedule` = \"{schedule}\" (only cosine and linear have it)"
            );
            return Err(error("decay_end_step", value, &allowed));
        }
        if let (Some(value), Schedule::Cosine | Schedule::Linear | Schedule::Constant) =
            (self.decay_steps, self.schedule)
        {
            let allowed = format!("nothing with `schedule` = \"{schedule}\" (only wsd has it)");
            return Err(error("decay_steps", value, &allowed));
        }
        let warmup = self.warmup_steps;
        let num_steps = self.num_steps;
        match self.schedule {
            Schedule::Cosine | Schedule::Linear => {
                if let Some(end) = self.decay_end_step {
                    number(
                        "decay_end_step",
                        end,
                        (1..=1 << 53).contains(&end),
                        "1 to 2^53",
                    )?;
                }
                let end = self.decay_end_step.unwrap_or(num_steps);
                let allowed =
                    format!("less than the step at which the {schedule} schedule ends ({end})");
                number("warmup_steps", warmup, warmup < end, &allowed)
            }
            Schedule::Wsd => {
                let decay = self.wsd_decay_steps();
                let allowed = format!("1 to `num_steps` ({num_steps})");
                number(
                    "decay_steps",
                    decay,
                    (1..=num_steps).contains(&decay),
                    &allowed,
                )?;
                let stable_end = num_steps - decay;
                let allowed = format!("at most `num_steps` - `decay_steps` ({stable_end})");
                number("warmup_steps", warmup, warmup <= stable_end, &allowed)
            }
            Schedule::Constant => number("warmup_steps", warmup, warmup <= 1 << 53, "0 to 2^53"),
        }
    }

    fn wsd_decay_steps(&self) -> u64 {
        self.decay_steps.unwrap_or(self.num_steps.div_ceil(10))
    }

    /// Learning rate of a step.
    ///
    /// # Source
    /// Warm-up and cosine as in nanoGPT's `get_lr`; WSD: Hu et al. 2024 (MiniCPM).
    pub fn learning_rate(&self, step: Step) -> f64 {
        let step = step.0;
        if step < self.warmup_steps {
            return self.lr * (step as f64 + 1.0) / (self.warmup_steps as f64 + 1.0);
        }
        let (start, end) = match self.schedule {
            Schedule::Constant => return self.lr,
            Schedule::Cosine | Schedule::Linear => (
                self.warmup_steps,
                self.decay_end_step.unwrap_or(self.num_steps),
            ),
            Schedule::Wsd => (
                self.num_steps.saturating_sub(self.wsd_decay_steps()),
                self.num_steps,
            ),
        };
        if step <= start {
            return self.lr;
        }
        if step >= end {
            return self.min_lr;
        }
        let ratio = (step - start) as f64 / (end - start) as f64;
        self.min_lr + self.schedule.factor(ratio) * (self.lr - self.min_lr)
    }

    /// Factor on the gradient by which its global norm stays at most `grad_clip`.
    pub(crate) fn clip_factor(&self, gradient_norm: f64) -> f64 {
        if self.grad_clip > 0.0 {
            (self.grad_clip / (gradient_norm + CLIP_EPS)).min(1.0)
        } else {
            1.0
        }
    }

    /// Learning rate and weight decay of a block in a step.
    fn rates(&self, step: Step, block: &Block) -> (f64, f64) {
        let decay = match block.update {
            Update::Decayed | Update::Muon => self.weight_decay,
            Update::Plain | Update::Balance { .. } => 0.0,
        };
        let lr = self.learning_rate(step);
        match usize::from(block.group).checked_sub(1) {
            None => (lr, decay),
            Some(index) => {
                let group = &self.group[index];
                (lr * group.lr_scale, group.weight_decay.unwrap_or(decay))
            }
        }
    }

    /// Coefficients of a block's step. Adam's count of steps is `step + 1`, whether earlier ones were applied or skipped.
    pub(crate) fn adam_step(&self, step: Step, scale: f32, block: &Block) -> AdamStep {
        let (lr, weight_decay) = self.rates(step, block);
        let count = step.0 as f64 + 1.0;
        let [beta1, beta2] = self.betas;
        AdamStep {
            scale,
            keep: (1.0 - lr * weight_decay) as f32,
            first_weight: (1.0 - beta1) as f32,
            second_keep: beta2 as f32,
            second_weight: (1.0 - beta2) as f32,
            root_factor: (1.0 / (1.0 - libm::pow(beta2, count)).sqrt()) as f32,
            eps: self.eps as f32,
            step_size: (lr / (1.0 - libm::pow(beta1, count))) as f32,
        }
    }

    /// Coefficients of a block's step of Muon.
    pub(crate) fn muon_step(&self, step: Step, scale: f32, block: &Block) -> MuonStep {
        let (lr, weight_decay) = self.rates(step, block);
        let muon = self.muon.clone().unwrap_or_default();
        MuonStep {
            scale,
            keep: (1.0 - lr * weight_decay) as f32,
            momentum: muon.momentum as f32,
            rms: lr * muon.rms,
        }
    }
}

fn number(
    field: &'static str,
    value: impl ToString,
    is_allowed: bool,
    allowed: &str,
) -> Result<(), ConfigError> {
    if is_allowed {
        Ok(())
    } else {
        Err(error(field, value, allowed))
    }
}

fn error(field: &'static str, value: impl ToString, allowed: &str) -> ConfigError {
    ConfigError {
        field,
        value: value.to_string(),
        allowed: allowed.into(),
    }
}

#[cfg(test)]
mod tests;
