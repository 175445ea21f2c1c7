//! `config.json` of Hugging Face, out and in. Tensors already have Hugging Face's names and orientation.

use std::collections::BTreeSet;

use everstep_optim::ParameterSpec;
use serde_json::{Map, Value, json};

use crate::config::{Architecture, Mlp, ModelConfig, Norm, Positions};
use crate::spec::parameters;

/// A model that Hugging Face has no class for, or a `config.json` that describes none of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}=`{value}` has no counterpart; allowed: {allowed}")]
pub struct HuggingFaceError {
    /// Name of the field.
    pub field: &'static str,
    /// What it holds.
    pub value: String,
    /// What it may hold.
    pub allowed: String,
}

/// The `config.json` that describes `config`; `dtype` is `float32` or `bfloat16`, the type of the exported tensors.
///
/// # Errors
/// If the model mixes what no Hugging Face class mixes, such as GPT-2 with RoPE.
pub fn to_json(config: &ModelConfig, dtype: &str) -> Result<Value, HuggingFaceError> {
    let llama = config.architecture == Architecture::Llama;
    let fixed = |field, value: String, holds: bool, allowed: &str| {
        if holds {
            Ok(())
        } else {
            Err(HuggingFaceError {
                field,
                value,
                allowed: allowed.to_owned(),
            })
        }
    };
    let debug = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
    let (norm, positions) = if llama {
        (Norm::Rms, Positions::Rope)
    } else {
        (Norm::Layer, Positions::Learned)
    };
    fixed(
        "norm",
        debug(&config.norm),
        config.norm == norm,
        &debug(&norm),
    )?;
    fixed(
        "positions",
        debug(&config.positions),
        config.positions == positions,
        &debug(&positions),
    )?;
    let swiglu = config.mlp == Mlp::Swiglu;
    fixed(
        "mlp",
        debug(&config.mlp),
        swiglu == llama,
        if llama { "swiglu" } else { "gelu, gelu_tanh" },
    )?;
    if llama {
        return Ok(json!({
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
            "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
            "initializer_range": config.init_std,
            "attention_bias": config.bias,
            "mlp_bias": config.bias,
            "attention_dropout": config.dropout,
            "tie_word_embeddings": config.tied_embeddings,
            "bos_token_id": null,
            "eos_token_id": null,
            "dtype": dtype,
        }));
    }
    let grouped = config.kv_heads != config.heads;
    fixed(
        "kv_heads",
        config.kv_heads.to_string(),
        !grouped,
        &config.heads.to_string(),
    )?;
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
        "bos_token_id": null,
        "eos_token_id": null,
        "dtype": dtype,
    }))
}

