//! Pinned checkpoints: `pins/<step>.json` keeps a checkpoint from being pruned, however old it gets.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::error::StoreError;
use crate::manifest::manifest_key;
use crate::run_store::RunStore;
use crate::sealed;

const FOLDER: &str = "pins";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pin {
    step: u64,
}

fn key(step: u64) -> String {
    format!("{FOLDER}/{step}.json")
}

impl RunStore {
    /// Keeps the checkpoint of `step` until it is unpinned. Pinning twice is harmless.
    ///
    /// # Errors
    /// [`StoreError::NoCheckpoint`] if the step is not committed; [`StoreError::Io`].
    pub async fn pin(&self, step: u64) -> Result<(), StoreError> {
        if self.get(&manifest_key(step)).await?.is_none() {
            return Err(StoreError::NoCheckpoint { step });
        }
        self.put(&key(step), sealed::seal(&Pin { step }).into())
            .await
    }

    /// Lets pruning take the checkpoint of `step` when its time has come. One that is not pinned is unpinned.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub async fn unpin(&self, step: u64) -> Result<(), StoreError> {
        self.delete(&key(step)).await
    }

    /// The pinned steps, by the names of the pins: a pin whose contents are damaged holds all the same.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub async fn pinned_steps(&self) -> Result<BTreeSet<u64>, StoreError> {
        self.listed_numbers(FOLDER).await
    }
}
