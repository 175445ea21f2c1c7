//! Object store layout, manifests, checkpoints, leadership leases and the local ledger.
//!
//! ```text
//! <store>/<run>/run.toml                            the run file, as it was given
//! <store>/<run>/manifest.json                       RunIdentity: what the run is
//! <store>/<run>/leases/<epoch>                      leadership, create-if-absent, never deleted
//! <store>/<run>/quarantine/worker-<index>.json      a worker whose device lied, until a person lifts it
//! <store>/<run>/damaged/<step>.json                 a committed checkpoint that is damaged: nobody reads it
//! <store>/<run>/pins/<step>.json                    a checkpoint that pruning leaves alone
//! <store>/<run>/checkpoints/<step>/blocks-*.st      safetensors: parameters and optimizer state of some blocks; later checkpoints may name it
//! <store>/<run>/checkpoints/<step>/MANIFEST.json    CheckpointManifest; its creation is the commit
//! ```
//!
//! [`RunStore`] reads and writes this layout in a folder (`file://`) or a bucket (`s3://`). [`Ledger`] is the small
//! local database of one process.
//!
//! **Invariant:** a step without `MANIFEST.json` is no checkpoint; a manifest is only created after every object that
//! it names is in the store. Objects are named by their content, so a late writer cannot change a committed one, and are removed
//! when no manifest names them any more.
//!
//! **Invariant:** every byte that is loaded has been compared with a digest.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod backend;
mod block;
mod check;
mod checkpoint;
mod copy;
mod damaged;
mod diagnosis;
mod diff;
mod digest;
mod direct;
mod error;
mod identity;
mod lease;
mod ledger;
mod listing;
mod local;
mod manifest;
mod near;
mod object_file;
mod pins;
mod probe;
mod prune;
mod quarantine;
mod read;
mod retention;
mod run_store;
mod sealed;
mod share;
mod upload;
mod verify;

pub use block::{BlockSource, BlockState, Part};
pub use checkpoint::Commit;
pub use copy::{CopyProgress, CopyReport};
pub use damaged::{DamagedCheckpoint, DamagedObject};
pub use diff::{BlockDifference, CheckpointDiff, ValueDifference};
pub use digest::{Digest, ParseDigestError, combine, optimizer_digest, param_digest};
pub use error::{Damage, DamageReason, ErrorKind, StoreError};
pub use identity::{Difference, RunIdentity};
pub use lease::Lease;
pub use ledger::{LastCommit, Ledger, LedgerError};
pub use listing::CheckpointInfo;
pub use manifest::{
    BlockEntry, CheckpointDigest, CheckpointManifest, CheckpointObject, EVALUATION_LOSS,
};
pub use object_file::{FileBlock, ObjectFile, ObjectFileWriter};
pub use probe::ProbeReport;
pub use prune::{PrunePlan, PruneReport, Removal};
pub use quarantine::Quarantine;
pub use read::{LatestIntact, Loaded};
pub use retention::{KeepReason, Retention, RetentionInfo};
pub use run_store::{PutRun, RunStore};
pub use verify::ScrubReport;
