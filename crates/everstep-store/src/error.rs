//! What can go wrong with a store, and what a caller can do about it.

use std::fmt;

use crate::diagnosis::diagnosis;
use crate::digest::Digest;
use crate::identity::Difference;

/// What a caller should do with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The store did not answer properly; the same call may succeed later.
    Retry,
    /// Somebody else has decided already; ask again who leads.
    Fenced,
    /// The request or the configuration is wrong; repeating it is useless.
    Invalid,
    /// Stored bytes are missing or damaged; use another checkpoint.
    Data,
}

/// An error of [`RunStore`](crate::RunStore).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The URL's scheme is none that this build knows.
    #[error(
        "store url `{url}`: scheme `{scheme}` is unknown, allowed are {}",
        crate::backend::FORMS
    )]
    UnknownScheme {
        /// The URL as given.
        url: String,
        /// Its scheme.
        scheme: String,
    },
    /// The URL is malformed, or the environment lacks what it needs.
    #[error("store url `{url}`: {reason}")]
    BadUrl {
        /// The URL as given.
        url: String,
        /// What is wrong and what is allowed.
        reason: String,
    },
    /// A name that becomes part of a key holds something unsafe.
    #[error("{what} `{name}`: allowed are 1 to 64 of a-z 0-9 - _ . and a letter or digit first")]
    BadName {
        /// Which name: `run name`, `writer name`.
        what: &'static str,
        /// The name as given.
        name: String,
    },
    /// The store cannot be written to.
    #[error("store `{url}` refuses writes: {reason}")]
    NotWritable {
        /// The store's URL.
        url: String,
        /// Why, one line.
        reason: String,
    },
    /// The store failed to do what was asked, after all retries.
    #[error("{operation} `{key}`: {}", diagnosis(source))]
    Io {
        /// The verb: `read`, `write`, `list`, `delete`.
        operation: &'static str,
        /// The key inside the run.
        key: String,
        /// The store's own error.
        source: Box<object_store::Error>,
    },
    /// There is no `manifest.json`: the run was never created.
    #[error("run `{run}` does not exist in store `{url}`")]
    NoRun {
        /// The store's URL.
        url: String,
        /// The run's name.
        run: String,
    },
    /// The store holds another run under this name.
    #[error("run `{run}` exists with another identity: {}", list(differences))]
    RunMismatch {
        /// The run's name.
        run: String,
        /// The fields that differ.
        differences: Vec<Difference>,
    },
    /// A run is to be copied under another name.
    #[error(
        "run `{from}` cannot be copied to run `{to}`: a run keeps its name, so the destination must end with `{from}`"
    )]
    OtherName {
        /// The run that was to be copied.
        from: String,
        /// The name at the destination.
        to: String,
    },
    /// The checkpoint belongs to another run or layout.
    #[error(
        "checkpoint {step} belongs to another run: {field} is {found}, this run has {expected}"
    )]
    ForeignCheckpoint {
        /// The checkpoint's step.
        step: u64,
        /// `run_digest` or `layout`.
        field: &'static str,
        /// This run's value.
        expected: Digest,
        /// The checkpoint's value.
        found: Digest,
    },
    /// No checkpoint is committed at this step.
    #[error("step {step} has no committed checkpoint")]
    NoCheckpoint {
        /// The step asked for.
        step: u64,
    },
    /// The checkpoint has no such block.
    #[error("checkpoint {step} has no block {block}, it has blocks 0 to {}", num_blocks.saturating_sub(1))]
    UnknownBlock {
        /// The checkpoint's step.
        step: u64,
        /// The block asked for.
        block: u32,
        /// How many blocks the checkpoint has.
        num_blocks: u32,
    },
    /// A committed checkpoint is damaged.
    #[error("{0}")]
    Damaged(Box<Damage>),
    /// The blocks or objects handed in do not make a checkpoint.
    #[error("checkpoint {step}: {reason}")]
    InvalidCheckpoint {
        /// The step it was for.
        step: u64,
        /// What is wrong.
        reason: String,
    },
    /// The step is committed already, with other bits.
    #[error(
        "checkpoint {step} is committed already with other contents ({field} {found}, now {expected})"
    )]
    CommitConflict {
        /// The step.
        step: u64,
        /// Which digest differs: `parameters`, `optimizer`, `run_digest` or `layout`.
        field: &'static str,
        /// What this commit would have written.
        expected: Digest,
        /// What is there.
        found: Digest,
    },
    /// A small document (run manifest, lease) cannot be read.
    #[error("`{key}`: {reason}")]
    Document {
        /// The key inside the run.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A document (run manifest, checkpoint manifest, lease) was written by a newer program.
    #[error(
        "`{key}` has version {version}, this program reads up to version {known}: use the everstep that wrote it, or a newer one"
    )]
    NewerVersion {
        /// The key inside the run.
        key: String,
        /// Its version.
        version: u32,
        /// The newest version that this program reads.
        known: u32,
    },
    /// The store cannot decide elections.
    #[error(
        "election = \"store\" is refused: {reason}; use election = \"static\" or another store"
    )]
    ElectionUnsupported {
        /// What the probe saw.
        reason: String,
    },
}

