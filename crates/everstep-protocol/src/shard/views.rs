//! Views: what this shard is to each block, and what it owes to others because of it.

use super::Effect;
use super::block::Block;
use super::machine::Shard;
use crate::ids::{BlockId, Lineage, Member, Step};
use crate::message::{Message, Numerics, ReplicaRole, View};
use crate::retry::Retry;

/// A whole block is big: a request for one gets this many resend times before it is repeated.
const SEED_RESENDS: u64 = 4;

impl<N: Numerics> Shard<N> {
    pub(super) fn on_view(&mut self, now_ms: u64, view: View) {
        if view.placements.len() != self.config.num_blocks as usize {
            return;
        }
        self.allegiance.heard(now_ms, true);
        match self.view.as_ref().map(View::id) {
            Some(mine) if view.id() < mine => return,
            Some(mine) if view.id() == mine => {
                self.ready = None;
                self.check_ready();
                return;
            }
            _ => {}
        }
        if view.lineage.root() == self.lineage.root() {
            if view.lineage < self.lineage {
                // It acknowledged under a repair that this leader knows nothing of: only a new life may join.
                return self.end(Effect::Restart);
            }
            if view.lineage > self.lineage {
                // A shard that has missed a repair cannot tell which of its sums that one made void.
                let is_next = view.lineage == self.lineage.repaired();
                if !is_next && self.leads_what_it_loses(&view) {
                    return self.end(Effect::Restart);
                }
                let from = view.repair.filter(|_| is_next).map(|repair| repair.from);
                for block in self.blocks.values_mut() {
                    block.void(from);
                }
                self.lineage = view.lineage;
            }
        } else {
            if self.left.contains(&view.lineage) {
                // What this life acknowledged on that line is still counted there, and is gone: only a new life may join it.
                return self.end(Effect::Restart);
            }
            self.left.insert(self.lineage);
            self.blocks.clear();
            self.storing.clear();
            self.stored.clear();
            self.lineage = view.lineage;
        }
        let restored_from = view.restored_from;
        self.view = Some(view);
        self.ready = None;
        let mut load = Vec::new();
        for id in 0..self.config.num_blocks {
            let Some(role) = self.role(id) else {
                continue;
            };
            let is_new = !self.blocks.contains_key(&id);
            let block = self.blocks.entry(id).or_insert_with(Block::new);
            // Whoever has not acknowledged yet is told again at once: its view may be newer than the last message.
            block.sent.clear();
            block.seeded = None;
            match role {
                ReplicaRole::Primary | ReplicaRole::Backup => {
                    if is_new {
                        load.push(id);
                    }
                    block.seeding = None;
                }
                ReplicaRole::Joining => {
                    if block.replica.is_none() {
                        self.request_seed(now_ms, id);
                    }
                }
            }
        }
        if !load.is_empty() {
            self.out.push(Effect::Load {
                lineage: self.lineage,
                version: restored_from,
                blocks: load,
            });
        }
        let ids: Vec<BlockId> = self.blocks.keys().copied().collect();
        for id in ids {
            self.settle(now_ms, id);
        }
        self.check_ready();
    }

    /// Whether the view makes it primary of a block whose next step is decided, while it has to give up the sum of that step: it could
    /// never apply it. Others are seeded again.
    fn leads_what_it_loses(&self, view: &View) -> bool {
        let Some(repair) = view.repair else {
            return false;
        };
        self.blocks.iter().any(|(id, block)| {
            let placement = view.placements.get(*id as usize);
            placement.is_some_and(|placement| placement.primary == self.config.me)
                && block.version().is_some_and(|version| version < repair.from)
        })
    }

    pub(super) fn on_loaded(
        &mut self,
        now_ms: u64,
        lineage: Lineage,
        version: Step,
        id: BlockId,
        state: N::State,
    ) {
        if lineage.root() != self.lineage.root() {
            return;
        }
        let Some(block) = self.blocks.get_mut(&id) else {
            return;
        };
        if block.replica.is_none() {
            block.install(version, state, None, self.config.num_slots);
            self.settle(now_ms, id);
            self.check_ready();
        }
    }

