//! Verifying checkpoints: every byte is read and compared, at full speed on demand or slowly in the background.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use futures::{FutureExt, Stream, StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use tokio::time::Instant;

use crate::check::ObjectCheck;
use crate::digest::HASH_BYTES;
use crate::error::{Damage, DamageReason, StoreError, io};
use crate::manifest::{CheckpointManifest, CheckpointObject, manifest_key};
use crate::run_store::RunStore;

/// Bytes asked for at once: a request for more might not end within its time on a slow line.
pub(crate) const CHUNK_BYTES: u64 = 4 << 20;

/// Chunks of one object on their way; with the number of objects it bounds the memory: 32 MiB.
pub(crate) const CHUNKS_IN_FLIGHT_MAX: usize = 2;

/// Objects verified in parallel.
pub(crate) const OBJECTS_IN_FLIGHT_MAX: usize = 4;

/// Bytes of a scrub between two looks at the clock.
const SCRUB_CHUNK_BYTES: u64 = 256 << 10;

/// What [`RunStore::scrub`] saw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubReport {
    /// The checkpoint's step.
    pub step: u64,
    /// Bytes read.
    pub bytes: u64,
    /// What is damaged; empty if the checkpoint is intact.
    pub damage: Vec<Damage>,
}

impl RunStore {
    /// Reads a whole checkpoint and lists what is damaged, one entry for each object; empty if it is intact.
    ///
    /// Compares the digest of every object and of every block; that the checkpoint's digests follow from those of the blocks is part of
    /// what makes a manifest usable. A step that has objects of its own and no manifest lacks its manifest.
    ///
    /// # Errors
    /// [`StoreError::NoCheckpoint`] if there is nothing of the step but what others share, [`StoreError::NewerVersion`],
    /// [`StoreError::Io`]: a store that does not answer is not taken for damage.
    pub async fn verify(&self, step: u64) -> Result<Vec<Damage>, StoreError> {
        match self.load_manifest(step).await {
            Ok(manifest) => self.verify_objects(&manifest).await,
            Err(StoreError::Damaged(damage)) => Ok(vec![*damage]),
            Err(error @ StoreError::NoCheckpoint { .. }) => {
                let steps = self.listed_steps().await?;
                let Some(listed) = steps.get(&step) else {
                    return Err(error);
                };
                // What younger checkpoints name stays when a step is pruned, and misses no manifest.
                let committed = steps.iter().filter(|(_, files)| files.manifest().is_some());
                let committed: Vec<u64> = committed.map(|(step, _)| *step).collect();
                let named = self.named_by(&committed).await?;
                if listed.files.iter().all(|file| named.contains(&file.key)) {
                    return Err(error);
                }
                Ok(vec![Damage {
                    step,
                    object: manifest_key(step),
                    reason: DamageReason::Missing,
                }])
            }
            Err(error) => Err(error),
        }
    }

    /// As [`RunStore::verify`], but reads at most `bytes_per_s` bytes a second, object by object, and looks a second time at what seems
    /// damaged: a bit may have flipped on the way.
    ///
    /// For the background: quarantine what it finds with [`RunStore::quarantine_checkpoint`]. Cancelling is harmless.
    ///
    /// # Errors
    /// As [`RunStore::verify`].
    pub async fn scrub(&self, step: u64, bytes_per_s: u64) -> Result<ScrubReport, StoreError> {
        let mut report = ScrubReport {
            step,
            ..ScrubReport::default()
        };
        let manifest = match self.load_manifest(step).await {
            Err(StoreError::Damaged(_)) => self.load_manifest(step).await,
            other => other,
        };
        let manifest = match manifest {
            Ok(manifest) => manifest,
            Err(StoreError::Damaged(damage)) => {
                report.damage.push(*damage);
                return Ok(report);
            }
            Err(error) => return Err(error),
        };
        let mut pace = Some(Pace::new(bytes_per_s));
        for object in &manifest.objects {
            let mut reason = None;
            for _ in 0..2 {
                let read = self.verify_object(object, &mut pace).await?;
                reason = read;
                if reason.is_none() {
                    break;
                }
            }
            report.damage.extend(reason.map(|reason| Damage {
                step,
                object: object.key.clone(),
                reason,
            }));
        }
        report.bytes = pace.map_or(0, |pace| pace.bytes);
        Ok(report)
    }

