//! Reading checkpoints. Every byte that comes out has been compared with a digest.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::sync::mpsc;

use futures::{FutureExt, StreamExt, TryStreamExt};
use object_store::GetOptions;
use object_store::path::Path;

use crate::block::BlockState;
use crate::digest::{optimizer_digest, param_digest};
use crate::error::{Damage, DamageReason, StoreError, io};
use crate::local;
use crate::manifest::{
    BlockEntry, CheckpointDigest, CheckpointManifest, CheckpointObject, manifest_key,
};
use crate::run_store::RunStore;
use crate::sealed::Unreadable;

/// Bytes asked for at once while loading.
const BATCH_BYTES: u64 = 8 << 20;

/// Bytes between two blocks that are read in vain rather than asked around.
const GAP_BYTES_MAX: u64 = 64 << 10;

/// Batches on their way or being verified; bounds what is held beside the result.
const BATCHES_IN_FLIGHT_MAX: usize = 4;

/// Blocks that wait to be verified.
const READ_AHEAD_BLOCKS: usize = 2;

/// What [`RunStore::latest_intact`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LatestIntact {
    /// The newest checkpoint that verifies; `None` if there is none.
    pub checkpoint: Option<CheckpointManifest>,
    /// What is damaged in the checkpoints after it, newest first.
    pub damaged: Vec<Damage>,
}

/// Blocks of a checkpoint, as [`RunStore::load`] gives them.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// The blocks, in the order in which they were asked for.
    pub states: Vec<BlockState>,
    /// How many different ones came from this node.
    pub num_near: usize,
}

impl RunStore {
    /// The newest committed step, from a list that may be old and from `hints`, as [`RunStore::latest_intact`], without a look at
    /// what it consists of.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::NoRun`].
    pub async fn latest_committed(&self, hints: &[u64]) -> Result<Option<u64>, StoreError> {
        self.ping().await?;
        let mut steps: BTreeSet<u64> = self.checkpoints().await?.into_iter().collect();
        let listed = steps.last().copied();
        steps.extend(hints);
        let quarantined = self.quarantined_steps().await?;
        for step in steps.into_iter().rev() {
            if quarantined.contains(&step) {
                continue;
            }
            if Some(step) == listed || self.get(&manifest_key(step)).await?.is_some() {
                return Ok(Some(step));
            }
        }
        Ok(None)
    }

