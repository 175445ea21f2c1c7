//! Writing a Hugging Face folder.

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{FolderError, SpecialTokens, TensorType, header, to_json, zero_tensors};
use crate::config::ModelConfig;
use crate::spec::parameters;

/// Size of a shard beyond which the next tensor goes into another one, if not told otherwise: 5 GB.
pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;

/// Elements that are converted at a time.
const CHUNK_ELEMENTS: usize = 1 << 18;

/// How a folder is written.
#[derive(Clone, Copy, Debug)]
pub struct ExportOptions {
    /// Type of the tensors.
    pub dtype: TensorType,
    /// A shard grows no larger than this, unless a single tensor does; header not counted.
    pub max_shard_bytes: u64,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            dtype: TensorType::default(),
            max_shard_bytes: DEFAULT_SHARD_BYTES,
        }
    }
}

/// The tokenizer that goes into a folder.
#[derive(Clone, Copy, Debug)]
pub struct ExportedTokenizer<'a> {
    /// The bytes of `tokenizer.json`.
    pub json: &'a [u8],
    /// Id and name of the token that ends a text, if there is one.
    pub end_of_text: Option<(u32, &'a str)>,
}

/// Writes the model `config`, whose flattened parameters `values` gives range by range, as a Hugging Face folder.
///
/// The folder appears as a whole or not at all: it is written beside its place and renamed. `values` appends the elements of a range.
///
/// # Errors
/// [`FolderError`] if `out` is there and not empty, if the model has no counterpart, if a value does not fit in the type, or what
/// `values` says.
pub fn write_folder(
    out: &Path,
    config: &ModelConfig,
    options: ExportOptions,
    tokenizer: Option<ExportedTokenizer<'_>>,
    values: impl FnMut(Range<usize>, &mut Vec<f32>) -> Result<(), FolderError>,
) -> Result<(), FolderError> {
    let end_of_text = tokenizer.and_then(|tokenizer| tokenizer.end_of_text);
    let special = SpecialTokens {
        end_of_text: end_of_text.map(|(id, _)| id),
    };
    let json = to_json(config, options.dtype, special)
        .map_err(|error| FolderError::new(out, format!("model.{error}")))?;
    let partial = Partial::create(out)?;
    let at = |name: &str| partial.path.join(name);
    write_json(&at("config.json"), &json)?;
    write_json(&at("generation_config.json"), &generation_config(special))?;
    if let Some(tokenizer) = tokenizer {
        write_bytes(&at("tokenizer.json"), tokenizer.json)?;
        let json = tokenizer_config(config.context, tokenizer);
        write_json(&at("tokenizer_config.json"), &json)?;
    }
    write_weights(&partial.path, config, options, values)?;
    partial.commit(out)
}

fn generation_config(special: SpecialTokens) -> Value {
    json!({
        "_from_model_config": true,
        "bos_token_id": special.end_of_text,
        "eos_token_id": special.end_of_text,
        "use_cache": true,
    })
}

fn tokenizer_config(context: usize, tokenizer: ExportedTokenizer<'_>) -> Value {
    let name = tokenizer.end_of_text.map(|(_, name)| name);
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": false,
        "bos_token": name,
        "eos_token": name,
    })
}

/// A tensor of a folder.
struct Tensor {
    name: String,
    shape: Vec<usize>,
    /// Its elements in the flattened parameters; none for one that is zero.
    range: Option<Range<usize>>,
    elements: usize,
}

/// All tensors by name, as Hugging Face's readers and writers have them.
fn tensors(config: &ModelConfig) -> Vec<Tensor> {
    let mut offset = 0;
    let own = parameters(config).into_iter().map(|parameter| {
        let elements = parameter.num_elements();
        offset += elements;
        (parameter, Some(offset - elements..offset))
    });
    let zeros = zero_tensors(config)
        .into_iter()
        .map(|parameter| (parameter, None));
    let mut tensors: Vec<Tensor> = own
        .chain(zeros)
        .map(|(parameter, range)| Tensor {
            elements: parameter.num_elements(),
            name: parameter.name,
            shape: parameter.shape,
            range,
        })
        .collect();
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    tensors
}

