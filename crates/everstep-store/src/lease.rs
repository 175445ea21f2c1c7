//! Leadership: who creates `leases/<epoch>` leads in that epoch.

use futures::TryStreamExt;
use object_store::path::Path;
use serde::{Deserialize, Serialize};

use crate::error::{StoreError, io};
use crate::run_store::RunStore;
use crate::sealed;

const FOLDER: &str = "leases";

/// Who took an epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lease {
    /// The epoch.
    pub epoch: u64,
    /// Who leads in it.
    pub owner: String,
}

impl RunStore {
    /// Tries to become the leader of `epoch`; true if `owner` now has it.
    ///
    /// A candidate takes the epoch after [`RunStore::latest_lease`]. `owner` must be unique to one incarnation of one
    /// process: a request whose answer got lost is recognised by it, and asking again for a lease that one has is
    /// true. Leases are never deleted, so an epoch cannot be taken twice.
    ///
    /// # Errors
    /// [`StoreError::Io`]; the lease may have been taken nevertheless, so ask again.
    pub async fn take_lease(&self, epoch: u64, owner: &str) -> Result<bool, StoreError> {
        let lease = Lease {
            epoch,
            owner: owner.to_owned(),
        };
        self.claim(&format!("{FOLDER}/{epoch}"), &lease).await
    }

    /// The lease of `epoch`, if somebody took it.
    ///
    /// # Errors
    /// [`StoreError::Document`] if it is damaged.
    pub async fn lease(&self, epoch: u64) -> Result<Option<Lease>, StoreError> {
        self.document(&format!("{FOLDER}/{epoch}")).await
    }

    /// The lease of the highest epoch that anybody took, at least `known` if that is taken.
    ///
    /// A list may be old: from its end on, and from `known`, epochs are looked for one by one.
    ///
    /// # Errors
    /// [`StoreError::Document`] if it is damaged.
    pub async fn latest_lease(&self, known: u64) -> Result<Option<Lease>, StoreError> {
        let leases = self.small().list(Some(&Path::from(FOLDER)));
        let epochs =
            leases.try_filter_map(|meta| async move { Ok(epoch_of(meta.location.as_ref())) });
        let latest = epochs.try_fold(None, |max, epoch| async move { Ok(max.max(Some(epoch))) });
        let listed = latest.await.map_err(io("list", FOLDER))?;
        self.demand_folder("list")?;
        let start = listed.unwrap_or(0).max(known);
        let mut newest = if start > 0 {
            self.lease(start).await?
        } else {
            None
        };
        for epoch in start + 1.. {
            match self.lease(epoch).await? {
                Some(lease) => newest = Some(lease),
                None => break,
            }
        }
        if newest.is_none() && listed.is_some_and(|listed| listed < start) {
            newest = self.lease(listed.unwrap_or(0)).await?;
        }
        Ok(newest)
    }

    /// Creates `key` with `claim`; true if what is there afterwards is this claim.
    pub(crate) async fn claim(&self, key: &str, claim: &Lease) -> Result<bool, StoreError> {
        if self.create(key, sealed::seal(claim).into()).await? {
            return Ok(true);
        }
        Ok(self.document(key).await?.as_ref() == Some(claim))
    }
}

fn epoch_of(key: &str) -> Option<u64> {
    let digits = key.strip_prefix(FOLDER)?.strip_prefix('/')?;
    digits
        .parse()
        .ok()
        .filter(|epoch: &u64| epoch.to_string() == digits)
}
