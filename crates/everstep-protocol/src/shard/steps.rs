//! The path of a step through a shard's blocks: partial sums in, replication, decision, parameters out.

use super::Effect;
use super::block::{Early, Reduced};
use super::machine::Shard;
use crate::ids::{BlockId, Lineage, Member, Step};
use crate::message::{Decision, Message, Numerics, ReplicaRole, Testimony, ViewId};
use crate::tree::Insertion;

impl<N: Numerics> Shard<N> {
    pub(super) fn on_pull(&mut self, from: Member, version: Step, blocks: &[BlockId]) {
        for &id in blocks {
            let Some(block) = self.blocks.get_mut(&id) else {
                continue;
            };
            match block.version() {
                Some(mine) if mine > version => {}
                Some(mine) if mine == version => {
                    if let Some(parameters) = block.parameters(&self.numerics, id) {
                        self.out.push(Effect::Send {
                            to: from,
                            message: Message::Parameters {
                                version,
                                block: id,
                                parameters,
                            },
                        });
                    }
                }
                _ => {
                    block.pulls.insert(from.index, (from, version));
                }
            }
        }
    }

    pub(super) fn on_partial(&mut self, now_ms: u64, id: BlockId, partial: Early<N>) {
        let Some(block) = self.blocks.get_mut(&id) else {
            return;
        };
        let Some(version) = block.version() else {
            return;
        };
        let (from, step, range) = (partial.from, partial.step, partial.range);
        if step > version {
            // One step ahead: the worker got its parameters from a replica that has applied already.
            if step == version.next() && block.early.len() < 2 * self.config.num_slots as usize {
                block.early.push(partial);
            }
            return;
        }
        if step == version {
            let Early {
                gradient, digests, ..
            } = partial;
            let insertion = block.add(&self.numerics, id, from, range, gradient, &digests);
            if insertion == Insertion::NotANode {
                return;
            }
        }
        let lineage = self.lineage;
        self.send(
            from,
            Message::PartialAck {
                lineage,
                step,
                range,
                block: id,
            },
        );
        self.settle(now_ms, id);
    }

    pub(super) fn on_replicate(
        &mut self,
        now_ms: u64,
        from: Member,
        step: Step,
        id: BlockId,
        gradient: N::Gradient,
        testimonies: Vec<Testimony>,
    ) {
        let Some(block) = self.blocks.get_mut(&id) else {
            return;
        };
        let numerics = &self.numerics;
        if let Some(entry) = block.entry(step)
            && entry.reduced.is_none()
        {
            entry.reduced = Some(Reduced {
                report: numerics.report(id, &gradient),
                gradient,
                testimonies,
                from: Some(from),
            });
        }
        // Held or past: say so, again if need be. What is ahead of this replica is acknowledged when it gets there.
        let held = block
            .version()
            .is_some_and(|version| step < version || (step == version && block.is_reduced()));
        if held {
            if block.version() == Some(step) {
                block.acked_to = Some(from);
            }
            let testimonies = block.testimonies(step);
            let lineage = self.lineage;
            self.send(
                from,
                Message::ReplicateAck {
                    lineage,
                    step,
                    block: id,
                    testimonies,
                },
            );
        }
        self.settle(now_ms, id);
    }

    pub(super) fn on_replicate_ack(
        &mut self,
        now_ms: u64,
        from: Member,
        step: Step,
        id: BlockId,
        testimonies: Vec<Testimony>,
    ) {
        let Some(block) = self.blocks.get_mut(&id) else {
            return;
        };
        for (_, retry) in block.sent.iter_mut() {
            retry.postpone(now_ms);
        }
        if block.version() == Some(step) {
            block.acked.insert(from, testimonies);
            block.sent.remove(&from);
            self.settle(now_ms, id);
        }
    }

    pub(super) fn on_seed_request(&mut self, from: Member, id: BlockId) {
        let Some(replica) = self
            .blocks
            .get(&id)
            .and_then(|block| block.replica.as_ref())
        else {
            return;
        };
        let message = Message::Seed {
            lineage: self.lineage,
            block: id,
            version: replica.version,
            last: replica.last,
            state: replica.state.clone(),
        };
        self.send(from, message);
    }

