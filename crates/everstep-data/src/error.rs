//! What can go wrong between a text file and a batch.

use std::io;
use std::path::{Path, PathBuf};

/// What the caller should do about a [`DataError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The configuration or a source file is wrong; a person has to change it.
    Invalid,
    /// A prepared dataset is damaged; preparing it again helps.
    Damaged,
    /// The operating system refused; the message says what and where.
    Io,
}

/// An error of this crate, in one line that names the field or the file and what is allowed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A field of the configuration has a value that is not allowed.
    #[error("{field}: {reason}")]
    Config {
        /// Dotted path of the field, such as `data.tokenizer.vocab_size`.
        field: &'static str,
        /// What is wrong and what is allowed.
        reason: String,
    },
    /// A path, glob or folder of the configuration names no file.
    #[error("{field}: no file matches `{pattern}` (looked in `{}`)", base.display())]
    NoMatch {
        /// Dotted path of the field.
        field: &'static str,
        /// The entry as it was written.
        pattern: String,
        /// The folder that relative entries start from.
        base: PathBuf,
    },
    /// The matched files hold no text.
    #[error("{field}: the {files} files that `{patterns}` matches hold no text")]
    EmptyCorpus {
        /// Dotted path of the field.
        field: &'static str,
        /// The entries as they were written, separated by spaces.
        patterns: String,
        /// How many files were read.
        files: usize,
    },
    /// The corpus has fewer tokens than one window needs.
    #[error(
        "data.context: a window of {context} tokens needs {} tokens, but the training text has only {tokens}; \
         allowed here: 1 to {}", context + 1, tokens.saturating_sub(1)
    )]
    TooShort {
        /// Tokens of the training split.
        tokens: u64,
        /// The window's length.
        context: u64,
    },
    /// A source file is not what its extension promises.
    #[error("`{}`{}: {reason}", file.display(), line.map(|line| format!(":{line}")).unwrap_or_default())]
    BadSource {
        /// The source file.
        file: PathBuf,
        /// The line, counted from 1, where one can be named.
        line: Option<usize>,
        /// What is wrong and what is allowed.
        reason: String,
    },
    /// A text holds something that the tokenizer cannot encode, or a token that it does not know was decoded.
    #[error("tokenizer: {reason}")]
    Tokenizer {
        /// What is wrong.
        reason: String,
    },
    /// A file of a prepared dataset is damaged or belongs to another version.
    #[error("`{}`: {reason}", file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What was found and what was expected.
        reason: String,
    },
    /// The operating system refused to read or write.
    #[error("cannot {action} `{}`: {source}", file.display())]
    Io {
        /// What was tried: `read`, `write`, `create`, …
        action: &'static str,
        /// The file or folder.
        file: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

impl DataError {
    /// What the caller should do.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Damaged { .. } => ErrorKind::Damaged,
            Self::Io { .. } => ErrorKind::Io,
            _ => ErrorKind::Invalid,
        }
    }

    pub(crate) fn config(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Config {
            field,
            reason: reason.into(),
        }
    }

    pub(crate) fn damaged(file: &Path, reason: impl Into<String>) -> Self {
        Self::Damaged {
            file: file.to_owned(),
            reason: reason.into(),
        }
    }

    pub(crate) fn tokenizer(reason: impl ToString) -> Self {
        Self::Tokenizer {
            reason: reason.to_string(),
        }
    }
}

/// Adds the action and the file to an I/O error.
pub(crate) trait IoContext<T> {
    fn at(self, action: &'static str, file: &Path) -> Result<T, DataError>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn at(self, action: &'static str, file: &Path) -> Result<T, DataError> {
        self.map_err(|source| DataError::Io {
            action,
            file: file.to_owned(),
            source,
        })
    }
}
