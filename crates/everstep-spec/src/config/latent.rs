//! `[model.mla]`: multi-head latent attention.

use serde::{Deserialize, Serialize};

use super::{COUNT_MAX, ConfigError, check};

/// Sizes of multi-head latent attention (DeepSeek-V2 §2.1), with Hugging Face's names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatentConfig {
    /// Width of the latent that queries are made from; queries are made from the residual stream itself if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub q_lora_rank: Option<usize>,
    /// Width of the latent that keys and values are made from, and that generation keeps.
    pub kv_lora_rank: usize,
    /// Width of the part of a head's query and key that has no position.
    pub qk_nope_head_dim: usize,
    /// Width of the part that is rotated; its key is the same in all heads.
    pub qk_rope_head_dim: usize,
    /// Width of a head's value.
    pub v_head_dim: usize,
}

impl LatentConfig {
    /// Width of a head's query and key.
    pub fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// Values that generation keeps of a token in each layer: (d_c + d_h^R).
    pub fn cached_values(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        for (field, value) in [
            ("mla.q_lora_rank", self.q_lora_rank.unwrap_or(1)),
            ("mla.kv_lora_rank", self.kv_lora_rank),
            ("mla.qk_nope_head_dim", self.qk_nope_head_dim),
            ("mla.qk_rope_head_dim", self.qk_rope_head_dim),
            ("mla.v_head_dim", self.v_head_dim),
        ] {
            check(field, value, (1..=COUNT_MAX).contains(&value), || {
                format!("1 to {COUNT_MAX}")
            })?;
        }
        let rope = self.qk_rope_head_dim;
        check("mla.qk_rope_head_dim", rope, rope.is_multiple_of(2), || {
            "an even number, for rope turns pairs".into()
        })
    }
}
