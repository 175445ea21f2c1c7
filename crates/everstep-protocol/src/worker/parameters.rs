//! What the device holds, what has arrived for it, and what was asked for.

use std::collections::BTreeMap;

use super::machine::Worker;
use crate::ids::{BlockId, Member, Step};
use crate::message::{Message, Numerics, View};
use crate::retry::Retry;

/// The device's parameters and the pulls that complete them.
#[derive(Debug)]
pub(super) struct Device<N: Numerics> {
    /// Version of each block on the device.
    versions: Vec<Option<Step>>,
    /// A version, and how many blocks on the device are of it: so that not all are looked at whenever one arrives.
    complete: (Step, usize),
    /// Blocks of the wanted version that wait for the device.
    arrived: BTreeMap<BlockId, N::Parameters>,
    /// Blocks that were asked for, and of whom.
    pulls: BTreeMap<BlockId, (Member, Retry)>,
    /// When a block arrived last.
    heard_ms: u64,
}

impl<N: Numerics> Device<N> {
    pub(super) fn new(num_blocks: u32) -> Self {
        Self {
            versions: vec![None; num_blocks as usize],
            complete: (Step::default(), 0),
            arrived: BTreeMap::new(),
            pulls: BTreeMap::new(),
            heard_ms: 0,
        }
    }

    /// Wants nothing any more.
    pub(super) fn leave(&mut self) {
        self.arrived.clear();
        self.pulls.clear();
    }

    /// Blocks that were asked of a shard that does not hold them any more are asked for again.
    pub(super) fn retarget(&mut self, view: &View) {
        self.pulls.retain(|block, (target, _)| {
            view.placements
                .get(*block as usize)
                .is_some_and(|placement| placement.replicas().any(|replica| replica == *target))
        });
    }

    /// A block of the wanted version is here.
    pub(super) fn arrive(
        &mut self,
        now_ms: u64,
        version: Step,
        block: BlockId,
        parameters: N::Parameters,
    ) {
        let Some(on_device) = self.versions.get(block as usize) else {
            return;
        };
        self.pulls.remove(&block);
        self.heard_ms = now_ms;
        if *on_device != Some(version) {
            self.arrived.entry(block).or_insert(parameters);
        }
    }

    /// Takes what has arrived of `step`, for the device.
    pub(super) fn load(&mut self, step: Step) -> BTreeMap<BlockId, N::Parameters> {
        if self.complete.0 != step {
            let is_of_step = |version: &&Option<Step>| **version == Some(step);
            self.complete = (step, self.versions.iter().filter(is_of_step).count());
        }
        for block in self.arrived.keys() {
            if let Some(version) = self.versions.get_mut(*block as usize)
                && *version != Some(step)
            {
                *version = Some(step);
                self.complete.1 += 1;
            }
        }
        std::mem::take(&mut self.arrived)
    }

    /// Whether every block on the device is of `step`, which was loaded last.
    pub(super) fn is_at(&self, step: Step) -> bool {
        self.complete == (step, self.versions.len())
    }
}

impl<N: Numerics> Worker<N> {
    /// Asks for blocks of the step that are neither here nor asked for lately. Workers spread over a block's replicas; a
    /// repeat goes to the primary, which is never behind.
    pub(super) fn pull(&mut self, now_ms: u64) {
        let (Some(step), Some(view)) = (self.step, &self.view) else {
            return;
        };
        let mut wanted: BTreeMap<Member, Vec<BlockId>> = BTreeMap::new();
        for (block, placement) in (0..).zip(&view.placements) {
            let there = self.device.versions[block as usize] == Some(step)
                || self.device.arrived.contains_key(&block);
            if there {
                continue;
            }
            let target = match self.device.pulls.get_mut(&block) {
                Some((target, retry)) => {
                    if !retry.fires_unless_heard(now_ms, self.device.heard_ms) {
                        continue;
                    }
                    *target = placement.primary;
                    *target
                }
                None => {
                    let count = 1 + placement.backups.len();
                    let pick = (block as usize + self.config.me.index as usize) % count;
                    let target = placement.replicas().nth(pick).unwrap_or(placement.primary);
                    let retry = Retry::new(now_ms, self.config.resend_ms);
                    self.device.pulls.insert(block, (target, retry));
                    target
                }
            };
            wanted.entry(target).or_default().push(block);
        }
        for (target, blocks) in wanted {
            self.send(
                target,
                Message::Pull {
                    version: step,
                    blocks,
                },
            );
        }
    }
}
