//! A folder that appears as a whole or not at all.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::error::{DataError, IoContext};
use crate::manifest::MANIFEST_FILE;

/// Refuses a folder that is something else than a dataset: preparing replaces what is there.
pub(crate) fn check_target(out: &Path) -> Result<(), DataError> {
    let foreign = match std::fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_some() && !out.join(MANIFEST_FILE).is_file(),
        Err(_) => out.exists(),
    };
    match foreign {
        true => Err(DataError::damaged(
            out,
            "is in the way; allowed: a new or empty folder or an earlier dataset",
        )),
        false => Ok(()),
    }
}

/// Keeps a second process from preparing the same folder at the same time.
pub(crate) fn lock(out: &Path) -> Result<File, DataError> {
    let parent = parent(out);
    std::fs::create_dir_all(&parent).at("create", &parent)?;
    let folder = File::open(&parent).at("open", &parent)?;
    if let Err(error) = folder.lock() {
        // Some network file systems cannot lock a folder; the rename at the end still keeps datasets whole.
        tracing::debug!(%error, folder = %parent.display(), "no lock on the dataset's parent folder");
    }
    Ok(folder)
}

fn parent(out: &Path) -> PathBuf {
    match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Writes a file and waits until the disk has it.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), DataError> {
    std::fs::write(path, bytes).at("write", path)?;
    File::open(path)
        .and_then(|file| file.sync_all())
        .at("write", path)
}

/// A folder that is being written; it disappears unless it is committed.
pub(crate) struct Partial {
    path: PathBuf,
    old: PathBuf,
}

impl Partial {
    /// Makes the folder, beside `out`.
    pub(crate) fn create(out: &Path) -> Result<Self, DataError> {
        let name = out
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let beside = |suffix: &str| parent(out).join(format!(".{name}.{suffix}"));
        let partial = Self {
            path: beside("partial"),
            old: beside("old"),
        };
        // What a killed process left; the lock says that nobody is writing it.
        partial.clear();
        std::fs::create_dir(&partial.path).at("create", &partial.path)?;
        Ok(partial)
    }

    /// Where to write.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Moves the folder to `out`; what was there goes.
    pub(crate) fn commit(self, out: &Path) -> Result<(), DataError> {
        File::open(&self.path)
            .and_then(|dir| dir.sync_all())
            .at("write", &self.path)?;
        if out.exists() {
            std::fs::rename(out, &self.old).at("replace", out)?;
        }
        std::fs::rename(&self.path, out).at("create", out)?;
        let parent = parent(out);
        File::open(&parent)
            .and_then(|dir| dir.sync_all())
            .at("write", &parent)
    }

    fn clear(&self) {
        // Nothing to remove is the usual case, and what cannot be removed is reported when it is created again.
        let _ = std::fs::remove_dir_all(&self.path);
        let _ = std::fs::remove_dir_all(&self.old);
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        self.clear();
    }
}
