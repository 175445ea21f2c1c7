//! Workers whose devices lied: one object for each, so that two leaders cannot overwrite what the other one knows.

use std::collections::BTreeMap;

use futures::{StreamExt as _, TryStreamExt as _};
use serde::{Deserialize, Serialize};

use crate::error::{ErrorKind, StoreError};
use crate::run_store::RunStore;
use crate::sealed;

/// Requests that are under way at once.
const CONCURRENT: usize = 16;

/// Why a worker is leased nothing, in any of its lives, until a person lifts it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quarantine {
    /// Index of the worker.
    pub worker: u32,
    /// Name of the process that it lived in.
    pub process: String,
    /// Node of that process.
    pub node: String,
    /// The step of the lie.
    pub step: u64,
    /// The slot, if the writer knew.
    pub slot: Option<u32>,
    /// The digest that it gave, if the writer knew.
    pub lied: Option<String>,
    /// The digest that the others agreed on, if they did.
    pub truth: Option<String>,
    /// When, RFC 3339.
    pub time: String,
}

fn key(worker: u32) -> String {
    format!("quarantine/worker-{worker}.json")
}

impl RunStore {
    /// Records a quarantine; a record of the same worker is replaced.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub async fn put_quarantine(&self, quarantine: &Quarantine) -> Result<(), StoreError> {
        let bytes = sealed::seal(quarantine).into();
        self.put(&key(quarantine.worker), bytes).await
    }

    /// The quarantined ones among workers `0..num_workers`. Each is asked for by its name, so that a list that is old hides nobody. A
    /// record that is damaged still says that there was one; it comes with its worker's index alone.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub async fn quarantines(
        &self,
        num_workers: u32,
    ) -> Result<BTreeMap<u32, Quarantine>, StoreError> {
        futures::stream::iter(0..num_workers)
            .map(|worker| async move {
                let found = match self.document::<Quarantine>(&key(worker)).await {
                    Err(error) if error.kind() == ErrorKind::Data => {
                        tracing::error!(worker, %error, "a quarantine's record is damaged; it counts");
                        Some(Quarantine {
                            worker,
                            ..Quarantine::default()
                        })
                    }
                    other => other?,
                };
                Ok(found.map(|quarantine| (worker, quarantine)))
            })
            .buffer_unordered(CONCURRENT)
            .try_filter_map(|found| async move { Ok(found) })
            .try_collect()
            .await
    }

    /// Lifts a worker's quarantine. One that is not there is lifted.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub async fn lift_quarantine(&self, worker: u32) -> Result<(), StoreError> {
        self.delete(&key(worker)).await
    }
}