impl StoreError {
    /// What to do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { source, .. } => match **source {
                // Credentials expire and are renewed, rights are taken and given back: a run outlives that.
                object_store::Error::Generic { .. }
                | object_store::Error::JoinError { .. }
                | object_store::Error::PermissionDenied { .. }
                | object_store::Error::Unauthenticated { .. } => ErrorKind::Retry,
                object_store::Error::NotFound { .. } => ErrorKind::Data,
                object_store::Error::AlreadyExists { .. }
                | object_store::Error::Precondition { .. } => ErrorKind::Fenced,
                _ => ErrorKind::Invalid,
            },
            Self::CommitConflict { .. } => ErrorKind::Fenced,
            Self::Damaged(_) | Self::Document { .. } => ErrorKind::Data,
            _ => ErrorKind::Invalid,
        }
    }
}

impl StoreError {
    /// Whether the store as such is away or refuses us, so that the same call may succeed later.
    pub fn is_outage(&self) -> bool {
        self.kind() == ErrorKind::Retry
            || matches!(self, Self::NotWritable { .. } | Self::NoRun { .. })
    }
}

impl From<Damage> for StoreError {
    fn from(damage: Damage) -> Self {
        Self::Damaged(Box::new(damage))
    }
}

/// One damaged object of a committed checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("checkpoint {step} is damaged: `{object}` {reason}")]
pub struct Damage {
    /// The checkpoint's step.
    pub step: u64,
    /// The object's key inside the run.
    pub object: String,
    /// How it is damaged.
    pub reason: DamageReason,
}

/// How an object is damaged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DamageReason {
    /// It is not in the store.
    #[error("is missing")]
    Missing,
    /// It was written for an older checkpoint, which has been removed, and so is being removed itself.
    #[error("is of an older checkpoint that has been removed")]
    Removed,
    /// Its size is not what the manifest says.
    #[error("has {found} bytes, the manifest says {expected}")]
    Size {
        /// Bytes, by the manifest.
        expected: u64,
        /// Bytes, by the store.
        found: u64,
    },
    /// Its contents are not what the manifest says.
    #[error(
        "has BLAKE3 {found}, the manifest says {expected}{}",
        damaged_blocks(blocks)
    )]
    Digest {
        /// By the manifest.
        expected: Digest,
        /// Of the bytes that are there.
        found: Digest,
        /// The blocks whose own digests do not agree either, if they were looked at.
        blocks: Vec<u32>,
    },
    /// One block inside it is not what the manifest says.
    #[error("holds block {block} with {part} digest {found}, the manifest says {expected}")]
    Block {
        /// The block.
        block: u32,
        /// `parameters` or `optimizer`.
        part: &'static str,
        /// By the manifest.
        expected: Digest,
        /// Of the bytes that are there.
        found: Digest,
    },
    /// It was marked as damaged before; see [`RunStore::quarantine_checkpoint`](crate::RunStore::quarantine_checkpoint).
    #[error("is quarantined: {0}")]
    Quarantined(String),
    /// The manifest itself cannot be used.
    #[error("cannot be used: {0}")]
    Manifest(String),
}

fn damaged_blocks(blocks: &[u32]) -> String {
    match blocks {
        [] => String::new(),
        [block] => format!(" (block {block} is damaged)"),
        [block, rest @ ..] => {
            format!(" (block {block} and {} more are damaged)", rest.len())
        }
    }
}

fn list(differences: &[Difference]) -> String {
    differences
        .iter()
        .map(Difference::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

/// An error with its causes in one line: HTTP errors quote whole XML answers, which would hide what matters.
pub(crate) fn one_line(error: &(dyn std::error::Error + 'static)) -> String {
    const CHARS_MAX: usize = 400;
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match words.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("{}…", &words[..end]),
        None => words,
    }
}

/// Wraps the store's error for [`Result::map_err`].
pub(crate) fn io(
    operation: &'static str,
    key: impl fmt::Display,
) -> impl FnOnce(object_store::Error) -> StoreError {
    move |source| StoreError::Io {
        operation,
        key: key.to_string(),
        source: Box::new(source),
    }
}