fn write_weights(
    folder: &Path,
    config: &ModelConfig,
    options: ExportOptions,
    mut values: impl FnMut(Range<usize>, &mut Vec<f32>) -> Result<(), FolderError>,
) -> Result<(), FolderError> {
    let bytes_of = |tensor: &Tensor| (tensor.elements * options.dtype.size()) as u64;
    let tensors = tensors(config);
    let mut shards: Vec<&[Tensor]> = Vec::new();
    let (mut start, mut shard_bytes) = (0, 0);
    for (index, tensor) in tensors.iter().enumerate() {
        if index > start && shard_bytes + bytes_of(tensor) > options.max_shard_bytes {
            shards.push(&tensors[start..index]);
            (start, shard_bytes) = (index, 0);
        }
        shard_bytes += bytes_of(tensor);
    }
    shards.push(&tensors[start..]);

    let mut weight_map = Map::new();
    for (index, shard) in shards.iter().enumerate() {
        let file = match shards.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        write_shard(&folder.join(&file), shard, options.dtype, &mut values)?;
        for tensor in *shard {
            weight_map.insert(tensor.name.clone(), json!(file));
        }
    }
    if shards.len() > 1 {
        let elements: usize = tensors.iter().map(|tensor| tensor.elements).sum();
        let metadata = json!({
            "total_parameters": elements,
            "total_size": elements * options.dtype.size(),
        });
        let index = json!({"metadata": metadata, "weight_map": weight_map});
        write_json(&folder.join("model.safetensors.index.json"), &index)?;
    }
    Ok(())
}

fn write_shard(
    path: &Path,
    tensors: &[Tensor],
    dtype: TensorType,
    values: &mut impl FnMut(Range<usize>, &mut Vec<f32>) -> Result<(), FolderError>,
) -> Result<(), FolderError> {
    let failed = |error| cannot("written", path, error);
    let mut file = BufWriter::new(File::create(path).map_err(failed)?);
    let described = tensors
        .iter()
        .map(|tensor| (tensor.name.as_str(), tensor.shape.as_slice()));
    file.write_all(&header::write(described, dtype))
        .map_err(failed)?;
    let (mut elements, mut bytes) = (Vec::new(), Vec::new());
    for tensor in tensors {
        let mut done = 0;
        while done < tensor.elements {
            let count = CHUNK_ELEMENTS.min(tensor.elements - done);
            elements.clear();
            bytes.clear();
            match &tensor.range {
                Some(range) => {
                    let start = range.start + done;
                    values(start..start + count, &mut elements)?;
                }
                None => elements.resize(count, 0.0),
            }
            dtype.encode(&elements, &mut bytes).map_err(|value| {
                let reason = format!(
                    "{}: {value:e} is too large for {dtype}; allowed: --dtype float32",
                    tensor.name
                );
                FolderError::new(path, reason)
            })?;
            file.write_all(&bytes).map_err(failed)?;
            done += count;
        }
    }
    let file = file
        .into_inner()
        .map_err(|error| failed(error.into_error()))?;
    file.sync_all().map_err(failed)
}

fn write_json(path: &Path, value: &Value) -> Result<(), FolderError> {
    let mut text = format!("{value:#}").into_bytes();
    text.push(b'\n');
    write_bytes(path, &text)
}

fn write_bytes(path: &Path, bytes: &[u8]) -> Result<(), FolderError> {
    fs::write(path, bytes)
        .and_then(|()| File::open(path)?.sync_all())
        .map_err(|error| cannot("written", path, error))
}

fn cannot(what: &str, path: &Path, error: std::io::Error) -> FolderError {
    FolderError::new(path, format!("cannot be {what}: {error}"))
}

/// A folder that is being written; it disappears unless it is committed.
struct Partial {
    path: PathBuf,
}

impl Partial {
    fn create(out: &Path) -> Result<Self, FolderError> {
        let in_the_way = match fs::read_dir(out) {
            Ok(mut entries) => entries.next().is_some(),
            Err(_) => out.symlink_metadata().is_ok(),
        };
        let Some(name) = out.file_name().filter(|_| !in_the_way) else {
            let reason = "is in the way; allowed: a folder that does not exist or is empty";
            return Err(FolderError::new(out, reason));
        };
        let path = out.with_file_name(format!(".{}.partial", name.to_string_lossy()));
        let failed = |error| cannot("created", &path, error);
        // What an export left that was killed.
        if path.exists() {
            fs::remove_dir_all(&path).map_err(failed)?;
        }
        fs::create_dir_all(&path).map_err(failed)?;
        Ok(Self { path })
    }

    fn commit(self, out: &Path) -> Result<(), FolderError> {
        let sync = |path: &Path| File::open(path)?.sync_all();
        sync(&self.path)
            .and_then(|()| fs::rename(&self.path, out))
            .and_then(|()| match out.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => sync(parent),
                _ => sync(Path::new(".")),
            })
            .map_err(|error| cannot("created", out, error))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After a rename there is nothing to remove; what cannot be removed is in the way of the next export, which says so.
        let _ = fs::remove_dir_all(&self.path);
    }
}
