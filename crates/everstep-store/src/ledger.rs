//! The ledger: what one process must not forget, in a small local database.
//!
//! ```text
//! <dir>/lock         held while the ledger is open
//! <dir>/db/          sled; every value is `version (1 byte) ‖ BLAKE3(key ‖ payload), 16 bytes ‖ payload (JSON)`
//! <dir>/generation   how many writes sled has acknowledged, written after each of them
//! ```
//!
//! sled takes a cut-off log for a crash and quietly opens at an older state, and its own check sums do not cover what
//! it considers torn. Here an older state could make two incarnations share a number. So every write also counts
//! `generation` in sled and, once sled is flushed, in a file beside it: a database that is behind that file has lost
//! something that was relied on, and is refused. sled also panics on some damage; that is caught here.

mod database;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::one_line;
use crate::identity::{Difference, RunIdentity};
use database::Database;

const RUN: &str = "run";
const INCARNATION: &str = "incarnation";
const EPOCH: &str = "epoch";
const LAST_COMMIT: &str = "last-commit";
const RESTARTS: &str = "restarts/";

/// An error of [`Ledger`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// Another process (or another ledger in this one) has it open.
    #[error("ledger `{}` is in use by process {holder}; every process needs a folder of its own", dir.display())]
    InUse {
        /// The ledger's folder.
        dir: PathBuf,
        /// The process that holds it, or `?`.
        holder: String,
    },
    /// Its contents cannot be trusted.
    #[error("ledger `{}` is damaged: {reason}; delete the folder to let the process join as a new one", dir.display())]
    Corrupt {
        /// The ledger's folder.
        dir: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// It belongs to another run.
    #[error("ledger `{}` belongs to another run: {}", dir.display(),
        differences.iter().map(Difference::to_string).collect::<Vec<_>>().join(", "))]
    RunMismatch {
        /// The ledger's folder.
        dir: PathBuf,
        /// The fields that differ.
        differences: Vec<Difference>,
    },
    /// A commit below one that is recorded, without a rollback.
    #[error("ledger `{}`: step {step} cannot be committed after step {last}", dir.display())]
    Regressed {
        /// The ledger's folder.
        dir: PathBuf,
        /// The step that was to be recorded.
        step: u64,
        /// The step that is recorded.
        last: u64,
    },
    /// The file system failed.
    #[error("ledger `{}`: {}", dir.display(), one_line(source))]
    Io {
        /// The ledger's folder.
        dir: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
}

/// The last checkpoint that this process knows to be committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LastCommit {
    /// Its step.
    pub step: u64,
    /// [`CheckpointManifest::manifest_digest`](crate::CheckpointManifest::manifest_digest).
    pub manifest: Digest,
}

/// What one process must not forget: the run, how often it started, epochs, restart counts, the last commit.
///
/// Everything that a method returns or records is on disk before it returns. Calls block for some milliseconds.
#[derive(Debug)]
pub struct Ledger {
    database: Database,
}

impl Ledger {
    /// Opens the ledger in `dir`, which is created if absent.
    ///
    /// # Errors
    /// [`LedgerError::InUse`], [`LedgerError::Corrupt`], [`LedgerError::Io`].
    pub fn open(dir: &Path) -> Result<Self, LedgerError> {
        let ledger = Self {
            database: Database::open(dir)?,
        };
        // Damage should show up now and not in the middle of a run.
        ledger.run()?;
        ledger.incarnation()?;
        ledger.epoch()?;
        ledger.last_commit()?;
        ledger.restarts()?;
        Ok(ledger)
    }

    /// The ledger's folder.
    pub fn dir(&self) -> &Path {
        self.database.dir()
    }

    /// Ties the ledger to a run, once and for all.
    ///
    /// # Errors
    /// [`LedgerError::RunMismatch`] if it is tied to another one.
    pub fn bind_run(&self, identity: &RunIdentity) -> Result<(), LedgerError> {
        self.database.update(RUN, |bound: Option<RunIdentity>| {
            let differences = bound
                .map(|bound| identity.differences(&bound))
                .unwrap_or_default();
            if differences.is_empty() {
                return Ok(identity.clone());
            }
            Err(LedgerError::RunMismatch {
                dir: self.dir().to_owned(),
                differences,
            })
        })?;
        Ok(())
    }

