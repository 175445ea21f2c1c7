//! `[model.mtp]`: multi-token prediction.

use serde::{Deserialize, Serialize};

use super::{ConfigError, check};

/// Modules that predict tokens after the next one while training, so that the model plans ahead (DeepSeek-V3 §2.2). Generation does
/// without them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PredictionConfig {
    /// Number of modules, D: the k-th predicts the k-th token after the next one; 1.
    #[serde(default = "one")]
    pub modules: usize,
    /// Weight of the mean of the modules' losses, λ; 0.3.
    #[serde(default = "default_loss")]
    pub loss: f64,
}

fn one() -> usize {
    1
}

fn default_loss() -> f64 {
    0.3
}

/// Each is a whole layer with its experts; nobody trains more.
const MODULES_MAX: usize = 8;

impl PredictionConfig {
    /// So many modules, with the default weight.
    pub fn new(modules: usize) -> Self {
        Self {
            modules,
            loss: default_loss(),
        }
    }

    pub(super) fn validate(&self, context: usize) -> Result<(), ConfigError> {
        let max = MODULES_MAX.min(context.saturating_sub(1));
        check(
            "mtp.modules",
            self.modules,
            (1..=max).contains(&self.modules),
            || format!("1 to {max}"),
        )?;
        check(
            "mtp.loss",
            self.loss,
            self.loss.is_finite() && self.loss > 0.0,
            || "a number above 0".into(),
        )
    }
}