    /// The committed steps that are not quarantined, ascending. Says nothing about damage that nobody has found yet.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub async fn checkpoints(&self) -> Result<Vec<u64>, StoreError> {
        let quarantined = self.quarantined_steps().await?;
        let mut steps = self.committed_steps().await?;
        steps.retain(|step| !quarantined.contains(step));
        Ok(steps)
    }

    /// Makes sure that no newer program has written the newest checkpoint; call it once at start. Says nothing about damage.
    ///
    /// # Errors
    /// [`StoreError::NewerVersion`], [`StoreError::Io`].
    pub async fn check_versions(&self) -> Result<(), StoreError> {
        let Some(newest) = self.checkpoints().await?.pop() else {
            return Ok(());
        };
        match self.load_manifest(newest).await {
            Err(error @ (StoreError::NewerVersion { .. } | StoreError::Io { .. })) => Err(error),
            _ => Ok(()),
        }
    }

    /// The manifest of a committed step.
    ///
    /// # Errors
    /// [`StoreError::NoCheckpoint`]; [`StoreError::Damaged`] if it cannot be used; [`StoreError::ForeignCheckpoint`] if it
    /// is another run's; [`StoreError::NewerVersion`]; [`StoreError::NoRun`].
    pub async fn load_manifest(&self, step: u64) -> Result<CheckpointManifest, StoreError> {
        let key = manifest_key(step);
        let bytes = self
            .get(&key)
            .await?
            .ok_or(StoreError::NoCheckpoint { step })?;
        let manifest = CheckpointManifest::decode(step, &bytes).map_err(|error| match error {
            Unreadable::Newer { version, known } => StoreError::NewerVersion {
                key,
                version,
                known,
            },
            Unreadable::Damaged(reason) => Damage {
                step,
                object: key,
                reason: DamageReason::Manifest(reason),
            }
            .into(),
        })?;
        self.check_origin(&manifest).await?;
        Ok(manifest)
    }

    /// The digests of a committed step, as its manifest has them; see [`CheckpointDigest`].
    ///
    /// # Errors
    /// As [`RunStore::load_manifest`].
    pub async fn digest(&self, step: u64) -> Result<CheckpointDigest, StoreError> {
        Ok(self.load_manifest(step).await?.digest)
    }

    /// Loads blocks of a committed step, in the order of `blocks`, reading only their bytes.
    ///
    /// # Errors
    /// As [`RunStore::load`].
    pub async fn load_blocks(
        &self,
        step: u64,
        blocks: &[u32],
    ) -> Result<Vec<BlockState>, StoreError> {
        Ok(self.load(step, blocks).await?.states)
    }

    /// Loads blocks of a committed step. What this node has kept ([`RunStore::with_near_copies`]) and verifies is not asked of the store,
    /// which only says what is right: its manifest.
    ///
    /// # Errors
    /// As [`RunStore::load_manifest`]; [`StoreError::UnknownBlock`]; [`StoreError::Damaged`] naming the object and its
    /// size or digest if something does not verify.
    pub async fn load(&self, step: u64, blocks: &[u32]) -> Result<Loaded, StoreError> {
        let manifest = self.load_manifest(step).await?;
        self.load_from(&manifest, blocks).await
    }

    pub(crate) async fn load_from(
        &self,
        manifest: &CheckpointManifest,
        blocks: &[u32],
    ) -> Result<Loaded, StoreError> {
        let (step, num_blocks) = (manifest.step, manifest.num_blocks);
        if let Some(&block) = blocks.iter().find(|block| **block >= num_blocks) {
            return Err(StoreError::UnknownBlock {
                step,
                block,
                num_blocks,
            });
        }
        let wanted_blocks: BTreeSet<u32> = blocks.iter().copied().collect();
        let mut loaded: BTreeMap<u32, BlockState> = BTreeMap::new();
        let mut num_near = 0;
        for object in &manifest.objects {
            let wanted = object.blocks.iter();
            let wanted = wanted.filter(|entry| wanted_blocks.contains(&entry.block));
            let mut wanted: Vec<BlockEntry> = wanted.cloned().collect();
            wanted.sort_by_key(|entry| entry.offset);
            if let Some(near) = self.near.clone() {
                let key = object.key.clone();
                let found = load_file(move || near.open(&key), &mut wanted).await;
                num_near += found.len();
                loaded.extend(found);
            }
            if let Some(folder) = &self.backend.folder {
                // What is wrong with it, the store says in the words that it has for all stores.
                let path = folder.join(&object.key);
                loaded.extend(load_file(move || File::open(path).ok(), &mut wanted).await);
            }
            if wanted.is_empty() {
                continue;
            }
            self.check_size(step, object).await?;
            let loads: Vec<_> = batches(&wanted)
                .into_iter()
                .map(|batch| self.load_batch(step, object, batch).boxed())
                .collect();
            let mut loads = futures::stream::iter(loads).buffer_unordered(BATCHES_IN_FLIGHT_MAX);
            while let Some(states) = loads.try_next().await? {
                loaded.extend(by_block(states));
            }
        }
        let mut states: Vec<BlockState> = Vec::with_capacity(blocks.len());
        for &block in blocks {
            let repeated = || states.iter().find(|state| state.block == block).cloned();
            // A decoded manifest has every block, so only one that was asked for twice is not in the map.
            states.push(
                loaded
                    .remove(&block)
                    .or_else(repeated)
                    .expect("every block was loaded"),
            );
        }
        Ok(Loaded { states, num_near })
    }

    async fn load_batch(
        &self,
        step: u64,
        object: &CheckpointObject,
        entries: &[BlockEntry],
    ) -> Result<Vec<BlockState>, StoreError> {
        let states = self.read_batch(object, entries).await;
        let states = states.map_err(io("read", &object.key))?;
        let entries = entries.to_vec();
        // Beside the batches that are still on their way.
        let verified = tokio::task::spawn_blocking(move || {
            let blocks = entries.iter().zip(states);
            blocks.map(|(entry, state)| verify(entry, state)).collect()
        });
        let verified: Result<_, DamageReason> = verified.await.expect("hashing does not panic");
        verified.map_err(|reason| {
            let object = object.key.clone();
            Damage {
                step,
                object,
                reason,
            }
            .into()
        })
    }

    /// Bytes go from the socket straight to where they stay.
    async fn read_batch(
        &self,
        object: &CheckpointObject,
        entries: &[BlockEntry],
    ) -> object_store::Result<Vec<BlockState>> {
        let mut states: Vec<BlockState> = entries.iter().map(empty).collect();
        let Some(range) = range(entries) else {
            return Ok(states);
        };
        let mut at = range.start;
        let options = GetOptions {
            range: Some(range.into()),
            ..GetOptions::default()
        };
        let path = Path::from(object.key.as_str());
        let mut chunks = self.bulk().get_opts(&path, options).await?.into_stream();
        while let Some(chunk) = chunks.try_next().await? {
            for (entry, state) in entries.iter().zip(&mut states) {
                fill(state, entry, at, &chunk);
            }
            at += chunk.len() as u64;
        }
        Ok(states)
    }

    /// The newest committed checkpoint whose objects all exist and verify, and what is damaged in newer ones.
    ///
    /// A list may be old, even where single objects are never: so the steps of `hints` (those that may be committed, as far as the
    /// caller knows) are looked for one by one as well. Reads the whole checkpoint once, with bounded memory, and what seems
    /// damaged a second time: a bit may have flipped on the way.
    ///
    /// # Errors
    /// As [`RunStore::verify`]; [`StoreError::NoRun`] if the store does not have the run (any more).
    pub async fn latest_intact(&self, hints: &[u64]) -> Result<LatestIntact, StoreError> {
        self.ping().await?;
        let mut steps: BTreeSet<u64> = self.checkpoints().await?.into_iter().collect();
        steps.extend(hints);
        let quarantined = self.quarantined_steps().await?;
        // What is quarantined is told as well.
        steps.extend(&quarantined);
        let mut damaged = Vec::new();
        for step in steps.into_iter().rev() {
            if quarantined.contains(&step) {
                damaged.extend(self.quarantined_damage(step).await?);
                continue;
            }
            let manifest = match self.load_manifest(step).await {
                Err(StoreError::Damaged(_)) => self.load_manifest(step).await,
                other => other,
            };
            let manifest = match manifest {
                Ok(manifest) => manifest,
                Err(StoreError::NoCheckpoint { .. }) => continue,
                Err(StoreError::Damaged(damage)) => {
                    damaged.push(*damage);
                    continue;
                }
                Err(error) => return Err(error),
            };
            let mut found = self.verify_objects(&manifest).await?;
            if !found.is_empty() {
                found = self.verify_objects(&manifest).await?;
            }
            if found.is_empty() {
                return Ok(LatestIntact {
                    checkpoint: Some(manifest),
                    damaged,
                });
            }
            damaged.extend(found);
        }
        Ok(LatestIntact {
            checkpoint: None,
            damaged,
        })
    }
}

