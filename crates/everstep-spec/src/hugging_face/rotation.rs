//! `rope_parameters`, and `rope_theta` with `rope_scaling` as older files have them.

use serde_json::{Map, Value, json};

use super::HuggingFaceError;
use super::fields::{Fields, unusable};
use crate::config::{LinearConfig, Llama3Config, ModelConfig, RopeScaling, YarnConfig};

pub(super) fn to_json(config: &ModelConfig) -> Value {
    let mut json = match &config.rope_scaling {
        None => json!({"rope_type": "default"}),
        Some(RopeScaling::Linear(linear)) => {
            json!({"rope_type": "linear", "factor": linear.factor})
        }
        Some(RopeScaling::Llama3(llama)) => json!({
            "rope_type": "llama3",
            "factor": llama.factor,
            "low_freq_factor": llama.low_freq_factor,
            "high_freq_factor": llama.high_freq_factor,
            "original_max_position_embeddings": llama.original_context,
        }),
        Some(RopeScaling::Yarn(yarn)) => json!({
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_context,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }),
    };
    json["rope_theta"] = json!(config.rope_theta);
    json
}

/// The base of the wavelengths, and how they are stretched.
pub(super) fn from_json(
    fields: &Fields<'_>,
) -> Result<(f64, Option<RopeScaling>), HuggingFaceError> {
    let empty = Map::new();
    let nested = fields
        .table("rope_parameters")?
        .or(fields.table("rope_scaling")?);
    let nested = Fields(nested.unwrap_or(&empty));
    for at in [fields, &nested] {
        at.only("partial_rotary_factor", "1", |value| {
            value.as_f64() == Some(1.0)
        })?;
    }
    let theta = nested.number("rope_theta", fields.number("rope_theta", 10_000.0)?)?;
    let original = || nested.count("original_max_position_embeddings", None);
    let scaling = match nested.text("rope_type", nested.text("type", "default")?)? {
        "default" => None,
        "linear" => Some(RopeScaling::Linear(LinearConfig {
            factor: nested.number("factor", 0.0)?,
        })),
        "llama3" => Some(RopeScaling::Llama3(Llama3Config {
            factor: nested.number("factor", 0.0)?,
            low_freq_factor: nested.number("low_freq_factor", 0.0)?,
            high_freq_factor: nested.number("high_freq_factor", 0.0)?,
            original_context: original()?,
        })),
        "yarn" => {
            for field in ["attention_factor", "truncate"] {
                nested.only(field, "nothing: its default", |_| false)?;
            }
            let mscale = match (
                nested.number("mscale", 0.0)?,
                nested.number("mscale_all_dim", 0.0)?,
            ) {
                (0.0, 0.0) => (1.0, 0.0),
                both => both,
            };
            Some(RopeScaling::Yarn(YarnConfig {
                factor: nested.number("factor", 0.0)?,
                original_context: original()?,
                beta_fast: nested.number("beta_fast", 32.0)?,
                beta_slow: nested.number("beta_slow", 1.0)?,
                mscale: mscale.0,
                mscale_all_dim: mscale.1,
            }))
        }
        other => {
            return Err(unusable(
                "rope_type",
                other,
                "default, linear, llama3, yarn",
            ));
        }
    };
    Ok((theta, scaling))
}
