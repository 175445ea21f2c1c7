//! The header of a safetensors file: a length, then JSON that says where each tensor lies.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::{FolderError, TensorType};

/// Longest header that is read, as the reference implementation has it.
const HEADER_BYTES_MAX: u64 = 100_000_000;
const LENGTH_BYTES: u64 = 8;

/// Where a tensor lies in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tensor {
    pub(super) dtype: TensorType,
    pub(super) shape: Vec<usize>,
    /// First byte, from the start of the file.
    pub(super) start: u64,
}

/// The header, length included, of a file that holds `tensors`, in this order, without gaps.
pub(super) fn write<'a>(
    tensors: impl IntoIterator<Item = (&'a str, &'a [usize])>,
    dtype: TensorType,
) -> Vec<u8> {
    let mut entries = Map::new();
    entries.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut end = 0;
    for (name, shape) in tensors {
        let start = end;
        end += dtype.size() * shape.iter().product::<usize>();
        let entry = json!({"dtype": dtype.code(), "shape": shape, "data_offsets": [start, end]});
        entries.insert(name.to_owned(), entry);
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    // Readers map the file and want the data aligned.
    text.resize(text.len().next_multiple_of(LENGTH_BYTES as usize), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    header
}

/// The tensors of `file`, whose path is `path`. Every byte of it belongs to the header or to one tensor.
pub(super) fn read(file: &File, path: &Path) -> Result<BTreeMap<String, Tensor>, FolderError> {
    let wrong = |reason: String| FolderError::new(path, reason);
    let unreadable = |error: std::io::Error| wrong(format!("cannot be read: {error}"));
    let file_bytes = file.metadata().map_err(unreadable)?.len();
    if file_bytes < LENGTH_BYTES {
        return Err(wrong(format!(
            "holds {file_bytes} bytes; allowed: a whole safetensors file"
        )));
    }
    let mut length = [0; LENGTH_BYTES as usize];
    file.read_exact_at(&mut length, 0).map_err(unreadable)?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_BYTES_MAX || length > file_bytes - LENGTH_BYTES {
        return Err(wrong(format!(
            "holds {file_bytes} bytes, but says that its header alone takes {length}; allowed: a whole safetensors file"
        )));
    }
    let mut text = vec![0; length as usize];
    file.read_exact_at(&mut text, LENGTH_BYTES)
        .map_err(unreadable)?;
    let entries: Map<String, Value> = serde_json::from_slice(&text)
        .map_err(|error| wrong(format!("its header is not a JSON object: {error}")))?;

    let data_start = LENGTH_BYTES + length;
    let mut tensors = BTreeMap::new();
    let mut ranges = Vec::new();
    for (name, entry) in &entries {
        if name == "__metadata__" {
            continue;
        }
        let (tensor, range) =
            tensor(entry, data_start).map_err(|reason| wrong(format!("{name}: {reason}")))?;
        ranges.push(range);
        tensors.insert(name.clone(), tensor);
    }
    ranges.sort_unstable();
    let mut end = 0;
    for &(start, stop) in &ranges {
        if start != end {
            return Err(wrong(format!(
                "a tensor starts at byte {start} of the data and the one before it ends at {end}; allowed: no gap and no overlap"
            )));
        }
        end = stop;
    }
    if data_start.checked_add(end) != Some(file_bytes) {
        return Err(wrong(format!(
            "holds {file_bytes} bytes, but its header speaks of {}; allowed: the whole file",
            data_start.saturating_add(end)
        )));
    }
    Ok(tensors)
}

/// One entry of a header, and the range of its bytes in the data.
fn tensor(entry: &Value, data_start: u64) -> Result<(Tensor, (u64, u64)), String> {
    let code = entry["dtype"].as_str().unwrap_or_default();
    let dtype = TensorType::from_code(code)
        .ok_or_else(|| format!("dtype is `{code}`; allowed: F32, BF16, F16"))?;
    let numbers = |field: &str| -> Option<Vec<u64>> {
        entry[field].as_array()?.iter().map(Value::as_u64).collect()
    };
    let shape = numbers("shape").ok_or("shape is not a list of whole numbers")?;
    let range = match numbers("data_offsets").as_deref() {
        Some(&[start, stop]) => (start, stop),
        _ => return Err("data_offsets is not a list of two whole numbers".into()),
    };
    let bytes = shape
        .iter()
        .try_fold(dtype.size() as u64, |bytes, &size| bytes.checked_mul(size));
    let start = data_start.checked_add(range.0);
    let (Some(bytes), Some(start)) = (bytes, start) else {
        return Err(format!("shape is {shape:?}; allowed: fewer elements"));
    };
    if range.1.checked_sub(range.0) != Some(bytes) {
        return Err(format!(
            "data_offsets are {} and {}; allowed: {bytes} bytes, as its shape {shape:?} and {code} say",
            range.0, range.1
        ));
    }
    let shape = shape.into_iter().map(|size| size as usize).collect();
    Ok((
        Tensor {
            dtype,
            shape,
            start,
        },
        range,
    ))
}