/// What has all bytes of these entries, ascending by offset; `None` if there are none.
fn range(entries: &[BlockEntry]) -> Option<Range<u64>> {
    let start = entries.first()?.offset;
    let end = entries.iter().filter_map(BlockEntry::end).max()?;
    (start < end).then_some(start..end)
}

/// The blocks of a file of this machine that are what their digests say; they are taken from `wanted`.
///
/// One thread reads, from front to back: so a disk reads ahead, and several would only wait for fresh memory. Another one verifies.
async fn load_file(
    open: impl FnOnce() -> Option<File> + Send + 'static,
    wanted: &mut Vec<BlockEntry>,
) -> BTreeMap<u32, BlockState> {
    let entries = wanted.clone();
    let load = tokio::task::spawn_blocking(move || {
        let Some(file) = open() else {
            return Vec::new();
        };
        let verified = |(entry, state): (&BlockEntry, BlockState)| {
            let verified = verify(entry, state).inspect_err(|reason| {
                let block = entry.block;
                tracing::warn!(%reason, block, "a copy on this machine is damaged; asking the store");
            });
            verified.ok()
        };
        let (read, states) = mpsc::sync_channel(READ_AHEAD_BLOCKS);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for entry in &entries {
                    if let Ok(state) = local::read_block(&file, entry) {
                        let _ = read.send((entry, state));
                    }
                }
                drop(read);
            });
            states.into_iter().filter_map(verified).collect()
        })
    });
    let found = by_block(load.await.expect("reading a file does not panic"));
    wanted.retain(|entry| !found.contains_key(&entry.block));
    found
}

