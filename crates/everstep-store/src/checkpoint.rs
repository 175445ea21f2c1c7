//! Writing checkpoints: objects first, then the manifest, whose creation is the commit.

use futures::{FutureExt, StreamExt, TryStreamExt};
use object_store::ObjectStoreExt;
use object_store::path::Path;

use crate::block::{BlockState, ObjectImage};
use crate::error::{Damage, DamageReason, StoreError, io};
use crate::manifest::{CheckpointManifest, CheckpointObject, folder, manifest_key};
use crate::run_store::{RunStore, check_name};
use crate::sealed;
use crate::upload::upload;
use crate::verify::Depth;

/// Objects looked at in parallel before a commit.
const HEADS_IN_FLIGHT_MAX: usize = 16;

/// What [`RunStore::commit`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commit {
    /// The step is now committed.
    Created,
    /// The step was committed before, with the same bits.
    AlreadyCommitted,
    /// The step was committed before, and what was there is damaged: it now consists of the new objects.
    Repaired,
}

impl RunStore {
    /// Writes an object with some blocks of `step`; it is garbage until a manifest names it.
    ///
    /// The object's name holds `writer_name` and the digest of its contents: writing the same again is harmless, and a
    /// late writer cannot touch what another has committed. Beside `blocks` an upload holds five parts in memory
    /// (40 MiB; more only for objects above 70 GiB).
    ///
    /// Cancelling leaves no object; the parts already sent are removed in the background. Those of a writer that was killed stay
    /// on S3 until the bucket's rule for incomplete multipart uploads removes them.
    ///
    /// # Errors
    /// [`StoreError::InvalidCheckpoint`] for no blocks or one twice; [`StoreError::BadName`];
    /// [`StoreError::Io`] when the store gave up.
    pub async fn put_blocks(
        &self,
        step: u64,
        writer_name: &str,
        blocks: &[BlockState],
    ) -> Result<CheckpointObject, StoreError> {
        check_name("writer name", writer_name)?;
        let mut blocks: Vec<&BlockState> = blocks.iter().collect();
        blocks.sort_by_key(|block| block.block);
        let invalid = |reason: String| StoreError::InvalidCheckpoint { step, reason };
        if let Some(pair) = blocks
            .windows(2)
            .find(|pair| pair[0].block == pair[1].block)
        {
            return Err(invalid(format!("block {} is there twice", pair[0].block)));
        }
        let (Some(first), Some(last)) = (blocks.first(), blocks.last()) else {
            return Err(invalid("an object needs at least one block".to_owned()));
        };
        let range = format!("{:06}-{:06}", first.block, last.block);
        let image = ObjectImage::new(step, blocks);
        let blake3 = image.digest().await;
        let key = format!(
            "{}/blocks-{range}-{writer_name}-{:.16}.st",
            folder(step),
            blake3.to_string()
        );
        let entries = image.entries().await;
        upload(&self.backend.bulk, &Path::from(key.as_str()), &image)
            .await
            .map_err(io("write", &key))?;
        Ok(CheckpointObject {
            key,
            bytes: image.len(),
            blake3,
            blocks: entries,
        })
    }

    /// Commits a checkpoint: makes sure that all its objects are there and creates `MANIFEST.json`.
    ///
    /// Idempotent: a step that is committed already with the same digests is [`Commit::AlreadyCommitted`], however the
    /// blocks were spread over objects.
    ///
    /// # Errors
    /// [`StoreError::NoRun`] without a run; [`StoreError::ForeignCheckpoint`] for one of another run;
    /// [`StoreError::Damaged`] if an object is missing or has another size; [`StoreError::CommitConflict`] if the step is
    /// committed with other bits; [`StoreError::Io`], after which the commit may have happened: ask again.
    pub async fn commit(&self, manifest: &CheckpointManifest) -> Result<Commit, StoreError> {
        let step = manifest.step;
        self.check_origin(manifest).await?;
        // Boxed and collected, so that the future of this method is `Send` for every lifetime of the manifest.
        let checks: Vec<_> = manifest
            .objects
            .iter()
            .map(|object| self.check_size(step, object).boxed())
            .collect();
        futures::stream::iter(checks)
            .buffer_unordered(HEADS_IN_FLIGHT_MAX)
            .try_collect::<()>()
            .await?;
        let bytes = sealed::seal(manifest);
        if self.create(&manifest_key(step), bytes.into()).await? {
            // What was quarantined under this step is gone.
            self.lift_checkpoint(step).await?;
            return Ok(Commit::Created);
        }
        let there = match self.load_manifest(step).await {
            Ok(there) => there,
            // Its bytes do not verify: they commit nothing, and stand in the way of what does.
            Err(StoreError::Damaged(_)) => {
                return self.replace_manifest(manifest).await;
            }
            Err(error) => return Err(error),
        };
        if there == *manifest {
            // Also what a request looks like that was repeated after its answer got lost. If it was quarantined, the same objects
            // have been written again.
            self.lift_checkpoint(step).await?;
            return Ok(Commit::AlreadyCommitted);
        }
        self.same_bits(manifest, &there)?;
        // The run has come here a second time, perhaps because what is there is damaged.
        let damage = self.verify_objects(&there, Depth::Objects).await?;
        if damage.is_empty() {
            self.lift_checkpoint(step).await?;
            return Ok(Commit::AlreadyCommitted);
        }
        self.replace_manifest(manifest).await
    }

    async fn replace_manifest(&self, manifest: &CheckpointManifest) -> Result<Commit, StoreError> {
        self.put(&manifest_key(manifest.step), sealed::seal(manifest).into())
            .await?;
        self.lift_checkpoint(manifest.step).await?;
        Ok(Commit::Repaired)
    }

    pub(crate) fn same_bits(
        &self,
        manifest: &CheckpointManifest,
        there: &CheckpointManifest,
    ) -> Result<(), StoreError> {
        let step = manifest.step;
        for (field, expected, found) in [
            ("layout", manifest.layout, there.layout),
            (
                "parameters",
                manifest.digest.parameters,
                there.digest.parameters,
            ),
            (
                "optimizer",
                manifest.digest.optimizer,
                there.digest.optimizer,
            ),
        ] {
            if expected != found {
                return Err(StoreError::CommitConflict {
                    step,
                    field,
                    expected,
                    found,
                });
            }
        }
        Ok(())
    }

    /// A checkpoint must be of this run and of its layout.
    pub(crate) async fn check_origin(
        &self,
        manifest: &CheckpointManifest,
    ) -> Result<(), StoreError> {
        let identity = self.existing_run().await?;
        for (field, expected, found) in [
            ("layout", identity.layout, manifest.layout),
            ("run_digest", identity.digest(), manifest.run_digest),
        ] {
            if expected != found {
                return Err(StoreError::ForeignCheckpoint {
                    step: manifest.step,
                    field,
                    expected,
                    found,
                });
            }
        }
        Ok(())
    }

    /// Compares an object's size with the manifest's.
    pub(crate) async fn check_size(
        &self,
        step: u64,
        object: &CheckpointObject,
    ) -> Result<(), StoreError> {
        let reason = match self.small().head(&Path::from(object.key.as_str())).await {
            Ok(meta) if meta.size == object.bytes => return Ok(()),
            Ok(meta) => DamageReason::Size {
                expected: object.bytes,
                found: meta.size,
            },
            Err(object_store::Error::NotFound { .. }) => {
                self.demand_folder("read")?;
                DamageReason::Missing
            }
            Err(error) => return Err(io("read", &object.key)(error)),
        };
        Err(Damage {
            step,
            object: object.key.clone(),
            reason,
        }
        .into())
    }
}
