//! Copying a run's checkpoints from one store to another.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};

use futures::{StreamExt, TryStreamExt};
use object_store::ObjectStoreExt;
use object_store::path::Path;

use crate::check::ObjectCheck;
use crate::error::{Damage, DamageReason, StoreError, io};
use crate::manifest::{CheckpointManifest, CheckpointObject};
use crate::run_store::RunStore;
use crate::upload::{PART_BYTES, PartUpload};
use crate::verify::{CHUNK_BYTES, CHUNKS_IN_FLIGHT_MAX, OBJECTS_IN_FLIGHT_MAX, chunks};

/// Parts of one object on their way. An object has two chunks, one part that fills and these in memory: 32 MiB, four of them 128 MiB.
const PARTS_IN_FLIGHT_MAX: usize = 2;

/// How far a copy is; may be looked at from elsewhere.
#[derive(Debug, Default)]
pub struct CopyProgress {
    total: AtomicU64,
    done: AtomicU64,
}

impl CopyProgress {
    /// Bytes of all objects that are to be there; 0 until that is known.
    pub fn total_bytes(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Bytes that have been sent, or were there.
    pub fn done_bytes(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// What [`RunStore::copy_to`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CopyReport {
    /// Steps that were committed at the destination now, ascending.
    pub copied: Vec<u64>,
    /// Steps that were there and verify, ascending.
    pub there: Vec<u64>,
    /// Objects that were sent.
    pub objects_sent: usize,
    /// Objects of copied steps that were there and verified, from a copy that was cut off.
    pub objects_there: usize,
    /// Bytes that were sent.
    pub bytes_sent: u64,
    /// What is damaged at the source; its checkpoints were left out.
    pub damage: Vec<Damage>,
}

enum Outcome {
    Sent(u64),
    WasThere,
    Damaged(Damage),
}

impl RunStore {
    /// Copies checkpoints of this run to `to`, the newest first: `steps`, or all that are not quarantined. Pins go along.
    ///
    /// Every byte is compared with its digest when it is read here and again after it was written there; the manifest comes
    /// last. What is there already and verifies is not sent again, so a copy that was cut off goes on. Holds at most
    /// 128 MiB of objects below 70 GiB.
    ///
    /// # Errors
    /// [`StoreError::OtherName`], [`StoreError::RunMismatch`] if the destination holds another run, before anything is written;
    /// [`StoreError::CommitConflict`] if it holds other bits of a step; [`StoreError::NotWritable`]; [`StoreError::Io`].
    pub async fn copy_to(
        &self,
        to: &RunStore,
        steps: Option<&[u64]>,
        progress: &CopyProgress,
    ) -> Result<CopyReport, StoreError> {
        let identity = self.existing_run().await?;
        if identity.run != to.name() {
            return Err(StoreError::OtherName {
                from: identity.run,
                to: to.name().to_owned(),
            });
        }
        let mut report = CopyReport::default();
        let mut manifests = Vec::new();
        let all = match steps {
            Some(steps) => steps.to_vec(),
            None => self.checkpoints().await?,
        };
        for step in all {
            match self.load_manifest(step).await {
                Ok(manifest) => manifests.push(manifest),
                Err(StoreError::Damaged(damage)) => report.damage.push(*damage),
                Err(error) => return Err(error),
            }
        }
        let objects = manifests.iter().flat_map(|manifest| &manifest.objects);
        let sizes: BTreeMap<&str, u64> = objects
            .map(|object| (object.key.as_str(), object.bytes))
            .collect();
        let total = sizes.values().sum();
        progress.total.store(total, Ordering::Relaxed);
        to.check_writable().await?;
        let run_toml = self.run_toml().await?.unwrap_or_default();
        to.put_run(&run_toml, &identity).await?;

        let pinned = self.pinned_steps().await?;
        manifests.sort_by_key(|manifest| std::cmp::Reverse(manifest.step));
        let mut seen: BTreeSet<&str> = BTreeSet::new();
        let mut copied: BTreeSet<String> = BTreeSet::new();
        for manifest in &manifests {
            let done = progress.done_bytes();
            let new = manifest
                .objects
                .iter()
                .filter(|object| seen.insert(&object.key));
            let new_bytes: u64 = new.map(|object| object.bytes).sum();
            let step = self.copy_step(to, manifest, progress, &mut copied, &mut report);
            if step.await? && pinned.contains(&manifest.step) {
                to.pin(manifest.step).await?;
            }
            // Damaged objects are over as well.
            progress.done.store(done + new_bytes, Ordering::Relaxed);
        }
        report.copied.sort_unstable();
        report.there.sort_unstable();
        Ok(report)
    }

    /// True if the step is committed at the destination now. `copied` are the objects that are there for sure.
    async fn copy_step(
        &self,
        to: &RunStore,
        manifest: &CheckpointManifest,
        progress: &CopyProgress,
        copied: &mut BTreeSet<String>,
        report: &mut CopyReport,
    ) -> Result<bool, StoreError> {
        let step = manifest.step;
        let mut is_new = false;
        match to.load_manifest(step).await {
            Ok(there) => {
                to.same_bits(manifest, &there)?;
                if to.verify_objects(&there).await?.is_empty() {
                    report.there.push(step);
                    return Ok(true);
                }
            }
            Err(StoreError::NoCheckpoint { .. }) => is_new = true,
            // The commit writes it anew.
            Err(StoreError::Damaged(_)) => {}
            Err(error) => return Err(error),
        }
        let missing: Vec<&CheckpointObject> = manifest
            .objects
            .iter()
            .filter(|object| !copied.contains(&object.key))
            .collect();
        let sent: Vec<Outcome> = futures::stream::iter(missing.iter().copied())
            .map(|object| self.copy_object(to, step, object, progress))
            .buffer_unordered(OBJECTS_IN_FLIGHT_MAX)
            .try_collect()
            .await?;
        let damaged = |outcome: &Outcome| match outcome {
            Outcome::Damaged(damage) => Some(damage.clone()),
            _ => None,
        };
        let damage: Vec<Damage> = sent.iter().filter_map(damaged).collect();
        if !damage.is_empty() {
            report.damage.extend(damage);
            if is_new {
                // Its other objects would be garbage there.
                to.discard(step).await?;
            }
            return Ok(false);
        }
        copied.extend(missing.iter().map(|object| object.key.clone()));
        for sent in sent {
            match sent {
                Outcome::Sent(bytes) => {
                    report.objects_sent += 1;
                    report.bytes_sent += bytes;
                }
                Outcome::WasThere => report.objects_there += 1,
                Outcome::Damaged(_) => {}
            }
        }
        to.commit_beside(manifest, copied).await?;
        report.copied.push(step);
        Ok(true)
    }

    async fn copy_object(
        &self,
        to: &RunStore,
        step: u64,
        object: &CheckpointObject,
        progress: &CopyProgress,
    ) -> Result<Outcome, StoreError> {
        let there = to.verify_object(object, &mut None).await?;
        if there.is_none() {
            progress.add(object.bytes);
            return Ok(Outcome::WasThere);
        }
        if let Some(reason) = self.send_object(to, object, progress).await? {
            return Ok(Outcome::Damaged(Damage {
                step,
                object: object.key.clone(),
                reason,
            }));
        }
        match to.verify_object(object, &mut None).await? {
            None => Ok(Outcome::Sent(object.bytes)),
            Some(reason) => Err(StoreError::NotWritable {
                url: to.url().to_owned(),
                reason: format!(
                    "what was written did not come back: `{}` {reason}",
                    object.key
                ),
            }),
        }
    }

    /// Sends an object, unless what is read turns out to be damaged.
    async fn send_object(
        &self,
        to: &RunStore,
        object: &CheckpointObject,
        progress: &CopyProgress,
    ) -> Result<Option<DamageReason>, StoreError> {
        match self.check_size(0, object).await {
            Ok(()) => {}
            Err(StoreError::Damaged(damage)) => return Ok(Some(damage.reason)),
            Err(error) => return Err(error),
        }
        let key = Path::from(object.key.as_str());
        let mut check = ObjectCheck::new(object);
        let mut chunks = std::pin::pin!(chunks(
            self.bulk(),
            object,
            CHUNK_BYTES,
            CHUNKS_IN_FLIGHT_MAX
        ));
        let mut upload = None;
        let mut small = Vec::new();
        if object.bytes > PART_BYTES {
            let begun =
                PartUpload::begin(&to.backend.bulk, &key, object.bytes, PARTS_IN_FLIGHT_MAX);
            upload = Some(begun.await.map_err(io("write", &object.key))?);
        }
        while let Some(chunk) = chunks.try_next().await.map_err(io("read", &object.key))? {
            check.update(&chunk);
            progress.add(chunk.len() as u64);
            match &mut upload {
                Some(upload) => upload
                    .push(chunk.into())
                    .await
                    .map_err(io("write", &object.key))?,
                None => small.extend_from_slice(&chunk),
            }
        }
        if let Some(reason) = check.finish() {
            return Ok(Some(reason));
        }
        let written = match upload {
            Some(upload) => upload.complete().await,
            None => to.bulk().put(&key, small.into()).await.map(drop),
        };
        written.map_err(io("write", &object.key))?;
        Ok(None)
    }
}
