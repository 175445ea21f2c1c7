//! Hugging Face folders, out and in: `config.json`, sharded safetensors, tokenizer. Tensors already have Hugging Face's names and
//! orientation, so what an architecture adds stands in one file of it.

use std::fmt::Debug;
use std::path::{Path, PathBuf};

use everstep_optim::ParameterSpec;
use serde_json::{Map, Value, json};

use crate::config::{Architecture, ModelConfig};
use fields::{Fields, unusable};

mod deepseek_v3;
mod element;
mod export;
mod fields;
mod folder;
mod gpt2;
mod header;
mod llama;
mod rotation;

pub use element::TensorType;
pub use export::{DEFAULT_SHARD_BYTES, ExportOptions, ExportedTokenizer, write_folder};
pub use folder::WeightsFolder;

/// A model that Hugging Face has no class for, or a `config.json` that describes none of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}{}; allowed: {allowed}", what_is_wrong(value.as_deref()))]
pub struct HuggingFaceError {
    /// Name of the field.
    pub field: String,
    /// What it holds; nothing if it is missing.
    pub value: Option<String>,
    /// What it may hold.
    pub allowed: String,
}

fn what_is_wrong(value: Option<&str>) -> String {
    value.map_or_else(
        || " is missing".to_owned(),
        |value| format!("=`{value}` has no counterpart"),
    )
}

/// What is wrong with a folder that is read or written: one line that names the file, the field and what is allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {reason}", file.display())]
pub struct FolderError {
    /// The file or folder.
    pub file: PathBuf,
    /// What is wrong with which field or tensor of it, and what is allowed.
    pub reason: String,
}

impl FolderError {
    fn new(file: &Path, reason: impl ToString) -> Self {
        Self {
            file: file.to_owned(),
            reason: reason.to_string(),
        }
    }
}

/// Ids of the tokens that a model stops at, for `config.json` and `generation_config.json`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// The token that ends a text and that one begins with.
    pub end_of_text: Option<u32>,
}

/// The `config.json` that describes `config`.
///
/// # Errors
/// If the model mixes what no Hugging Face class mixes, such as GPT-2 with RoPE.
pub fn to_json(
    config: &ModelConfig,
    dtype: TensorType,
    special: SpecialTokens,
) -> Result<Value, HuggingFaceError> {
    let mut json = match config.architecture {
        Architecture::Llama => llama::to_json(config)?,
        Architecture::Gpt2 => gpt2::to_json(config)?,
        Architecture::DeepseekV3 => deepseek_v3::to_json(config)?,
    };
    for (field, value) in [
        ("bos_token_id", json!(special.end_of_text)),
        ("eos_token_id", json!(special.end_of_text)),
        ("dtype", json!(dtype.name())),
    ] {
        json[field] = value;
    }
    Ok(json)
}

/// Tensors, all zeros, that Hugging Face's class has and a model of `config` has not. An export adds them.
pub fn zero_tensors(config: &ModelConfig) -> Vec<ParameterSpec> {
    match config.architecture {
        Architecture::Llama | Architecture::DeepseekV3 => Vec::new(),
        Architecture::Gpt2 => gpt2::zero_tensors(config),
    }
}

/// The model that a `config.json` describes. Dropout is left at 0: it belongs to training, not to the model.
///
/// # Errors
/// Names the first field that is missing or has no counterpart here.
pub fn from_json(json: &Value) -> Result<ModelConfig, HuggingFaceError> {
    let empty = Map::new();
    let fields = Fields(json.as_object().unwrap_or(&empty));
    let config = match fields.text("model_type", "")? {
        "llama" => llama::from_json(&fields)?,
        "gpt2" => gpt2::from_json(&fields)?,
        "deepseek_v3" => deepseek_v3::from_json(&fields)?,
        other => return Err(unusable("model_type", other, "llama, gpt2, deepseek_v3")),
    };
    fields.only(
        "quantization_config",
        "nothing: weights that are not quantized",
        |_| false,
    )?;
    match config.validate() {
        Ok(()) => Ok(config),
        Err(error) => Err(unusable(&error.field, &error.value, &error.allowed)),
    }
}

/// What a tensor of a folder is to a model.
enum Role {
    /// The parameter of this name, if the model has one.
    Parameter(String),
    /// Something that is computed from the configuration and needs not be read.
    Derived,
}

/// What the tensor `name` of a file is to the model `config`.
fn role(config: &ModelConfig, name: &str) -> Role {
    match config.architecture {
        Architecture::Llama => llama::role(name),
        Architecture::Gpt2 => gpt2::role(name),
        Architecture::DeepseekV3 => deepseek_v3::role(config, name),
    }
}

/// Demands that a field of ours holds what the Hugging Face class always has.
fn fixed<T: PartialEq + Debug>(
    field: &'static str,
    value: &T,
    allowed: &[T],
) -> Result<(), HuggingFaceError> {
    if allowed.contains(value) {
        return Ok(());
    }
    let text = |value: &T| format!("{value:?}").to_lowercase();
    let allowed: Vec<String> = allowed.iter().map(text).collect();
    Err(unusable(field, &text(value), &allowed.join(", ")))
}

#[cfg(test)]
mod tests;
