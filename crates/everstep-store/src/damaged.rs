//! Quarantined checkpoints: `damaged/<step>.json` says that a committed checkpoint is damaged, so that nobody reads it again.
//!
//! The checkpoint itself stays for people to look at, until pruning takes it. Committing its step anew lifts the quarantine.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::error::{Damage, DamageReason, ErrorKind, StoreError};
use crate::run_store::RunStore;
use crate::sealed;

const FOLDER: &str = "damaged";

/// Why a checkpoint is quarantined.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DamagedCheckpoint {
    /// The checkpoint's step.
    pub step: u64,
    /// When it was found, RFC 3339.
    pub time: String,
    /// What is damaged.
    pub objects: Vec<DamagedObject>,
}

/// One damaged object of a quarantined checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DamagedObject {
    /// Its key inside the run.
    pub key: String,
    /// How it is damaged, one line.
    pub reason: String,
}

fn key(step: u64) -> String {
    format!("{FOLDER}/{step}.json")
}

impl RunStore {
    /// Marks a checkpoint as damaged, and every other one that shares a damaged object with it; says which. A mark that is there is
    /// replaced, on others it stays. `time` is RFC 3339.
    ///
    /// From then on [`RunStore::checkpoints`], [`RunStore::latest_committed`] and [`RunStore::latest_intact`] pass it over and
    /// pruning does not count it, until its step is committed again or [`RunStore::lift_checkpoint`] is called.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::NewerVersion`].
    pub async fn quarantine_checkpoint(
        &self,
        step: u64,
        damage: &[Damage],
        time: &str,
    ) -> Result<BTreeSet<u64>, StoreError> {
        let object = |damage: &Damage| DamagedObject {
            key: damage.object.clone(),
            reason: damage.reason.to_string(),
        };
        let record = DamagedCheckpoint {
            step,
            time: time.to_owned(),
            objects: damage.iter().map(object).collect(),
        };
        self.put(&key(step), sealed::seal(&record).into()).await?;
        let mut marked = BTreeSet::from([step]);
        let mut others = self.checkpoints().await?;
        others.retain(|other| *other != step);
        for (other, manifest) in self.readable_manifests(&others).await? {
            let is_named =
                |object: &&DamagedObject| manifest.objects.iter().any(|o| o.key == object.key);
            let objects: Vec<DamagedObject> =
                record.objects.iter().filter(is_named).cloned().collect();
            if objects.is_empty() {
                continue;
            }
            let shared = DamagedCheckpoint {
                step: other,
                time: time.to_owned(),
                objects,
            };
            self.put(&key(other), sealed::seal(&shared).into()).await?;
            marked.insert(other);
        }
        Ok(marked)
    }

    /// Lifts a checkpoint's quarantine. One that is not there is lifted.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub async fn lift_checkpoint(&self, step: u64) -> Result<(), StoreError> {
        self.delete(&key(step)).await
    }

    /// The quarantined steps, whether or not there is still a checkpoint.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub async fn quarantined_steps(&self) -> Result<BTreeSet<u64>, StoreError> {
        self.listed_numbers(FOLDER).await
    }

    /// Why `step` is quarantined; `None` if it is not. A record that is damaged itself counts, and comes without objects.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::NewerVersion`].
    pub async fn quarantined_checkpoint(
        &self,
        step: u64,
    ) -> Result<Option<DamagedCheckpoint>, StoreError> {
        match self.document::<DamagedCheckpoint>(&key(step)).await {
            Err(error) if error.kind() == ErrorKind::Data => {
                tracing::error!(step, %error, "the record of a damaged checkpoint is damaged; it counts");
                let step_only = DamagedCheckpoint {
                    step,
                    ..DamagedCheckpoint::default()
                };
                Ok(Some(step_only))
            }
            other => other,
        }
    }

    /// What a step is quarantined for, as damage; empty if it is not.
    pub(crate) async fn quarantined_damage(&self, step: u64) -> Result<Vec<Damage>, StoreError> {
        let Some(record) = self.quarantined_checkpoint(step).await? else {
            return Ok(Vec::new());
        };
        let damage = |object: String, reason: String| Damage {
            step,
            object,
            reason: DamageReason::Quarantined(reason),
        };
        if record.objects.is_empty() {
            return Ok(vec![damage(key(step), "for an unknown reason".to_owned())]);
        }
        let since = &record.time;
        let told = |object: DamagedObject| {
            let reason = format!("{} (found {since})", object.reason);
            damage(object.key, reason)
        };
        Ok(record.objects.into_iter().map(told).collect())
    }
}
