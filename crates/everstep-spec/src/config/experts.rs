//! `[model.moe]`: mixture of experts.

use serde::{Deserialize, Serialize};

use super::{COUNT_MAX, ConfigError, check};

/// Experts of a layer and how tokens are routed to them (DeepSeek-V3 §2.1.2).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertsConfig {
    /// Number of routed experts in a layer.
    pub experts: usize,
    /// Number of experts that see every token; 1.
    #[serde(default = "one")]
    pub shared_experts: usize,
    /// Number of routed experts that see a token.
    pub experts_per_token: usize,
    /// Inner width of one expert.
    pub ffn_width: usize,
    /// Number of first layers that have an MLP instead; 1.
    #[serde(default = "one")]
    pub dense_layers: usize,
    /// Number of groups that the experts of a layer are divided in; 1.
    #[serde(default = "one")]
    pub groups: usize,
    /// Number of groups that a token's experts come from; 1.
    #[serde(default = "one")]
    pub groups_per_token: usize,
    /// Whether the weights of a token's experts are divided by their sum; `true`.
    #[serde(default = "yes")]
    pub normalize: bool,
    /// Factor on those weights; 2.5.
    #[serde(default = "default_scale")]
    pub routed_scale: f64,
    /// How far an expert's bias moves in a step, γ; 0.001.
    #[serde(default = "default_balance_rate")]
    pub balance_rate: f64,
    /// Weight of the sequence-wise balance loss, α; 0.0001.
    #[serde(default = "default_balance_loss")]
    pub balance_loss: f64,
}

fn one() -> usize {
    1
}

fn yes() -> bool {
    true
}

fn default_scale() -> f64 {
    2.5
}

fn default_balance_rate() -> f64 {
    1e-3
}

fn default_balance_loss() -> f64 {
    1e-4
}

impl ExpertsConfig {
    /// Experts of which `experts_per_token` see a token, with the defaults of all other fields.
    pub fn new(experts: usize, experts_per_token: usize, ffn_width: usize) -> Self {
        Self {
            experts,
            shared_experts: one(),
            experts_per_token,
            ffn_width,
            dense_layers: one(),
            groups: one(),
            groups_per_token: one(),
            normalize: yes(),
            routed_scale: default_scale(),
            balance_rate: default_balance_rate(),
            balance_loss: default_balance_loss(),
        }
    }

    pub(super) fn validate(&self, layers: usize) -> Result<(), ConfigError> {
        for (field, value, max) in [
            ("moe.experts", self.experts, COUNT_MAX),
            ("moe.shared_experts", self.shared_experts, COUNT_MAX),
            ("moe.ffn_width", self.ffn_width, COUNT_MAX),
            ("moe.groups", self.groups, self.experts),
            ("moe.groups_per_token", self.groups_per_token, self.groups),
        ] {
            check(field, value, (1..=max).contains(&value), || {
                format!("1 to {max}")
            })?;
        }
        check(
            "moe.ffn_width",
            self.ffn_width,
            self.ffn_width.is_multiple_of(GROUPED_ALIGNMENT),
            || format!("a multiple of {GROUPED_ALIGNMENT}"),
        )?;
        check(
            "moe.dense_layers",
            self.dense_layers,
            self.dense_layers <= layers,
            || format!("0 to layers=`{layers}`"),
        )?;
        check(
            "moe.groups",
            self.groups,
            self.experts.is_multiple_of(self.groups),
            || format!("a divisor of moe.experts=`{}`", self.experts),
        )?;
        let group = self.experts / self.groups;
        // A group's score is the sum of its two best experts.
        check(
            "moe.groups",
            self.groups,
            self.groups == 1 || group >= 2,
            || "groups of 2 experts or more".into(),
        )?;
        let reachable = group * self.groups_per_token;
        check(
            "moe.experts_per_token",
            self.experts_per_token,
            (1..=reachable).contains(&self.experts_per_token),
            || format!("1 to {reachable}, the experts of moe.groups_per_token groups"),
        )?;
        for (field, value) in [
            ("moe.balance_rate", self.balance_rate),
            ("moe.balance_loss", self.balance_loss),
        ] {
            check(field, value, value.is_finite() && value >= 0.0, || {
                "0 or more".into()
            })?;
        }
        let scale = self.routed_scale;
        check(
            "moe.routed_scale",
            scale,
            scale.is_finite() && scale > 0.0,
            || "a number above 0".into(),
        )
    }
}

/// libtorch's grouped matrix products want rows that begin at multiples of 16 bytes, whatever the type.
pub(super) const GROUPED_ALIGNMENT: usize = 8;