    pub(super) fn on_decide(
        &mut self,
        now_ms: u64,
        decided_in: ViewId,
        lineage: Lineage,
        step: Step,
        decision: Decision,
        snapshot: bool,
    ) {
        if lineage != self.lineage {
            return;
        }
        let is_behind = self
            .view
            .as_ref()
            .is_some_and(|view| view.id() < decided_in);
        // Only this leader's view tells what is not wanted any more; it may count on blocks that the one before had unlisted.
        let has_view = self.follows_view();
        let ids: Vec<BlockId> = self.blocks.keys().copied().collect();
        let mut too_early = false;
        for id in ids {
            let role = self.role(id);
            if role == Some(ReplicaRole::Joining)
                && self.is_unconfirmed(id, step)
                && (is_behind || self.primary(id) != self.sender(id))
            {
                // Nobody has asked what it holds, and the primary that was asked may have summed what an audit put in the place of a lie.
                too_early = true;
                if !is_behind {
                    self.request_seed(now_ms, id);
                }
                continue;
            }
            let listed = !has_view || role.is_some();
            let Some(block) = self.blocks.get_mut(&id) else {
                continue;
            };
            if !listed && block.version().is_none_or(|version| version <= step) {
                // The step moved on without this replica: nothing that it holds counts any more.
                self.blocks.remove(&id);
                continue;
            }
            if let Some(entry) = block.entry(step) {
                entry.decision.get_or_insert((decision, snapshot));
            }
            self.settle(now_ms, id);
        }
        let behind = self.blocks.iter().any(|(id, block)| {
            matches!(
                self.role(*id),
                Some(ReplicaRole::Primary | ReplicaRole::Backup)
            ) && block.version().is_none_or(|version| version <= step)
        });
        if !behind && !too_early {
            self.send_leader(Message::Applied { lineage, step });
        }
    }

    /// Whether the block's sum of `step` was audited and waits for the decision.
    fn is_unconfirmed(&self, id: BlockId, step: Step) -> bool {
        self.blocks.get(&id).is_some_and(|block| {
            block.version() == Some(step)
                && block
                    .reduced()
                    .is_some_and(|reduced| !reduced.testimonies.is_empty())
        })
    }

    /// Who sent the sum of the block's current step.
    fn sender(&self, id: BlockId) -> Option<Member> {
        self.blocks.get(&id)?.reduced()?.from
    }

    /// What an earlier leader decided and is not applied yet is for the new leader to decide again: it may count on fewer
    /// steps and on other replicas.
    pub(super) fn forget_decisions(&mut self) {
        for block in self.blocks.values_mut() {
            for entry in block.log.values_mut() {
                entry.decision = None;
            }
        }
    }

    /// Carries a block as far as it goes, and says what is due.
    pub(super) fn settle(&mut self, now_ms: u64, id: BlockId) {
        loop {
            self.take_up(id);
            let Some(block) = self.blocks.get_mut(&id) else {
                return;
            };
            let Some((step, snapshot)) = block.advance(&self.numerics, id) else {
                break;
            };
            if snapshot {
                self.snapshot_if_mine(step.next(), id);
            }
        }
        self.replicate(now_ms, id);
        self.report(now_ms, id);
        self.acknowledge(id);
        self.tell_seeded(now_ms, id);
    }

    /// Answers what waited for this version: early partial sums and pulls.
    fn take_up(&mut self, id: BlockId) {
        let Some(block) = self.blocks.get_mut(&id) else {
            return;
        };
        let Some(version) = block.version() else {
            return;
        };
        if !block.early.is_empty() {
            for early in std::mem::take(&mut block.early) {
                if early.step > version {
                    block.early.push(early);
                    continue;
                }
                if early.step == version {
                    let (worker, range) = (early.from, early.range);
                    let numerics = &self.numerics;
                    let insertion =
                        block.add(numerics, id, worker, range, early.gradient, &early.digests);
                    if insertion == Insertion::NotANode {
                        continue;
                    }
                }
                self.out.push(Effect::Send {
                    to: early.from,
                    message: Message::PartialAck {
                        lineage: self.lineage,
                        step: early.step,
                        range: early.range,
                        block: id,
                    },
                });
            }
        }
        if block.pulls.values().any(|(_, wanted)| *wanted <= version) {
            for (index, (worker, wanted)) in std::mem::take(&mut block.pulls) {
                if wanted > version {
                    block.pulls.insert(index, (worker, wanted));
                } else if wanted == version
                    && let Some(parameters) = block.parameters(&self.numerics, id)
                {
                    self.out.push(Effect::Send {
                        to: worker,
                        message: Message::Parameters {
                            version,
                            block: id,
                            parameters,
                        },
                    });
                }
            }
        }
    }
}
