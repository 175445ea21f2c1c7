//! What did not change is not sent again: a checkpoint names objects of older ones for blocks with the same digests.
//!
//! An object lives as long as any manifest names it, whatever became of the checkpoint that it was written for. A damaged one damages all
//! that name it; once that is known, nobody names it any more and its blocks are written anew.
//!
//! A commit and a removal, even in two programs, cannot miss each other: the commit creates its manifest and then makes sure that another
//! manifest still names each object that it shares; the removal deletes manifests and then lists those that stay. If the list came before
//! the new manifest, the old one was gone before the commit looked for it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::PoisonError;

use crate::block::{BlockSource, entries};
use crate::checkpoint::{ascending, unread};
use crate::error::{Damage, DamageReason, ErrorKind, StoreError};
use crate::manifest::{BlockEntry, CheckpointManifest, CheckpointObject};
use crate::run_store::RunStore;

/// Manifests that are tried, from the newest on, before everything is written.
const BASES_MAX: usize = 3;

impl RunStore {
    /// Like [`RunStore::put_blocks`], but writes only the blocks that the newest older checkpoint does not have with the same digests;
    /// for the others the result names the objects that hold them. Only what stands in the manifest ([`BlockState::extra`]) may differ.
    ///
    /// The older checkpoint is none that is quarantined, and no object is shared that any checkpoint was quarantined for, or that does
    /// not verify: each is read once in the life of the program. An object is only shared if what is needed is at least half of it, so
    /// that a few blocks do not keep many alive. Otherwise what did not change is written to an object of its own, which can be shared
    /// from then on. So there are up to two new objects.
    ///
    /// Nothing keeps shared objects from being removed before the commit, which then is refused: a checkpoint that must not fail is
    /// written with [`RunStore::put_blocks`].
    ///
    /// [`BlockState::extra`]: crate::BlockState::extra
    ///
    /// # Errors
    /// As [`RunStore::put_blocks`]; [`StoreError::NoRun`]; [`StoreError::NewerVersion`].
    pub async fn put_changed<B: BlockSource>(
        &self,
        step: u64,
        writer_name: &str,
        blocks: &[B],
    ) -> Result<Vec<CheckpointObject>, StoreError> {
        let blocks = ascending(step, writer_name, blocks)?;
        let entries = entries(&blocks).await.map_err(unread(step))?;
        let mut objects = Vec::new();
        let mut shared: BTreeSet<u32> = BTreeSet::new();
        let mut settled: BTreeSet<u32> = BTreeSet::new();
        if let Some(base) = self.base(step).await? {
            let suspects = self.suspects().await?;
            self.forget_others(&base);
            for object in base.objects {
                let object = CheckpointObject {
                    blocks: unchanged(&entries, &object.blocks),
                    ..object
                };
                let ids = object.blocks.iter().map(|entry| entry.block);
                if is_mostly_used(&object)
                    && !suspects.contains(&object.key)
                    && self.is_intact(step, &object).await?
                {
                    shared.extend(ids);
                    objects.push(object);
                } else {
                    settled.extend(ids);
                }
            }
        }
        let is_settled = |entry: &BlockEntry| settled.contains(&entry.block);
        let unshared = blocks
            .into_iter()
            .zip(entries)
            .filter(|(_, entry)| !shared.contains(&entry.block));
        type Part<'a, B> = (Vec<&'a B>, Vec<BlockEntry>);
        let (settled, changed): (Vec<_>, Vec<_>) =
            unshared.partition(|(_, entry)| is_settled(entry));
        for part in [settled, changed] {
            let (blocks, entries): Part<'_, B> = part.into_iter().unzip();
            if !blocks.is_empty() {
                let written = self.write_object(step, writer_name, blocks, entries);
                objects.push(written.await?);
            }
        }
        self.keep_near(step, &objects);
        Ok(objects)
    }

    /// Whether an object is what the manifest says, by its size and, the first time, by its digest.
    async fn is_intact(&self, step: u64, object: &CheckpointObject) -> Result<bool, StoreError> {
        let is_known = self.verified().contains(&object.key);
        let checked = if is_known {
            self.check_size(step, object).await
        } else {
            self.check_objects(step, std::iter::once(object)).await
        };
        match checked {
            Ok(()) => {
                self.verified().insert(object.key.clone());
                Ok(true)
            }
            Err(StoreError::Damaged(damage)) => {
                tracing::warn!(%damage, "blocks that did not change are written again");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn verified(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a base does not name will not be shared again.
    fn forget_others(&self, base: &CheckpointManifest) {
        let named: BTreeSet<&str> = base
            .objects
            .iter()
            .map(|object| object.key.as_str())
            .collect();
        self.verified().retain(|key| named.contains(key.as_str()));
    }

    /// Makes sure that the shared objects of a manifest that has just been created will stay: that another manifest names each, but for
    /// `own` ones, and that they are there.
    pub(crate) async fn check_shared(
        &self,
        manifest: &CheckpointManifest,
        own: &BTreeSet<String>,
    ) -> Result<(), StoreError> {
        let step = manifest.step;
        let keys = manifest.shared_objects().map(|object| &object.key);
        let mut unnamed: BTreeSet<&String> = keys.filter(|key| !own.contains(*key)).collect();
        if !unnamed.is_empty() {
            let mut others = self.committed_steps().await?;
            others.retain(|other| *other != step);
            for other in others.into_iter().rev() {
                let other = self.readable_manifests(&[other]).await?;
                for object in other.values().flat_map(|manifest| &manifest.objects) {
                    unnamed.remove(&object.key);
                }
                if unnamed.is_empty() {
                    break;
                }
            }
        }
        if let Some(key) = unnamed.first() {
            return Err(Damage {
                step,
                object: (*key).clone(),
                reason: DamageReason::Removed,
            }
            .into());
        }
        self.check_sizes(step, manifest.shared_objects()).await
    }

    /// The newest checkpoint before `step` that is not quarantined and whose manifest can be used.
    async fn base(&self, step: u64) -> Result<Option<CheckpointManifest>, StoreError> {
        let mut older = self.checkpoints().await?;
        older.retain(|other| *other < step);
        for candidate in older.into_iter().rev().take(BASES_MAX) {
            match self.load_manifest(candidate).await {
                Ok(manifest) => return Ok(Some(manifest)),
                Err(
                    error @ (StoreError::Damaged(_)
                    | StoreError::NoCheckpoint { .. }
                    | StoreError::ForeignCheckpoint { .. }),
                ) => {
                    tracing::warn!(%error, "a checkpoint is passed over when looking for unchanged blocks");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// The keys of the objects that checkpoints are quarantined for. If a record does not tell, all that its checkpoint names.
    async fn suspects(&self) -> Result<BTreeSet<String>, StoreError> {
        let mut suspects = BTreeSet::new();
        for step in self.quarantined_steps().await? {
            let Some(record) = self.quarantined_checkpoint(step).await? else {
                continue;
            };
            if !record.objects.is_empty() {
                suspects.extend(record.objects.into_iter().map(|object| object.key));
                continue;
            }
            match self.load_manifest(step).await {
                Ok(manifest) => {
                    suspects.extend(manifest.objects.into_iter().map(|object| object.key));
                }
                Err(error) if error.kind() == ErrorKind::Data => {}
                Err(StoreError::NoCheckpoint { .. } | StoreError::ForeignCheckpoint { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(suspects)
    }

    /// Reads the shared objects of a manifest that are known to have been damaged.
    pub(crate) async fn check_suspects(
        &self,
        manifest: &CheckpointManifest,
    ) -> Result<(), StoreError> {
        if manifest.shared_objects().next().is_none() {
            return Ok(());
        }
        let suspects = self.suspects().await?;
        let suspected = manifest
            .shared_objects()
            .filter(|object| suspects.contains(&object.key));
        self.check_objects(manifest.step, suspected).await
    }

    /// Reads objects and compares their digests; the first that is damaged is the error.
    pub(crate) async fn check_objects<'a>(
        &self,
        step: u64,
        objects: impl Iterator<Item = &'a CheckpointObject>,
    ) -> Result<(), StoreError> {
        let objects: Vec<&CheckpointObject> = objects.collect();
        for object in objects {
            let checked = self.verify_object(object, &mut None).await?;
            if let Some(reason) = checked {
                return Err(Damage {
                    step,
                    object: object.key.clone(),
                    reason,
                }
                .into());
            }
        }
        Ok(())
    }

    /// The keys that the manifests of `steps` name, without those that cannot be read.
    pub(crate) async fn named_by(&self, steps: &[u64]) -> Result<BTreeSet<String>, StoreError> {
        let manifests = self.readable_manifests(steps).await?;
        let objects = manifests
            .into_values()
            .flat_map(|manifest| manifest.objects);
        Ok(objects.map(|object| object.key).collect())
    }
}

/// The entries of `ours` whose values are those of an entry in `theirs`, with its place.
fn unchanged(ours: &[BlockEntry], theirs: &[BlockEntry]) -> Vec<BlockEntry> {
    let theirs: BTreeMap<u32, &BlockEntry> =
        theirs.iter().map(|entry| (entry.block, entry)).collect();
    let same = |entry: &BlockEntry| {
        let there = theirs.get(&entry.block)?;
        let moved = BlockEntry {
            offset: there.offset,
            ..entry.clone()
        };
        let and_extra = BlockEntry {
            extra: there.extra.clone(),
            ..moved.clone()
        };
        (and_extra == **there).then_some(moved)
    };
    ours.iter().filter_map(same).collect()
}

/// Whether what is taken from an object is at least half of it.
fn is_mostly_used(object: &CheckpointObject) -> bool {
    let values = |entry: &BlockEntry| entry.lens().iter().sum::<u64>();
    let used: u64 = object.blocks.iter().map(|entry| 4 * values(entry)).sum();
    used > 0 && 2 * used >= object.bytes
}

#[cfg(test)]
mod tests;
