//! Reading a Hugging Face folder.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use everstep_optim::ParameterSpec;
use serde_json::Value;

use super::header::{self, Tensor};
use super::{FolderError, Role, TensorType, from_json, role};
use crate::config::ModelConfig;
use crate::spec::{Names, parameters, prediction_layers};

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// Elements that are read at a time.
const CHUNK_ELEMENTS: usize = 1 << 18;

/// A Hugging Face folder whose configuration and headers were checked: it holds every parameter of a model of ours and nothing
/// else. Values are read when they are asked for.
#[derive(Debug)]
pub struct WeightsFolder {
    config: ModelConfig,
    files: Vec<(PathBuf, File)>,
    /// In canonical order, without gaps.
    parameters: Vec<Located>,
}

#[derive(Debug)]
struct Located {
    spec: ParameterSpec,
    /// Its elements in the flattened parameters.
    range: Range<usize>,
    place: Place,
}

/// A tensor and the number of the file that holds it.
#[derive(Clone, Debug)]
struct Place {
    file: usize,
    tensor: Tensor,
}

impl WeightsFolder {
    /// Opens the folder `dir`.
    ///
    /// # Errors
    /// [`FolderError`] names the first file and field or tensor that is missing, too much, damaged or has no counterpart.
    pub fn open(dir: &Path) -> Result<Self, FolderError> {
        let config_file = dir.join(CONFIG);
        let config = from_json(&read_json(&config_file)?)
            .map_err(|error| FolderError::new(&config_file, error))?;
        let mut folder = Self {
            config,
            files: Vec::new(),
            parameters: Vec::new(),
        };
        let mut found = folder.tensors(dir)?;
        let names = Names::of(&folder.config);
        // transformers keeps the number of modules that predict further tokens in the configuration and drops their weights.
        let first = prediction_layers(&folder.config).start;
        if !found.contains_key(&names.in_layer(first, "eh_proj.weight")) {
            folder.config.mtp = None;
        }
        let mut offset = 0;
        for spec in parameters(&folder.config) {
            let Some(place) = found.remove(&spec.name) else {
                let reason = format!(
                    "no file of it holds the tensor {}; allowed: all tensors of the model that {CONFIG} describes",
                    spec.name
                );
                return Err(FolderError::new(dir, reason));
            };
            if place.tensor.shape != spec.shape {
                let reason = format!(
                    "{}: shape is {:?}; allowed: {:?}, as {CONFIG} says",
                    spec.name, place.tensor.shape, spec.shape
                );
                return Err(FolderError::new(&folder.files[place.file].0, reason));
            }
            let range = offset..offset + spec.num_elements();
            offset = range.end;
            folder.parameters.push(Located { spec, range, place });
        }
        // Some writers keep the output matrix of tied embeddings.
        if folder.config.tied_embeddings
            && let Some(copy) = found.remove(names.output)
        {
            folder.check_tied(&copy, names.tokens, names.output)?;
        }
        if let Some((name, place)) = found.into_iter().next() {
            let reason = format!(
                "{name}: the model that {CONFIG} describes has no such tensor; allowed: only its own"
            );
            return Err(FolderError::new(&folder.files[place.file].0, reason));
        }
        Ok(folder)
    }

    /// The model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Number of parameters.
    pub fn num_elements(&self) -> usize {
        self.parameters.last().map_or(0, |last| last.range.end)
    }

    /// Number of files that hold tensors.
    pub fn num_files(&self) -> usize {
        self.files.len()
    }

    /// The type that holds every value of the folder: the tensors' own if all have the same, else float32.
    pub fn dtype(&self) -> TensorType {
        let mut types = self
            .parameters
            .iter()
            .map(|located| located.place.tensor.dtype);
        let first = types.next().unwrap_or_default();
        match types.all(|dtype| dtype == first) {
            true => first,
            false => TensorType::Float32,
        }
    }

    /// Appends elements of the flattened parameters, in canonical order.
    ///
    /// # Errors
    /// [`FolderError`] if a file cannot be read. Panics if the range is outside [`Self::num_elements`].
    pub fn read(&self, range: Range<usize>, values: &mut Vec<f32>) -> Result<(), FolderError> {
        assert!(range.end <= self.num_elements(), "{range:?}");
        let first = self
            .parameters
            .partition_point(|located| located.range.end <= range.start);
        for located in &self.parameters[first..] {
            let own = &located.range;
            let part = range.start.max(own.start)..range.end.min(own.end);
            if part.is_empty() {
                break;
            }
            let part = part.start - own.start..part.end - own.start;
            self.read_tensor(&located.place, part, values)?;
        }
        Ok(())
    }

