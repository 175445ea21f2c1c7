//! Checkpoints: which are due, who stores what, and when a manifest may name it all.

use std::collections::{BTreeMap, BTreeSet};

use super::machine::{Coordinator, Phase};
use super::members::is_live;
use super::{Effect, Note};
use crate::ids::{BlockId, Member, Step};
use crate::message::{Message, Numerics};
use crate::retry::Retry;

/// Checkpoints that may be on their way at once: each is a copy of the state in memory. While the store is slower than that, the
/// oldest goes on, so that some checkpoint gets done, and the newest takes the place of those between.
const PENDING_MAX: usize = 2;
/// Checkpoints that only wait for their manifest hold no state, but do not pile up either.
const COMMITTING_MAX: usize = 8;
/// Storing takes longer than a message: missing parts are asked for after this many resend times.
const STORE_RESENDS: u64 = 4;

/// A checkpoint on its way.
#[derive(Debug)]
pub(super) struct Checkpoint {
    /// Who stores each block.
    storers: BTreeMap<BlockId, Member>,
    stored: BTreeSet<BlockId>,
    objects: Vec<Vec<u8>>,
    /// The manifest was asked for.
    committing: bool,
    retry: Retry,
}

impl Checkpoint {
    /// Whether its manifest was asked for.
    pub(super) fn is_committing(&self) -> bool {
        self.committing
    }
}

impl<N: Numerics> Coordinator<N> {
    fn is_checkpoint_due(&self, version: Step) -> bool {
        let every = self.config.checkpoint_every;
        self.is_last(version) || (every > 0 && version.0 > 0 && version.0.is_multiple_of(every))
    }

    /// Opens the checkpoint of `version` if one is due; returns whether the shards shall snapshot it.
    pub(super) fn begin_checkpoint(&mut self, now_ms: u64, version: Step) -> bool {
        let forced =
            std::mem::take(&mut self.checkpoint_next) | std::mem::take(&mut self.checkpoint_due);
        if !(forced || self.is_checkpoint_due(version))
            || version <= self.committed
            || self.checkpoints.contains_key(&version)
        {
            return false;
        }
        self.supersede(version);
        let storers = (0..)
            .zip(self.view.iter().flat_map(|view| &view.placements))
            .map(|(block, placement)| (block, placement.storer()))
            .collect();
        let retry = Retry::new(now_ms, STORE_RESENDS * self.config.resend_ms);
        self.checkpoints.insert(
            version,
            Checkpoint {
                storers,
                stored: BTreeSet::new(),
                objects: Vec::new(),
                committing: false,
                retry,
            },
        );
        true
    }

    /// Makes room for the checkpoint of `version`.
    fn supersede(&mut self, version: Step) {
        let pending = |checkpoint: &&Checkpoint| !checkpoint.committing;
        let num_pending = self.checkpoints.values().filter(pending).count();
        let too_many = num_pending >= PENDING_MAX || self.checkpoints.len() >= COMMITTING_MAX;
        let youngest = self
            .checkpoints
            .iter()
            .rev()
            .find(|(_, checkpoint)| num_pending == 0 || !checkpoint.committing)
            .map(|(version, _)| *version);
        if let (true, Some(victim)) = (too_many, youngest) {
            self.give_up(victim, version);
        }
    }

    fn give_up(&mut self, version: Step, by: Step) {
        if self.checkpoints.remove(&version).is_some() {
            self.note(Note::CheckpointSuperseded { version, by });
        }
    }

    /// A leader that starts at a due version takes its checkpoint by asking for it.
    pub(super) fn begin_checkpoint_here(&mut self, now_ms: u64) {
        let version = self.work.step;
        if self.begin_checkpoint(now_ms, version) {
            self.ask_for_snapshots(version);
        }
    }

    /// Asks for missing parts: whoever stores them while the version is current, and after that anybody who might have.
    fn ask_for_snapshots(&mut self, version: Step) {
        let Some(checkpoint) = self.checkpoints.get(&version) else {
            return;
        };
        let mut asked: BTreeMap<Member, Vec<BlockId>> = BTreeMap::new();
        for (block, storer) in &checkpoint.storers {
            if checkpoint.stored.contains(block) {
                continue;
            }
            asked.entry(*storer).or_default().push(*block);
            if version < self.work.step
                && let Some(placement) = self
                    .view
                    .as_ref()
                    .and_then(|view| view.placements.get(*block as usize))
            {
                for member in placement.replicas().filter(|member| member != storer) {
                    asked.entry(member).or_default().push(*block);
                }
            }
        }
        for (member, blocks) in asked {
            let message = Message::Snapshot {
                epoch: self.epoch,
                version,
                blocks,
            };
            self.send(member, message);
        }
    }

