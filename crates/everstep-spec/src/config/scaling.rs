//! `[model.rope_scaling]`: rotations for sequences longer than those of pretraining.

use std::f64::consts::TAU;

use serde::{Deserialize, Serialize};

use super::{COUNT_MAX, ConfigError, check};

/// How the rotation is stretched.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum RopeScaling {
    /// All positions are divided by a factor (Chen et al. 2023).
    Linear(LinearConfig),
    /// What Llama 3.1 does: slow pairs are stretched, fast ones are not.
    Llama3(Llama3Config),
    /// YaRN.
    Yarn(YarnConfig),
}

/// Linear interpolation of positions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearConfig {
    /// How many times longer sequences are.
    pub factor: f64,
}

/// The rotation of Llama 3.1, with the names of Hugging Face.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Llama3Config {
    /// How many times longer sequences are.
    pub factor: f64,
    /// Pairs that turn less often than this over `original_context` are stretched by `factor`.
    pub low_freq_factor: f64,
    /// Pairs that turn more often than this are left alone.
    pub high_freq_factor: f64,
    /// Longest sequence of pretraining.
    pub original_context: usize,
}

/// YaRN (Peng et al. 2023), with the names and defaults of Hugging Face.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct YarnConfig {
    /// How many times longer sequences are.
    pub factor: f64,
    /// Longest sequence of pretraining.
    pub original_context: usize,
    /// Pairs that turn more often than this over `original_context` are left alone; 32.
    #[serde(default = "default_beta_fast")]
    pub beta_fast: f64,
    /// Pairs that turn less often than this are stretched by `factor`; 1.
    #[serde(default = "default_beta_slow")]
    pub beta_slow: f64,
    /// Numerator of what cosines and sines are multiplied with; 1.
    #[serde(default = "default_mscale")]
    pub mscale: f64,
    /// Denominator of the same, whose square scales the logits of attention; 0 for none. 1.
    #[serde(default = "default_mscale")]
    pub mscale_all_dim: f64,
}

fn default_beta_fast() -> f64 {
    32.0
}

fn default_beta_slow() -> f64 {
    1.0
}

fn default_mscale() -> f64 {
    1.0
}

impl YarnConfig {
    /// The temperature that belongs to a factor: `0.1 * mscale * ln(factor) + 1`.
    fn temperature(&self, mscale: f64) -> f64 {
        if self.factor <= 1.0 {
            return 1.0;
        }
        0.1 * mscale * libm::log(self.factor) + 1.0
    }

    /// What cosines and sines are multiplied with.
    fn rotation_scale(&self) -> f64 {
        self.temperature(self.mscale) / self.temperature(self.mscale_all_dim)
    }

    /// What DeepSeek multiplies the logits of attention with, beside `1 / sqrt(head width)`.
    fn logit_scale(&self) -> f64 {
        self.temperature(self.mscale_all_dim).powi(2)
    }
}

impl RopeScaling {
    /// By how many radians a pair turns from one position to the next, if it is `plain` without scaling. Pairs are those of a head of `dim`
    /// values, and `index` says which.
    pub fn stretch(&self, plain: f64, index: usize, dim: f64, theta: f64) -> f64 {
        // How much of the stretched frequency is taken; the rest is the plain one.
        let (stretched, factor) = match self {
            Self::Linear(linear) => (1.0, linear.factor),
            Self::Llama3(llama) => {
                let turns = llama.original_context as f64 * plain / TAU;
                let (low, high) = (llama.low_freq_factor, llama.high_freq_factor);
                (
                    1.0 - ((turns - low) / (high - low)).clamp(0.0, 1.0),
                    llama.factor,
                )
            }
            Self::Yarn(yarn) => {
                // The pair that turns so often over the original context (YaRN §3.2).
                let pair = |turns: f64| {
                    let context = yarn.original_context as f64;
                    dim * libm::log(context / (turns * TAU)) / (2.0 * libm::log(theta))
                };
                let low = pair(yarn.beta_fast).floor().max(0.0);
                let high = pair(yarn.beta_slow).ceil().min(dim - 1.0);
                let width = if low == high { 0.001 } else { high - low };
                (((index as f64 - low) / width).clamp(0.0, 1.0), yarn.factor)
            }
        };
        plain * (stretched / factor + (1.0 - stretched))
    }

    /// What cosines and sines are multiplied with.
    pub fn rotation_scale(&self) -> f64 {
        match self {
            Self::Linear(_) | Self::Llama3(_) => 1.0,
            Self::Yarn(yarn) => yarn.rotation_scale(),
        }
    }

    /// What DeepSeek multiplies the logits of attention with.
    pub fn logit_scale(&self) -> f64 {
        match self {
            Self::Linear(_) | Self::Llama3(_) => 1.0,
            Self::Yarn(yarn) => yarn.logit_scale(),
        }
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let (factor, original) = match self {
            Self::Linear(linear) => (linear.factor, 1),
            Self::Llama3(llama) => (llama.factor, llama.original_context),
            Self::Yarn(yarn) => (yarn.factor, yarn.original_context),
        };
        check(
            "rope_scaling.original_context",
            original,
            (1..=COUNT_MAX).contains(&original),
            || format!("1 to {COUNT_MAX}"),
        )?;
        check(
            "rope_scaling.factor",
            factor,
            factor.is_finite() && factor >= 1.0,
            || "1 or more".into(),
        )?;
        match self {
            Self::Linear(_) => Ok(()),
            Self::Llama3(llama) => llama.validate(),
            Self::Yarn(yarn) => yarn.validate(),
        }
    }
}

impl Llama3Config {
    fn validate(&self) -> Result<(), ConfigError> {
        let (low, high) = (self.low_freq_factor, self.high_freq_factor);
        above_zero("rope_scaling.low_freq_factor", low)?;
        check(
            "rope_scaling.high_freq_factor",
            high,
            high.is_finite() && high > low,
            || format!("a number above low_freq_factor=`{low}`"),
        )
    }
}

impl YarnConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        above_zero("rope_scaling.beta_fast", self.beta_fast)?;
        above_zero("rope_scaling.beta_slow", self.beta_slow)?;
        above_zero("rope_scaling.mscale", self.mscale)?;
        let all_dim = self.mscale_all_dim;
        // Hugging Face ignores mscale without mscale_all_dim.
        let holds = all_dim > 0.0 || all_dim == 0.0 && self.mscale == 1.0;
        check(
            "rope_scaling.mscale_all_dim",
            all_dim,
            all_dim.is_finite() && holds,
            || "a number above 0, or 0 if mscale is 1".into(),
        )
    }
}

fn above_zero(field: &str, value: f64) -> Result<(), ConfigError> {
    check(field, value, value.is_finite() && value > 0.0, || {
        "a number above 0".into()
    })
}
