//! `LlamaForCausalLM`.

use serde_json::{Value, json};

use super::fields::{Fields, unusable};
use super::{HuggingFaceError, Role, fixed, rotation};
use crate::config::{Architecture, Mlp, ModelConfig, Norm, Positions};

pub(super) fn to_json(config: &ModelConfig) -> Result<Value, HuggingFaceError> {
    fixed("norm", &config.norm, &[Norm::Rms])?;
    fixed("positions", &config.positions, &[Positions::Rope])?;
    fixed("mlp", &config.mlp, &[Mlp::Swiglu])?;
    Ok(json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim(),
        "max_position_embeddings": config.context,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": rotation::to_json(config),
        "initializer_range": config.init_std,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tied_embeddings,
    }))
}

pub(super) fn from_json(fields: &Fields<'_>) -> Result<ModelConfig, HuggingFaceError> {
    let mut config = ModelConfig::new(
        Architecture::Llama,
        fields.count("num_hidden_layers", None)?,
        fields.count("num_attention_heads", None)?,
        fields.count("hidden_size", None)?,
        fields.count("max_position_embeddings", Some(2048))?,
    );
    config.vocab_size = fields.count("vocab_size", None)?;
    config.ffn_width = fields.count("intermediate_size", None)?;
    config.kv_heads = fields.count("num_key_value_heads", Some(config.heads))?;
    config.norm_eps = fields.number("rms_norm_eps", 1e-6)?;
    config.init_std = fields.number("initializer_range", 0.02)?;
    config.tied_embeddings = fields.flag("tie_word_embeddings", false)?;
    config.bias = fields.flag("attention_bias", false)?;
    if fields.flag("mlp_bias", false)? != config.bias {
        return Err(unusable(
            "mlp_bias",
            &(!config.bias).to_string(),
            "the value of attention_bias",
        ));
    }
    match fields.text("hidden_act", "silu")? {
        "silu" | "swish" => {}
        other => return Err(unusable("hidden_act", other, "silu")),
    }
    let head_dim = config.width.checked_div(config.heads).unwrap_or(0);
    let given = fields.count("head_dim", Some(head_dim))?;
    if given != head_dim {
        return Err(unusable(
            "head_dim",
            &given.to_string(),
            "hidden_size / num_attention_heads",
        ));
    }
    (config.rope_theta, config.rope_scaling) = rotation::from_json(fields)?;
    Ok(config)
}

pub(super) fn role(name: &str) -> Role {
    if name.ends_with(".rotary_emb.inv_freq") {
        // Saved as a buffer by older versions.
        return Role::Derived;
    }
    Role::Parameter(name.to_owned())
}
