//! What can be wrong with a run file.

use std::io;
use std::path::{Path, PathBuf};

/// A mistake in a run file or in an override: one line that names the file, the field and what is allowed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunFileError {
    /// The file cannot be read.
    #[error("{}: cannot be read: {source}", file.display())]
    Read {
        /// The run file.
        file: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The file is not TOML.
    #[error("{}:{line}:{column}: {reason}", file.display())]
    Syntax {
        /// The run file.
        file: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What the parser says.
        reason: String,
    },
    /// A field is unknown, missing or holds what it may not.
    #[error("{}: {field}: {reason}", file.display())]
    Field {
        /// The run file.
        file: PathBuf,
        /// Dotted path of the field.
        field: String,
        /// What is wrong and what is allowed.
        reason: String,
    },
    /// An override cannot be understood.
    #[error("--set {given}: {reason}")]
    Override {
        /// The override as it was given.
        given: String,
        /// What is wrong and what is allowed.
        reason: String,
    },
}

impl RunFileError {
    pub(crate) fn field(file: &Path, field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Field {
            file: file.to_owned(),
            field: field.into(),
            reason: reason.into(),
        }
    }
}
