//! `DeepseekV3ForCausalLM`.

use serde_json::{Value, json};

use super::fields::{Fields, missing, unusable};
use super::{HuggingFaceError, Role, rotation};
use crate::config::{Architecture, ExpertsConfig, LatentConfig, ModelConfig, PredictionConfig};
use crate::spec::prediction_layers;

/// A configuration of ours has both tables, or it would not be valid.
fn tables(config: &ModelConfig) -> Result<(&LatentConfig, &ExpertsConfig), HuggingFaceError> {
    Ok((
        config
            .mla
            .as_ref()
            .ok_or_else(|| missing("mla", "a table"))?,
        config
            .moe
            .as_ref()
            .ok_or_else(|| missing("moe", "a table"))?,
    ))
}

pub(super) fn to_json(config: &ModelConfig) -> Result<Value, HuggingFaceError> {
    let (mla, moe) = tables(config)?;
    Ok(json!({
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "max_position_embeddings": config.context,
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "qk_head_dim": mla.qk_head_dim(),
        "v_head_dim": mla.v_head_dim,
        "head_dim": mla.qk_rope_head_dim,
        "n_routed_experts": moe.experts,
        "n_shared_experts": moe.shared_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.ffn_width,
        "first_k_dense_replace": moe.dense_layers,
        "moe_layer_freq": 1,
        "n_group": moe.groups,
        "topk_group": moe.groups_per_token,
        "norm_topk_prob": moe.normalize,
        "routed_scaling_factor": moe.routed_scale,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "aux_loss_alpha": moe.balance_loss,
        "num_nextn_predict_layers": config.mtp.as_ref().map_or(0, |mtp| mtp.modules),
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_interleave": true,
        "rope_parameters": rotation::to_json(config),
        "initializer_range": config.init_std,
        "attention_bias": false,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tied_embeddings,
    }))
}

pub(super) fn from_json(fields: &Fields<'_>) -> Result<ModelConfig, HuggingFaceError> {
    let layers = fields.count("num_hidden_layers", None)?;
    let mut config = ModelConfig::new(
        Architecture::DeepseekV3,
        layers,
        fields.count("num_attention_heads", None)?,
        fields.count("hidden_size", None)?,
        fields.count("max_position_embeddings", Some(4096))?,
    );
    config.vocab_size = fields.count("vocab_size", None)?;
    config.ffn_width = fields.count("intermediate_size", None)?;
    config.kv_heads = fields.count("num_key_value_heads", Some(config.heads))?;
    config.norm_eps = fields.number("rms_norm_eps", 1e-6)?;
    config.init_std = fields.number("initializer_range", 0.02)?;
    config.tied_embeddings = fields.flag("tie_word_embeddings", false)?;
    config.bias = fields.flag("attention_bias", false)?;
    (config.rope_theta, config.rope_scaling) = rotation::from_json(fields)?;
    config.mla = Some(LatentConfig {
        q_lora_rank: match fields.count("q_lora_rank", Some(0))? {
            0 => None,
            rank => Some(rank),
        },
        kv_lora_rank: fields.count("kv_lora_rank", None)?,
        qk_nope_head_dim: fields.count("qk_nope_head_dim", None)?,
        qk_rope_head_dim: fields.count("qk_rope_head_dim", None)?,
        v_head_dim: fields.count("v_head_dim", None)?,
    });
    let moe = ExpertsConfig::new(
        fields.count("n_routed_experts", None)?,
        fields.count("num_experts_per_tok", None)?,
        fields.count("moe_intermediate_size", None)?,
    );
    config.moe = Some(ExpertsConfig {
        shared_experts: fields.count("n_shared_experts", Some(1))?,
        dense_layers: fields.count("first_k_dense_replace", Some(3))?,
        groups: fields.count("n_group", Some(1))?,
        groups_per_token: fields.count("topk_group", Some(1))?,
        normalize: fields.flag("norm_topk_prob", true)?,
        routed_scale: fields.number("routed_scaling_factor", 2.5)?,
        ..moe
    });
    config.mtp = match fields.count("num_nextn_predict_layers", Some(0))? {
        0 => None,
        modules => Some(PredictionConfig::new(modules)),
    };
    match fields.text("hidden_act", "silu")? {
        "silu" | "swish" => {}
        other => return Err(unusable("hidden_act", other, "silu")),
    }
    let is_one = |value: &Value| value.as_u64() == Some(1);
    let is_true = |value: &Value| value.as_bool() == Some(true);
    fields.only("moe_layer_freq", "1", is_one)?;
    fields.only("rope_interleave", "true", is_true)?;
    fields.only("scoring_func", "sigmoid", |value| value == "sigmoid")?;
    fields.only("topk_method", "noaux_tc", |value| value == "noaux_tc")?;
    Ok(config)
}

/// Modules for multi-token prediction stand behind the last layer; those that are not trained are passed over, and so are their copies of
/// the model's embedding and output matrix.
pub(super) fn role(config: &ModelConfig, name: &str) -> Role {
    let in_layer = name
        .strip_prefix("model.layers.")
        .and_then(|rest| rest.split_once('.'));
    if let Some((layer, suffix)) = in_layer
        && let Ok(layer) = layer.parse::<usize>()
        && layer >= config.layers
    {
        let is_copy = matches!(suffix, "embed_tokens.weight" | "shared_head.head.weight");
        if is_copy || layer >= prediction_layers(config).end {
            return Role::Derived;
        }
    }
    if name.ends_with(".rotary_emb.inv_freq") {
        return Role::Derived;
    }
    Role::Parameter(name.to_owned())
}