    pub(super) fn on_stored(&mut self, version: Step, blocks: &[BlockId], object: Vec<u8>) {
        let num_blocks = self.config.num_blocks;
        let Some(checkpoint) = self.checkpoints.get_mut(&version) else {
            return;
        };
        let before = checkpoint.stored.len();
        checkpoint
            .stored
            .extend(blocks.iter().copied().filter(|block| *block < num_blocks));
        if checkpoint.stored.len() > before {
            checkpoint.objects.push(object);
        }
        self.try_commit(version);
    }

    /// Asks for the manifest when everything is stored and the version, if it is evaluated at all, is evaluated: the manifest tells the
    /// loss, and once the last one exists nothing is left to do. A version that the run is held at is not evaluated now.
    pub(super) fn try_commit(&mut self, version: Step) {
        let is_current = self.work.step == version;
        let is_unevaluated = is_current && !self.is_evaluated() && !self.is_held();
        if is_unevaluated || (self.is_last(version) && !is_current) {
            return;
        }
        let Some(checkpoint) = self.checkpoints.get_mut(&version) else {
            return;
        };
        if checkpoint.committing || checkpoint.stored.len() < self.config.num_blocks as usize {
            return;
        }
        checkpoint.committing = true;
        let objects = std::mem::take(&mut checkpoint.objects);
        self.out.push(Effect::CommitManifest { version, objects });
    }

    pub(super) fn on_manifest_committed(&mut self, now_ms: u64, version: Step) {
        if self.checkpoints.remove(&version).is_some() {
            self.note(Note::CheckpointCommitted { version });
        }
        self.committed = self.committed.max(version);
        // An older one that is not complete by now will not be needed.
        let older: Vec<Step> = self
            .checkpoints
            .range(..version)
            .filter(|(_, checkpoint)| !checkpoint.committing)
            .map(|(older, _)| *older)
            .collect();
        for older in older {
            self.give_up(older, version);
        }
        if self.phase == Phase::Training {
            self.tend_drain(now_ms);
        }
        if self.is_last(version) && self.phase != Phase::Finished {
            self.finish(now_ms);
        }
    }

    /// A checkpoint whose objects are gone is no checkpoint. The last one is begun again with the next tick.
    pub(super) fn on_manifest_refused(&mut self, version: Step) {
        if self.checkpoints.remove(&version).is_some() {
            self.note(Note::CheckpointAbandoned { version });
        }
    }

    /// Where a shard that was to store a block holds it no more, another one does, while the version is current. Later only a shard
    /// that is still there may have stored it.
    pub(super) fn reassign_snapshots(&mut self) {
        let Some(view) = &self.view else {
            return;
        };
        let step = self.work.step;
        let mut reassigned = Vec::new();
        let mut abandoned = Vec::new();
        for (version, checkpoint) in &mut self.checkpoints {
            let missing = checkpoint
                .storers
                .iter_mut()
                .zip(&view.placements)
                .filter(|((block, _), _)| !checkpoint.stored.contains(block));
            for ((_, storer), placement) in missing {
                if placement.replicas().any(|member| member == *storer) {
                    continue;
                }
                if *version == step {
                    *storer = placement.storer();
                    reassigned.push(*version);
                } else if !is_live(&self.peers, *storer) {
                    abandoned.push(*version);
                }
            }
        }
        reassigned.dedup();
        abandoned.dedup();
        for version in reassigned {
            self.ask_for_snapshots(version);
        }
        for version in abandoned {
            self.checkpoints.remove(&version);
            self.note(Note::CheckpointAbandoned { version });
        }
    }

    /// Whether a member's part of a checkpoint is still to come.
    pub(super) fn stores(&self, member: Member) -> bool {
        self.checkpoints.values().any(|checkpoint| {
            checkpoint
                .storers
                .iter()
                .any(|(block, storer)| *storer == member && !checkpoint.stored.contains(block))
        })
    }

    pub(super) fn tend_checkpoints(&mut self, now_ms: u64) {
        let due: Vec<Step> = self
            .checkpoints
            .iter_mut()
            .filter(|(_, checkpoint)| !checkpoint.committing)
            .filter_map(|(version, checkpoint)| checkpoint.retry.fires(now_ms).then_some(*version))
            .collect();
        for version in due {
            self.ask_for_snapshots(version);
        }
        // A checkpoint of the last version is taken whatever happened to its first attempt.
        if self.is_last(self.work.step) {
            self.begin_checkpoint_here(now_ms);
        }
    }
}