    /// The run that the ledger is tied to.
    ///
    /// # Errors
    /// [`LedgerError::Corrupt`].
    pub fn run(&self) -> Result<Option<RunIdentity>, LedgerError> {
        self.database.read(RUN)
    }

    /// Counts a start of this process: 1, 2, 3, …; no number is ever returned twice.
    ///
    /// # Errors
    /// [`LedgerError::Io`], [`LedgerError::Corrupt`].
    pub fn next_incarnation(&self) -> Result<u64, LedgerError> {
        self.database.update(INCARNATION, |last: Option<u64>| {
            Ok(last.unwrap_or(0).saturating_add(1))
        })
    }

    /// As [`Ledger::next_incarnation`], and above `known`: for a process whose earlier ledger is lost.
    ///
    /// # Errors
    /// As [`Ledger::next_incarnation`].
    pub fn next_incarnation_above(&self, known: u64) -> Result<u64, LedgerError> {
        self.database.update(INCARNATION, |last: Option<u64>| {
            Ok(last.unwrap_or(0).max(known).saturating_add(1))
        })
    }

    /// The last incarnation that was handed out; 0 if none was.
    ///
    /// # Errors
    /// [`LedgerError::Corrupt`].
    pub fn incarnation(&self) -> Result<u64, LedgerError> {
        Ok(self.database.read(INCARNATION)?.unwrap_or(0))
    }

    /// Notes an epoch and returns the highest one ever noted: messages of lower ones must be refused.
    ///
    /// # Errors
    /// [`LedgerError::Io`], [`LedgerError::Corrupt`].
    pub fn see_epoch(&self, epoch: u64) -> Result<u64, LedgerError> {
        let seen = self.epoch()?;
        if seen >= epoch {
            return Ok(seen);
        }
        self.database
            .update(EPOCH, |seen: Option<u64>| Ok(seen.unwrap_or(0).max(epoch)))
    }

    /// The highest epoch ever noted; 0 if none was.
    ///
    /// # Errors
    /// [`LedgerError::Corrupt`].
    pub fn epoch(&self) -> Result<u64, LedgerError> {
        Ok(self.database.read(EPOCH)?.unwrap_or(0))
    }

    /// Counts a restart of `child` (a process or an actor) and returns how often it was restarted.
    ///
    /// # Errors
    /// [`LedgerError::Io`], [`LedgerError::Corrupt`].
    pub fn count_restart(&self, child: &str) -> Result<u64, LedgerError> {
        let key = format!("{RESTARTS}{child}");
        self.database.update(&key, |count: Option<u64>| {
            Ok(count.unwrap_or(0).saturating_add(1))
        })
    }

    /// How often each child was restarted.
    ///
    /// # Errors
    /// [`LedgerError::Corrupt`].
    pub fn restarts(&self) -> Result<BTreeMap<String, u64>, LedgerError> {
        self.database.read_all(RESTARTS)
    }

    /// Records a committed checkpoint. Recording the same step again is allowed.
    ///
    /// # Errors
    /// [`LedgerError::Regressed`] for a step below the recorded one.
    pub fn record_commit(&self, step: u64, manifest: Digest) -> Result<(), LedgerError> {
        self.database
            .update(LAST_COMMIT, |last: Option<LastCommit>| match last {
                Some(last) if last.step > step => Err(LedgerError::Regressed {
                    dir: self.dir().to_owned(),
                    step,
                    last: last.step,
                }),
                _ => Ok(LastCommit { step, manifest }),
            })?;
        Ok(())
    }

    /// Records a declared rollback to a committed checkpoint, which may be below the recorded one.
    ///
    /// # Errors
    /// [`LedgerError::Io`], [`LedgerError::Corrupt`].
    pub fn record_rollback(&self, step: u64, manifest: Digest) -> Result<(), LedgerError> {
        self.database
            .update(LAST_COMMIT, |_| Ok(LastCommit { step, manifest }))?;
        Ok(())
    }

    /// The last recorded checkpoint.
    ///
    /// # Errors
    /// [`LedgerError::Corrupt`].
    pub fn last_commit(&self) -> Result<Option<LastCommit>, LedgerError> {
        self.database.read(LAST_COMMIT)
    }
}