/// Tensors, all zeros, that Hugging Face's class has and a model of `config` has not: GPT-2's biases, which it always has.
/// An export adds them.
pub fn zero_tensors(config: &ModelConfig) -> Vec<ParameterSpec> {
    if config.architecture != Architecture::Gpt2 || config.bias {
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

/// The model that a `config.json` describes. Dropout is left at 0: it belongs to training, not to the model.
///
/// # Errors
/// Names the first field that is missing or has no counterpart here.
pub fn from_json(json: &Value) -> Result<ModelConfig, HuggingFaceError> {
    let empty = Map::new();
    let fields = Fields(json.as_object().unwrap_or(&empty));
    match fields.text("model_type", "") {
        "llama" => llama(&fields),
        "gpt2" => gpt2(&fields),
        other => Err(unusable("model_type", other, "llama, gpt2")),
    }
}

fn llama(fields: &Fields<'_>) -> Result<ModelConfig, HuggingFaceError> {
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
    if fields.text("hidden_act", "silu") != "silu" {
        return Err(unusable(
            "hidden_act",
            fields.text("hidden_act", ""),
            "silu",
        ));
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
    // Newer files nest the rotation's parameters; older ones have them at the top, with scaling apart.
    let nested = fields
        .0
        .get("rope_parameters")
        .or_else(|| fields.0.get("rope_scaling"))
        .and_then(Value::as_object);
    let empty = Map::new();
    let nested = Fields(nested.unwrap_or(&empty));
    let kind = nested.text("rope_type", nested.text("type", "default"));
    if kind != "default" {
        return Err(unusable("rope_type", kind, "default"));
    }
    config.rope_theta = nested.number("rope_theta", fields.number("rope_theta", 10_000.0)?)?;
    valid(config)
}

fn gpt2(fields: &Fields<'_>) -> Result<ModelConfig, HuggingFaceError> {
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
    config.mlp = match fields.text("activation_function", "gelu_new") {
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
    valid(config)
}

fn valid(config: ModelConfig) -> Result<ModelConfig, HuggingFaceError> {
    match config.validate() {
        Ok(()) => Ok(config),
        Err(error) => Err(unusable(error.field, &error.value, &error.allowed)),
    }
}

fn unusable(field: &'static str, value: &str, allowed: &str) -> HuggingFaceError {
    HuggingFaceError {
        field,
        value: value.to_owned(),
        allowed: allowed.to_owned(),
    }
}

/// A JSON object whose `null`s count as left out.
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn value(&self, field: &str) -> Option<&'a Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn text(&self, field: &str, default: &'a str) -> &'a str {
        self.value(field).and_then(Value::as_str).unwrap_or(default)
    }

    fn count(
        &self,
        field: &'static str,
        default: Option<usize>,
    ) -> Result<usize, HuggingFaceError> {
        match (self.value(field), default) {
            (Some(value), _) => value
                .as_u64()
                .and_then(|count| usize::try_from(count).ok())
                .ok_or_else(|| unusable(field, &value.to_string(), "a whole number")),
            (None, Some(default)) => Ok(default),
            (None, None) => Err(unusable(field, "", "a whole number, which is missing")),
        }
    }

    fn number(&self, field: &'static str, default: f64) -> Result<f64, HuggingFaceError> {
        match self.value(field) {
            None => Ok(default),
            Some(value) => value
                .as_f64()
                .ok_or_else(|| unusable(field, &value.to_string(), "a number")),
        }
    }

    fn flag(&self, field: &'static str, default: bool) -> Result<bool, HuggingFaceError> {
        match self.value(field) {
            None => Ok(default),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| unusable(field, &value.to_string(), "true, false")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configurations_go_out_and_come_back() {
        let mut llama = ModelConfig {
            vocab_size: 99,
            kv_heads: 2,
            ..ModelConfig::new(Architecture::Llama, 2, 4, 64, 32)
        };
        llama.rope_theta = 500_000.0;
        let mut gpt2 = ModelConfig {
            vocab_size: 99,
            ..ModelConfig::new(Architecture::Gpt2, 2, 4, 64, 32)
        };
        for config in [llama, gpt2.clone()] {
            assert_eq!(
                from_json(&to_json(&config, "float32").unwrap()).unwrap(),
                config
            );
        }
        gpt2.mlp = Mlp::GeluTanh;
        assert_eq!(
            to_json(&gpt2, "float32").unwrap()["activation_function"],
            "gelu_new"
        );
    }

    #[test]
    fn a_gpt2_without_biases_is_exported_with_zeros() {
        let config = ModelConfig {
            vocab_size: 9,
            ..ModelConfig::new(Architecture::Gpt2, 1, 1, 4, 4)
        };
        assert!(zero_tensors(&config).is_empty());
        let bare = ModelConfig {
            bias: false,
            ..config.clone()
        };
        let zeros = zero_tensors(&bare);
        assert!(
            zeros
                .iter()
                .all(|parameter| parameter.init == everstep_optim::Init::Zeros)
        );
        let mut names: Vec<_> = parameters(&bare)
            .into_iter()
            .chain(zeros)
            .map(|parameter| parameter.name)
            .collect();
        let mut all: Vec<_> = parameters(&config)
            .into_iter()
            .map(|parameter| parameter.name)
            .collect();
        names.sort();
        all.sort();
        assert_eq!(names, all);
    }

    #[test]
    fn what_has_no_counterpart_is_named() {
        let gpt2 = ModelConfig {
            vocab_size: 9,
            bias: false,
            ..ModelConfig::new(Architecture::Gpt2, 1, 1, 4, 4)
        };
        let rope = ModelConfig {
            positions: Positions::Rope,
            ..gpt2
        };
        assert_eq!(to_json(&rope, "float32").unwrap_err().field, "positions");
        assert_eq!(
            from_json(&json!({"model_type": "bert"})).unwrap_err().field,
            "model_type"
        );
        assert_eq!(
            from_json(&json!({"model_type": "gpt2"})).unwrap_err().field,
            "n_layer"
        );
        let llama = ModelConfig {
            vocab_size: 9,
            ..ModelConfig::new(Architecture::Llama, 1, 1, 4, 4)
        };
        let mut json = to_json(&llama, "float32").unwrap();
        json["rope_parameters"]["rope_type"] = "llama3".into();
        assert_eq!(from_json(&json).unwrap_err().field, "rope_type");
    }
}
