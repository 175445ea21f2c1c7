//! Writing checkpoints: objects first, then the manifest, whose creation is the commit.

use std::collections::BTreeSet;

use futures::{FutureExt, StreamExt, TryStreamExt};
use object_store::ObjectStoreExt;
use object_store::path::Path;

use crate::block::{BlockSource, ObjectImage, entries};
use crate::error::{Damage, DamageReason, StoreError, io};
use crate::local;
use crate::manifest::{BlockEntry, CheckpointManifest, CheckpointObject, folder, manifest_key};
use crate::run_store::{RunStore, check_name};
use crate::upload::upload;

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
    /// Writes an object with some blocks of `step`; it is garbage until a manifest names it. [`RunStore::put_changed`] leaves out what
    /// an older checkpoint has.
    ///
    /// The object's name holds `writer_name` and the digest of its contents: writing the same again is harmless, and a
    /// late writer cannot touch what another has committed. Beside `blocks` an upload holds five parts in memory
    /// (40 MiB; more only for objects above 70 GiB).
    ///
    /// Cancelling leaves no object; the parts already sent are removed in the background. Those of a writer that was killed stay
    /// on S3 until the bucket's rule for incomplete multipart uploads removes them.
    ///
    /// # Errors
    /// [`StoreError::InvalidCheckpoint`] for no blocks, for one twice, and for one that cannot be read; [`StoreError::BadName`];
    /// [`StoreError::Io`] when the store gave up.
    pub async fn put_blocks<B: BlockSource>(
        &self,
        step: u64,
        writer_name: &str,
        blocks: &[B],
    ) -> Result<CheckpointObject, StoreError> {
        let blocks = ascending(step, writer_name, blocks)?;
        let entries = entries(&blocks).await.map_err(unread(step))?;
        let object = self
            .write_object(step, writer_name, blocks, entries)
            .await?;
        self.keep_near(step, std::slice::from_ref(&object));
        Ok(object)
    }

    /// Writes an object of `blocks`, at least one, ascending, with their entries.
    pub(crate) async fn write_object<B: BlockSource>(
        &self,
        step: u64,
        writer_name: &str,
        blocks: Vec<&B>,
        mut entries: Vec<BlockEntry>,
    ) -> Result<CheckpointObject, StoreError> {
        let id = |entry: Option<&BlockEntry>| entry.map_or(0, |entry| entry.block);
        let range = format!("{:06}-{:06}", id(entries.first()), id(entries.last()));
        let image = ObjectImage::new(step, blocks);
        let blake3 = image.digest(&entries);
        let key = format!(
            "{}/blocks-{range}-{writer_name}-{:.16}.st",
            folder(step),
            blake3.to_string()
        );
        image.place(&mut entries);
        if let Some(near) = &self.near {
            near.write(step, &key, &image).await;
        }
        let written = match &self.backend.folder {
            Some(folder) => local::write(folder, &key, &image).await.map_err(|error| {
                object_store::Error::Generic {
                    store: "file",
                    source: error.into(),
                }
            }),
            None => upload(&self.backend.bulk, &Path::from(key.as_str()), &image).await,
        };
        written.map_err(io("write", &key))?;
        Ok(CheckpointObject {
            key,
            bytes: image.len(),
            blake3,
            blocks: entries,
        })
    }

    /// The newest checkpoints of this process are kept on its node, if that was asked for.
    pub(crate) fn keep_near(&self, step: u64, objects: &[CheckpointObject]) {
        if let Some(near) = &self.near {
            near.keep(step, objects.iter().map(|object| object.key.as_str()));
        }
    }

    /// Commits a checkpoint: makes sure that all its objects are there and creates `MANIFEST.json`.
    ///
    /// Idempotent: a step that is committed already with the same digests is [`Commit::AlreadyCommitted`], however the
    /// blocks were spread over objects.
    ///
    /// Objects of older checkpoints may be removed at any time, by this program or another one. If so, the commit is refused and leaves
    /// no manifest: see `share.rs` for why it cannot miss it.
    ///
    /// # Errors
    /// [`StoreError::NoRun`] without a run; [`StoreError::ForeignCheckpoint`] for one of another run;
    /// [`StoreError::Damaged`] if an object is missing or has another size, or if a shared one is being removed or known to be damaged:
    /// the step is not committed, write its blocks again; [`StoreError::CommitConflict`] if the step is committed with other bits;
    /// [`StoreError::Io`], after which the commit may have happened: ask again.
    pub async fn commit(&self, manifest: &CheckpointManifest) -> Result<Commit, StoreError> {
        self.commit_beside(manifest, &BTreeSet::new()).await
    }

    /// Commits a checkpoint whose objects `own` were written for it, whatever step's folder they lie in.
    pub(crate) async fn commit_beside(
        &self,
        manifest: &CheckpointManifest,
        own: &BTreeSet<String>,
    ) -> Result<Commit, StoreError> {
        let step = manifest.step;
        let _no_removals = self.removals.read().await;
        self.check_origin(manifest).await?;
        self.check_sizes(step, manifest.objects.iter()).await?;
        self.check_suspects(manifest).await?;
        if self
            .create(&manifest_key(step), manifest.encode().into())
            .await?
        {
            if let Err(error) = self.check_shared(manifest, own).await {
                if matches!(error, StoreError::Damaged(_)) {
                    self.delete(&manifest_key(step)).await?;
                }
                return Err(error);
            }
            // What was quarantined under this step is gone.
            self.lift_checkpoint(step).await?;
            return Ok(Commit::Created);
        }
        let there = match self.load_manifest(step).await {
            Ok(there) => there,
            // Its bytes do not verify: they commit nothing, and stand in the way of what does.
            Err(StoreError::Damaged(_)) => return self.replace_manifest(manifest, own).await,
            Err(error) => return Err(error),
        };
        if there == *manifest {
            // Also what a request looks like that was repeated after its answer got lost.
            self.check_shared(manifest, own).await?;
            if self.quarantined_steps().await?.contains(&step) {
                // Its own objects have been written again, and the others not.
                self.check_objects(step, manifest.shared_objects()).await?;
                self.lift_checkpoint(step).await?;
            }
            return Ok(Commit::AlreadyCommitted);
        }
        self.same_bits(manifest, &there)?;
        // The run has come here a second time, perhaps because what is there is damaged.
        let damage = self.verify_objects(&there).await?;
        if damage.is_empty() {
            self.lift_checkpoint(step).await?;
            return Ok(Commit::AlreadyCommitted);
        }
        // What is damaged may be what both share.
        self.check_objects(step, manifest.shared_objects()).await?;
        self.replace_manifest(manifest, own).await
    }

    /// What is there can be no worse: a refusal leaves it replaced.
    async fn replace_manifest(
        &self,
        manifest: &CheckpointManifest,
        own: &BTreeSet<String>,
    ) -> Result<Commit, StoreError> {
        self.put(&manifest_key(manifest.step), manifest.encode().into())
            .await?;
        self.check_shared(manifest, own).await?;
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

    pub(crate) async fn check_sizes(
        &self,
        step: u64,
        objects: impl Iterator<Item = &CheckpointObject>,
    ) -> Result<(), StoreError> {
        // Boxed and collected, so that the future of this method is `Send` for every lifetime of the manifest.
        let checks: Vec<_> = objects
            .map(|object| self.check_size(step, object).boxed())
            .collect();
        futures::stream::iter(checks)
            .buffer_unordered(HEADS_IN_FLIGHT_MAX)
            .try_collect()
            .await
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

/// The blocks, ascending, if they can be written under this name.
pub(crate) fn ascending<'a, B: BlockSource>(
    step: u64,
    writer_name: &str,
    blocks: &'a [B],
) -> Result<Vec<&'a B>, StoreError> {
    check_name("writer name", writer_name)?;
    let mut blocks: Vec<&B> = blocks.iter().collect();
    blocks.sort_by_key(|block| block.block());
    let invalid = |reason: String| StoreError::InvalidCheckpoint { step, reason };
    if let Some(pair) = blocks
        .windows(2)
        .find(|pair| pair[0].block() == pair[1].block())
    {
        return Err(invalid(format!("block {} is there twice", pair[0].block())));
    }
    if blocks.is_empty() {
        return Err(invalid("an object needs at least one block".to_owned()));
    }
    Ok(blocks)
}

/// Wraps what kept a block from being read for [`Result::map_err`].
pub(crate) fn unread(step: u64) -> impl Fn(std::io::Error) -> StoreError {
    move |error| StoreError::InvalidCheckpoint {
        step,
        reason: format!("a block cannot be read: {error}"),
    }
}