    pub(crate) async fn verify_objects(
        &self,
        manifest: &CheckpointManifest,
    ) -> Result<Vec<Damage>, StoreError> {
        // Boxed and collected, so that the future of this method is `Send` for every lifetime of the manifest.
        let checks: Vec<_> = manifest
            .objects
            .iter()
            .map(|object| async move { self.verify_object(object, &mut None).await }.boxed())
            .collect();
        let reasons: Vec<Option<DamageReason>> = futures::stream::iter(checks)
            .buffered(OBJECTS_IN_FLIGHT_MAX)
            .try_collect()
            .await?;
        let damage = |(object, reason): (&CheckpointObject, Option<DamageReason>)| {
            Some(Damage {
                step: manifest.step,
                object: object.key.clone(),
                reason: reason?,
            })
        };
        Ok(manifest
            .objects
            .iter()
            .zip(reasons)
            .filter_map(damage)
            .collect())
    }

    pub(crate) async fn verify_object(
        &self,
        object: &CheckpointObject,
        pace: &mut Option<Pace>,
    ) -> Result<Option<DamageReason>, StoreError> {
        // The step does not matter here: the damage's reason is all that is taken.
        match self.check_size(0, object).await {
            Ok(()) => {}
            Err(StoreError::Damaged(damage)) => return Ok(Some(damage.reason)),
            Err(error) => return Err(error),
        }
        let mut checks = ObjectCheck::new(object);
        let (chunk_bytes, in_flight) = match pace {
            Some(_) => (SCRUB_CHUNK_BYTES, 1),
            None => (CHUNK_BYTES, CHUNKS_IN_FLIGHT_MAX),
        };
        let mut chunks = std::pin::pin!(chunks(self.bulk(), object, chunk_bytes, in_flight));
        loop {
            let chunk = match chunks.try_next().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => return Ok(checks.finish()),
                Err(object_store::Error::NotFound { .. }) => {
                    self.demand_folder("read")?;
                    return Ok(Some(DamageReason::Missing));
                }
                Err(error) => return Err(io("read", &object.key)(error)),
            };
            for piece in chunk.chunks(HASH_BYTES) {
                checks.update(piece);
                tokio::task::yield_now().await;
            }
            if let Some(pace) = pace {
                pace.wait(chunk.len() as u64).await;
            }
        }
    }
}

/// An object's bytes from front to back, in requests of bounded size.
pub(crate) fn chunks<'a>(
    store: &'a dyn ObjectStore,
    object: &'a CheckpointObject,
    chunk_bytes: u64,
    in_flight: usize,
) -> impl Stream<Item = object_store::Result<Bytes>> + Send + 'a {
    let path = Path::from(object.key.as_str());
    let ranges = (0..object.bytes.div_ceil(chunk_bytes)).map(move |at| {
        let start = at * chunk_bytes;
        start..object.bytes.min(start + chunk_bytes)
    });
    let read = move |range: Range<u64>| {
        let path = path.clone();
        async move { store.get_range(&path, range).await }.boxed()
    };
    futures::stream::iter(ranges).map(read).buffered(in_flight)
}

/// Keeps reading below a rate.
pub(crate) struct Pace {
    bytes_per_s: u64,
    start: Instant,
    bytes: u64,
}

impl Pace {
    fn new(bytes_per_s: u64) -> Self {
        Self {
            bytes_per_s: bytes_per_s.max(1),
            start: Instant::now(),
            bytes: 0,
        }
    }

    /// Waits until `bytes` more may have been read.
    async fn wait(&mut self, bytes: u64) {
        self.bytes += bytes;
        let due = Duration::from_secs_f64(self.bytes as f64 / self.bytes_per_s as f64);
        tokio::time::sleep_until(self.start + due).await;
    }
}