    /// Tells the leader once that this view's blocks are here.
    pub(super) fn check_ready(&mut self) {
        let Some(id) = self.view.as_ref().map(View::id) else {
            return;
        };
        if self.ready == Some(id) {
            return;
        }
        let waits = (0..self.config.num_blocks).any(|block| {
            matches!(
                self.role(block),
                Some(ReplicaRole::Primary | ReplicaRole::Backup)
            ) && self
                .blocks
                .get(&block)
                .is_none_or(|held| held.replica.is_none())
        });
        if !waits {
            self.ready = Some(id);
            self.send_leader(Message::ViewReady { view: id });
        }
    }

    fn followers(&self, id: BlockId) -> Vec<Member> {
        self.view
            .as_ref()
            .and_then(|view| view.placements.get(id as usize))
            .map(|placement| placement.followers().collect())
            .unwrap_or_default()
    }

    /// As primary: sends the reduced gradient to followers that were not sent it in this view.
    pub(super) fn replicate(&mut self, now_ms: u64, id: BlockId) {
        if self.role(id) != Some(ReplicaRole::Primary) {
            return;
        }
        let followers = self.followers(id);
        let Some(block) = self.blocks.get_mut(&id) else {
            return;
        };
        let (Some(step), Some(reduced)) = (block.version(), block.reduced()) else {
            return;
        };
        let (gradient, testimonies) = (reduced.gradient.clone(), reduced.testimonies.clone());
        for follower in followers {
            if block.acked.contains_key(&follower) || block.sent.contains_key(&follower) {
                continue;
            }
            block
                .sent
                .insert(follower, Retry::new(now_ms, self.config.resend_ms));
            self.out.push(Effect::Send {
                to: follower,
                message: Message::Replicate {
                    lineage: self.lineage,
                    step,
                    block: id,
                    gradient: gradient.clone(),
                    testimonies: testimonies.clone(),
                },
            });
        }
    }

    /// As primary: reports the step to the leader when every backup of this view holds it.
    pub(super) fn report(&mut self, now_ms: u64, id: BlockId) {
        if self.role(id) != Some(ReplicaRole::Primary) {
            return;
        }
        let Some(view) = &self.view else {
            return;
        };
        let view_id = view.id();
        let Some(placement) = view.placements.get(id as usize) else {
            return;
        };
        let Some(block) = self.blocks.get_mut(&id) else {
            return;
        };
        let (Some(step), Some(report)) = (block.version(), block.report(&self.numerics)) else {
            return;
        };
        let replicated = placement
            .backups
            .iter()
            .all(|backup| block.acked.contains_key(backup));
        let said = block
            .reported
            .as_ref()
            .is_some_and(|(said, _)| *said == view_id);
        if !replicated || said {
            return;
        }
        let testimonies = block.all_testimonies(&placement.backups);
        block.reported = Some((view_id, Retry::new(now_ms, self.config.resend_ms)));
        self.send_leader(Message::Reduced {
            view: view_id,
            step,
            block: id,
            report,
            testimonies,
        });
    }

    /// As follower: tells the primary of this view once that the reduced gradient is here, so that a promoted one need not send it.
    pub(super) fn acknowledge(&mut self, id: BlockId) {
        if !matches!(
            self.role(id),
            Some(ReplicaRole::Backup | ReplicaRole::Joining)
        ) {
            return;
        }
        let Some(primary) = self.primary(id) else {
            return;
        };
        let Some(block) = self.blocks.get_mut(&id) else {
            return;
        };
        let Some(step) = block.version() else {
            return;
        };
        if block.is_reduced() && block.acked_to != Some(primary) {
            block.acked_to = Some(primary);
            let testimonies = block.testimonies(step);
            let lineage = self.lineage;
            self.send(
                primary,
                Message::ReplicateAck {
                    lineage,
                    step,
                    block: id,
                    testimonies,
                },
            );
        }
    }

    pub(super) fn request_seed(&mut self, now_ms: u64, id: BlockId) {
        let Some(primary) = self.primary(id) else {
            return;
        };
        let Some(block) = self.blocks.get_mut(&id) else {
            return;
        };
        if block.seeding.is_none() {
            block.seeding = Some(Retry::new(now_ms, SEED_RESENDS * self.config.resend_ms));
        }
        let lineage = self.lineage;
        self.send(primary, Message::SeedRequest { lineage, block: id });
    }

