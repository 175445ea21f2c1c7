//! What can go wrong with logs, traces and the run's record files.

use std::io;
use std::path::{Path, PathBuf};

/// Why telemetry could not be set up or a record could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TelemetryError {
    /// A file could not be opened, read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb: `open`, `read`, `append to`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A file holds whole lines, none of which is what the file is for.
    #[error("{}: line {line} is not {expected}: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The line's number, from 1.
        line: usize,
        /// What the line should be.
        expected: &'static str,
        /// What the parser said.
        reason: String,
    },
    /// An environment variable has a value that is not allowed.
    #[error("{variable}={value:?} is not valid: {reason}")]
    Variable {
        /// The variable's name.
        variable: String,
        /// Its value.
        value: String,
        /// What is allowed, or what is wrong.
        reason: String,
    },
    /// Logging is set up once per process, and it has been.
    #[error("logging is set up already in this process")]
    AlreadySetUp,
    /// A thread or a runtime for the span exporter could not be started.
    #[error("cannot start the span exporter: {0}")]
    Exporter(String),
}

impl TelemetryError {
    /// Wraps an I/O error with the file and what was tried.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_path_buf(),
            source,
        }
    }
}
