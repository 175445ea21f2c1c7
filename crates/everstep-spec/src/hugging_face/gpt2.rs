//! `GPT2LMHeadModel`.

use std::collections::BTreeSet;

use everstep_optim::ParameterSpec;
use serde_json::{Value, json};

use super::fields::{Fields, unusable};
use super::{HuggingFaceError, Role, fixed};
use crate::config::{Architecture, Mlp, ModelConfig, Norm, Positions};
use crate::spec::parameters;

pub(super) fn to_json(config: &ModelConfig) -> Result<Value, HuggingFaceError> {
    fixed("norm", &config.norm, &[Norm::Layer])?;
    fixed("positions", &config.positions, &[Positions::Learned])?;
    fixed("mlp", &config.mlp, &[Mlp::Gelu, Mlp::GeluTanh])?;
    fixed("kv_heads", &config.kv_heads, &[config.heads])?;
    Ok(json!({
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_inner": config.ffn_width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_positions": config.context,
        "activation_function": if config.mlp == Mlp::Gelu { "gelu" } else { "gelu_new" },
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "tie_word_embeddings": config.tied_embeddings,
    }))
}

/// GPT-2's biases, which Hugging Face's class always has.
pub(super) fn zero_tensors(config: &ModelConfig) -> Vec<ParameterSpec> {
    if config.bias {
        return Vec::new();
    }
    let own: BTreeSet<String> = parameters(config)
        .into_iter()
        .map(|parameter| parameter.name)
        .collect();
    let mut all = parameters(&ModelConfig {
        bias: true,
        ..config.clone()
    });
    all.retain(|parameter| !own.contains(&parameter.name));
    all
}

pub(super) fn from_json(fields: &Fields<'_>) -> Result<ModelConfig, HuggingFaceError> {
    let mut config = ModelConfig::new(
        Architecture::Gpt2,
        fields.count("n_layer", None)?,
        fields.count("n_head", None)?,
        fields.count("n_embd", None)?,
        fields.count("n_positions", Some(1024))?,
    );
    config.vocab_size = fields.count("vocab_size", None)?;
    config.ffn_width = fields.count("n_inner", Some(config.ffn_width))?;
    config.norm_eps = fields.number("layer_norm_epsilon", 1e-5)?;
    config.init_std = fields.number("initializer_range", 0.02)?;
    config.tied_embeddings = fields.flag("tie_word_embeddings", true)?;
    config.mlp = match fields.text("activation_function", "gelu_new")? {
        "gelu" => Mlp::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" => Mlp::GeluTanh,
        other => {
            return Err(unusable(
                "activation_function",
                other,
                "gelu, gelu_new, gelu_pytorch_tanh",
            ));
        }
    };
    for (field, allowed) in [
        ("scale_attn_weights", true),
        ("scale_attn_by_inverse_layer_idx", false),
        ("add_cross_attention", false),
    ] {
        let text = if allowed { "true" } else { "false" };
        fields.only(field, text, |value| value.as_bool() == Some(allowed))?;
    }
    Ok(config)
}

pub(super) fn role(name: &str) -> Role {
    if name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias") {
        // The causal mask, saved as a buffer by older versions.
        return Role::Derived;
    }
    // The published checkpoints were saved without the head and its prefix.
    let is_whole = name.starts_with("transformer.") || name.starts_with("lm_head.");
    Role::Parameter(if is_whole {
        name.to_owned()
    } else {
        format!("transformer.{name}")
    })
}