    /// As joining replica that follows the log: tells the leader the version from which it could serve.
    pub(super) fn tell_seeded(&mut self, now_ms: u64, id: BlockId) {
        if self.role(id) != Some(ReplicaRole::Joining) {
            return;
        }
        let Some(block) = self.blocks.get_mut(&id) else {
            return;
        };
        let Some(version) = block.version() else {
            return;
        };
        let said = block
            .seeded
            .as_ref()
            .is_some_and(|(said, _)| *said == version);
        if said {
            return;
        }
        block.seeded = Some((version, Retry::new(now_ms, self.config.resend_ms)));
        self.say_seeded(id, version);
    }

    fn say_seeded(&mut self, id: BlockId, version: Step) {
        let lineage = self.lineage;
        self.send_leader(Message::Seeded {
            lineage,
            block: id,
            version,
        });
    }

    pub(super) fn on_tick(&mut self, now_ms: u64) {
        if self.allegiance.must_greet(now_ms) {
            self.greet(now_ms);
        }
        for id in 0..self.config.num_blocks {
            let Some(role) = self.role(id) else {
                continue;
            };
            let Some(block) = self.blocks.get_mut(&id) else {
                continue;
            };
            match role {
                ReplicaRole::Primary => {
                    if block.is_reduced() {
                        self.tend_primary(now_ms, id);
                    }
                }
                ReplicaRole::Backup | ReplicaRole::Joining => self.tend_follower(now_ms, id),
            }
        }
    }

    /// A primary says again what was not acknowledged.
    fn tend_primary(&mut self, now_ms: u64, id: BlockId) {
        let followers = self.followers(id);
        let Some(block) = self.blocks.get_mut(&id) else {
            return;
        };
        block.sent.retain(|member, _| followers.contains(member));
        let due: Vec<Member> = block
            .sent
            .iter_mut()
            .filter_map(|(member, retry)| retry.fires(now_ms).then_some(*member))
            .collect();
        let (Some(step), Some(reduced), Some(report)) = (
            block.version(),
            block.reduced(),
            block.report(&self.numerics),
        ) else {
            return;
        };
        let gradient = reduced.gradient.clone();
        let testimonies = reduced.testimonies.clone();
        let backups = self
            .view
            .as_ref()
            .and_then(|view| view.placements.get(id as usize))
            .map(|placement| placement.backups.clone())
            .unwrap_or_default();
        let all = block.all_testimonies(&backups);
        let again = block
            .reported
            .as_mut()
            .and_then(|(view, retry)| retry.fires(now_ms).then_some(*view));
        for follower in due {
            self.out.push(Effect::Send {
                to: follower,
                message: Message::Replicate {
                    lineage: self.lineage,
                    step,
                    block: id,
                    gradient: gradient.clone(),
                    testimonies: testimonies.clone(),
                },
            });
        }
        if let Some(view) = again {
            self.send_leader(Message::Reduced {
                view,
                step,
                block: id,
                report,
                testimonies: all,
            });
        }
        self.replicate(now_ms, id);
        self.report(now_ms, id);
    }

    /// A follower that is empty, or whose log has had a gap for a while, asks for the whole block.
    fn tend_follower(&mut self, now_ms: u64, id: BlockId) {
        let joining = self.role(id) == Some(ReplicaRole::Joining);
        let resend_ms = self.config.resend_ms;
        let Some(block) = self.blocks.get_mut(&id) else {
            return;
        };
        if block.has_gap() {
            let gap = block
                .gap
                .get_or_insert_with(|| Retry::new(now_ms, SEED_RESENDS * resend_ms));
            if gap.fires(now_ms) {
                self.request_seed(now_ms, id);
            }
            return;
        }
        block.gap = None;
        let empty = block.replica.is_none();
        if joining
            && empty
            && block
                .seeding
                .get_or_insert_with(|| Retry::new(now_ms, resend_ms))
                .fires(now_ms)
        {
            return self.request_seed(now_ms, id);
        }
        let again = block
            .seeded
            .as_mut()
            .filter(|_| joining)
            .and_then(|(version, retry)| retry.fires(now_ms).then_some(*version));
        if let Some(version) = again {
            self.say_seeded(id, version);
        }
    }
}