fn by_block(states: Vec<BlockState>) -> BTreeMap<u32, BlockState> {
    states
        .into_iter()
        .map(|state| (state.block, state))
        .collect()
}

/// Splits entries, ascending by offset, so that one request asks for a bounded number of bytes (or for one block), few of them in vain.
fn batches(entries: &[BlockEntry]) -> Vec<&[BlockEntry]> {
    let mut batches = Vec::new();
    let mut start = 0;
    for at in 1..entries.len() {
        let end = |entry: &BlockEntry| entry.end().unwrap_or(entry.offset);
        let bytes = end(&entries[at]).saturating_sub(entries[start].offset);
        let gap = entries[at].offset.saturating_sub(end(&entries[at - 1]));
        if bytes > BATCH_BYTES || gap > GAP_BYTES_MAX {
            batches.push(&entries[start..at]);
            start = at;
        }
    }
    if start < entries.len() {
        batches.push(&entries[start..]);
    }
    batches
}

/// The block before its bytes have come. What does not come stays zero, which the digests then refuse.
fn empty(entry: &BlockEntry) -> BlockState {
    let [param, m, v, ema] = entry.lens().map(|len| vec![0.0; len as usize]);
    BlockState {
        block: entry.block,
        param,
        m,
        v,
        ema,
        extra: entry.extra.clone(),
    }
}

/// Takes what belongs to the block of `bytes`, which stand in the object from `at` on.
fn fill(state: &mut BlockState, entry: &BlockEntry, at: u64, bytes: &[u8]) {
    let mut start = entry.offset;
    for part in [&mut state.param, &mut state.m, &mut state.v, &mut state.ema] {
        let part: &mut [u8] = bytemuck::cast_slice_mut(part);
        let end = start + part.len() as u64;
        let from = at.max(start);
        let to = (at + bytes.len() as u64).min(end);
        if from < to {
            part[(from - start) as usize..(to - start) as usize]
                .copy_from_slice(&bytes[(from - at) as usize..(to - at) as usize]);
        }
        start = end;
    }
}

/// The block, if it is what its digests say.
fn verify(entry: &BlockEntry, state: BlockState) -> Result<BlockState, DamageReason> {
    for (part, expected, found) in [
        ("parameters", entry.param_digest, param_digest(&state.param)),
        (
            "optimizer",
            entry.optimizer_digest,
            optimizer_digest(&state.m, &state.v, &state.ema),
        ),
    ] {
        if expected != found {
            return Err(DamageReason::Block {
                block: entry.block,
                part,
                expected,
                found,
            });
        }
    }
    Ok(state)
}