    /// BLAKE3 of names, shapes and float32 values in canonical order, as hexadecimal digits: equal for the same weights, however they
    /// are spread over files and whatever type holds them.
    ///
    /// # Errors
    /// [`FolderError`] if a file cannot be read or a value is not finite.
    pub fn digest(&self) -> Result<String, FolderError> {
        let mut hasher = blake3::Hasher::new();
        let number = |value: usize, hasher: &mut blake3::Hasher| {
            hasher.update(&(value as u64).to_le_bytes());
        };
        let (mut values, mut bytes) = (Vec::new(), Vec::new());
        for located in &self.parameters {
            let spec = &located.spec;
            number(spec.name.len(), &mut hasher);
            hasher.update(spec.name.as_bytes());
            number(spec.shape.len(), &mut hasher);
            spec.shape
                .iter()
                .for_each(|&size| number(size, &mut hasher));
            for start in (0..located.range.len()).step_by(CHUNK_ELEMENTS) {
                values.clear();
                bytes.clear();
                let end = located.range.len().min(start + CHUNK_ELEMENTS);
                self.read_tensor(&located.place, start..end, &mut values)?;
                if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                    let reason = format!(
                        "{}: element {} is {}; allowed: finite numbers",
                        spec.name,
                        start + at,
                        values[at]
                    );
                    return Err(FolderError::new(&self.files[located.place.file].0, reason));
                }
                values
                    .iter()
                    .for_each(|value| bytes.extend(value.to_le_bytes()));
                hasher.update(&bytes);
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Opens the files of `dir` and gives their tensors by the names of the parameters that they are.
    fn tensors(&mut self, dir: &Path) -> Result<BTreeMap<String, Place>, FolderError> {
        let mut found = BTreeMap::new();
        let config = self.config.clone();
        let mut add = |file: usize, path: &Path, name: &str, tensor: Tensor| {
            let Role::Parameter(parameter) = role(&config, name) else {
                return Ok(());
            };
            match found.insert(parameter, Place { file, tensor }) {
                None => Ok(()),
                Some(_) => Err(FolderError::new(
                    path,
                    format!("{name}: is there twice; allowed: each tensor once"),
                )),
            }
        };
        if dir.join(SINGLE).exists() || !dir.join(INDEX).exists() {
            let (file, path, tensors) = self.open_file(dir, SINGLE)?;
            for (name, tensor) in tensors {
                add(file, &path, &name, tensor)?;
            }
            return Ok(found);
        }
        let index_file = dir.join(INDEX);
        let index = read_json(&index_file)?;
        let mut by_file: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        let weight_map = index["weight_map"].as_object();
        for (name, file) in weight_map.into_iter().flatten() {
            match file.as_str() {
                Some(file) if Path::new(file).file_name() == Some(file.as_ref()) => {
                    by_file.entry(file).or_default().push(name);
                }
                _ => {
                    let reason = format!(
                        "weight_map.{name}: is {file}; allowed: the name of a file beside it"
                    );
                    return Err(FolderError::new(&index_file, reason));
                }
            }
        }
        if by_file.is_empty() {
            let reason = "weight_map: names no tensor; allowed: the file of every tensor";
            return Err(FolderError::new(&index_file, reason));
        }
        for (file_name, names) in by_file {
            if !dir.join(file_name).exists() {
                let reason = format!(
                    "weight_map.{}: names {file_name}, which is not there; allowed: a file beside it",
                    names[0]
                );
                return Err(FolderError::new(&index_file, reason));
            }
            let (file, path, mut tensors) = self.open_file(dir, file_name)?;
            for name in names {
                let Some(tensor) = tensors.remove(name) else {
                    let reason = format!("has no tensor {name}; allowed: what {INDEX} says");
                    return Err(FolderError::new(&path, reason));
                };
                add(file, &path, name, tensor)?;
            }
            if let Some(name) = tensors.keys().next() {
                let reason = format!("{name}: {INDEX} does not name it; allowed: what it says");
                return Err(FolderError::new(&path, reason));
            }
        }
        Ok(found)
    }

    fn open_file(
        &mut self,
        dir: &Path,
        name: &str,
    ) -> Result<(usize, PathBuf, BTreeMap<String, Tensor>), FolderError> {
        let path = dir.join(name);
        let file = File::open(&path).map_err(|error| {
            let reason =
                format!("cannot be read: {error}; allowed: {SINGLE}, or {INDEX} and its files");
            FolderError::new(&path, reason)
        })?;
        let tensors = header::read(&file, &path)?;
        self.files.push((path.clone(), file));
        Ok((self.files.len() - 1, path, tensors))
    }

    /// Appends the elements `part` of a tensor.
    fn read_tensor(
        &self,
        place: &Place,
        part: Range<usize>,
        values: &mut Vec<f32>,
    ) -> Result<(), FolderError> {
        let (path, file) = &self.files[place.file];
        let (dtype, start) = (place.tensor.dtype, place.tensor.start);
        let mut bytes = vec![0; dtype.size() * part.len()];
        file.read_exact_at(&mut bytes, start + (dtype.size() * part.start) as u64)
            .map_err(|error| FolderError::new(path, format!("cannot be read: {error}")))?;
        dtype.decode(&bytes, values);
        Ok(())
    }

    /// Demands that the output matrix that stands in `copy` is the token embedding.
    fn check_tied(&self, copy: &Place, tokens: &str, output: &str) -> Result<(), FolderError> {
        let own = self
            .parameters
            .iter()
            .find(|located| located.spec.name == tokens)
            .expect("every model has token embeddings");
        let differ = || {
            let reason = format!(
                "{output}: differs from {tokens}; allowed: the same values, since {CONFIG} says tie_word_embeddings"
            );
            Err(FolderError::new(&self.files[copy.file].0, reason))
        };
        if copy.tensor.shape != own.spec.shape {
            return differ();
        }
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for start in (0..own.range.len()).step_by(CHUNK_ELEMENTS) {
            let part = start..own.range.len().min(start + CHUNK_ELEMENTS);
            ours.clear();
            theirs.clear();
            self.read_tensor(&own.place, part.clone(), &mut ours)?;
            self.read_tensor(copy, part, &mut theirs)?;
            if ours != theirs {
                return differ();
            }
        }
        Ok(())
    }
}

fn read_json(path: &Path) -> Result<Value, FolderError> {
    let bytes = fs::read(path)
        .map_err(|error| FolderError::new(path, format!("cannot be read: {error}")))?;
    match serde_json::from_slice(&bytes) {
        Ok(value @ Value::Object(_)) => Ok(value),
        Ok(_) => Err(FolderError::new(path, "is not a JSON object")),
        Err(error) => Err(FolderError::new(path, format!("is not JSON: {error}"))),
    }
}
