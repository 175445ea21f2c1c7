//! Shapes of the learning rate over a run.

use serde::{Deserialize, Serialize};

/// How the learning rate falls after warm-up. Warm-up is linear and the same for all: `lr * (step + 1) / (warmup_steps + 1)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Half a cosine from `lr` at the end of warm-up to `min_lr` at `decay_end_step`, then `min_lr`.
    #[default]
    Cosine,
    /// A line from `lr` at the end of warm-up to `min_lr` at `decay_end_step`, then `min_lr`.
    Linear,
    /// Warm-up, stable, decay: `lr` until the last `decay_steps` steps of the run, in which a line leads to `min_lr`.
    Wsd,
    /// `lr` for ever.
    Constant,
}

impl Schedule {
    /// Name as in a run file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cosine => "cosine",
            Self::Linear => "linear",
            Self::Wsd => "wsd",
            Self::Constant => "constant",
        }
    }

    /// Factor between `min_lr` (0) and `lr` (1) at `ratio` of the way, between 0 and 1.
    pub(crate) fn factor(self, ratio: f64) -> f64 {
        match self {
            Self::Cosine => 0.5 * (1.0 + libm::cos(std::f64::consts::PI * ratio)),
            Self::Linear | Self::Wsd => 1.0 - ratio,
            Self::Constant => 1.0,
        }
    }
}
