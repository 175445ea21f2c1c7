//! Reading the files that a run appends to, while it does.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

/// A file of JSON lines that somebody else is writing.
#[derive(Debug)]
pub(crate) struct JsonLines {
    path: PathBuf,
    offset: u64,
}

impl JsonLines {
    /// Starts at the beginning; the file need not exist yet.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, offset: 0 }
    }

    /// All of a file.
    pub(crate) fn read(path: &Path) -> Result<Vec<Value>> {
        Self::new(path.to_path_buf()).fresh()
    }

    /// The whole lines that were added since the last call. A line that is still being written is left for the next.
    pub(crate) fn fresh(&mut self) -> Result<Vec<Value>> {
        let Ok(mut file) = File::open(&self.path) else {
            return Ok(Vec::new());
        };
        let mut text = Vec::new();
        file.seek(SeekFrom::Start(self.offset))
            .and_then(|_| file.read_to_end(&mut text))
            .with_context(|| format!("cannot read {}", self.path.display()))?;
        let Some(end) = text.iter().rposition(|byte| *byte == b'\n') else {
            return Ok(Vec::new());
        };
        self.offset += end as u64 + 1;
        text[..end]
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| {
                serde_json::from_slice(line).with_context(|| {
                    format!(
                        "{}: `{}` is no JSON",
                        self.path.display(),
                        String::from_utf8_lossy(line)
                    )
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_lines_are_returned_once() {
        let path = std::env::temp_dir().join(format!("xtask-follow-{}.jsonl", std::process::id()));
        std::fs::remove_file(&path).ok();
        let mut lines = JsonLines::new(path.clone());
        assert!(lines.fresh().unwrap().is_empty());
        std::fs::write(&path, "{\"step\":1}\n{\"st").unwrap();
        assert_eq!(lines.fresh().unwrap(), [serde_json::json!({"step": 1})]);
        assert!(lines.fresh().unwrap().is_empty());
        std::fs::write(&path, "{\"step\":1}\n{\"step\":2}\n").unwrap();
        assert_eq!(lines.fresh().unwrap(), [serde_json::json!({"step": 2})]);
        std::fs::remove_file(&path).unwrap();
    }
}
