//! How a leader starts: resume from what the shards hold, or restore the committed checkpoint on a new line of state.

use std::collections::BTreeMap;

use super::machine::{Coordinator, Phase};
use super::{Effect, Note};
use crate::ids::{Lineage, Member, Role, Step};
use crate::message::{BlockStatus, Decision, GradientReport, Numerics, Repair, Status, ViewId};
use crate::retry::Retry;

/// Progress is only given up for a checkpoint after this many times the gathering time, unless every shard has answered.
const GATHERINGS_BEFORE_ROLLBACK: u64 = 3;
/// A leader that could go on with the shards that have answered gives the others this many announcements' time.
const RESENDS_BEFORE_RESUME: u64 = 3;
/// A checkpoint that is not restored after this many times the gathering time is verified again.
const GATHERINGS_BEFORE_SEEKING: u64 = 4;

/// What a shard holds.
struct Holding<'a> {
    member: Member,
    lineage: Lineage,
    blocks: &'a [BlockStatus],
}

/// What can be resumed.
struct Plan {
    lineage: Lineage,
    /// The step to go on with.
    step: Step,
    /// Full replicas, by block.
    full: Vec<Vec<Member>>,
    /// The decision of the step before, if some replicas have not applied it.
    decision: Option<Decision>,
}

impl<N: Numerics> Coordinator<N> {
    /// Starts as soon as enough shards have answered.
    pub(super) fn try_gather(&mut self, now_ms: u64) {
        let num_shards = self.live(Role::Shard).len();
        let all = num_shards >= self.config.num_shards as usize;
        let waited_ms = now_ms.saturating_sub(self.gathering_since_ms);
        // Who answers later joins as a new replica: dearer than waiting a moment, cheaper than waiting for a shard that died with the leader.
        let moment_ms = (RESENDS_BEFORE_RESUME * self.config.resend_ms).min(self.config.gather_ms);
        if num_shards == 0 || !(all || waited_ms >= moment_ms) {
            return;
        }
        let is_patient = !(all || waited_ms >= self.config.gather_ms);
        if self.resumable
            && let Some(plan) = self.plan()
        {
            // Workers that are ahead were told decisions by shards that have not answered: only a replica that was joining has.
            let is_stale = plan.step.next() < self.known_by_workers(plan.lineage);
            if is_patient && is_stale {
                return;
            }
            return self.resume(now_ms, plan);
        }
        if is_patient {
            return;
        }
        let loses_progress = self.resumable && self.high_water > self.committed;
        let patience_ms = if loses_progress {
            GATHERINGS_BEFORE_ROLLBACK * self.config.gather_ms
        } else {
            self.config.gather_ms
        };
        if (all || waited_ms >= patience_ms) && !self.seeking {
            self.seeking = true;
            self.out.push(Effect::FindCheckpoint);
        }
    }

    /// The state comes from this checkpoint, unless shards that could go on have come back while it was looked for.
    pub(super) fn on_checkpoint_found(&mut self, now_ms: u64, version: Step) {
        self.seeking = false;
        let restored_from = self.view.as_ref().map(|view| view.restored_from);
        if self.phase == Phase::Restoring && restored_from == Some(version) {
            // Still intact: shards only take their time.
            return;
        }
        self.committed = version;
        if self.config.num_steps > 0 && self.is_last(version) {
            return self.finish(now_ms);
        }
        if self.live(Role::Shard).is_empty() {
            // Whoever was there is gone again: the next one is waited for, and the store asked anew.
            return self.gather(now_ms, self.resumable);
        }
        self.rollback(now_ms);
    }

    /// The latest step of this line that a worker that has answered was leased, or heard the decision before of.
    fn known_by_workers(&self, lineage: Lineage) -> Step {
        let statuses = self.peers.values().filter_map(|peer| peer.status.as_ref());
        let steps = statuses.filter_map(|status| match status {
            Status::Worker {
                lineage: line,
                step,
                ..
            } if line.root() == lineage.root() => Some(*step),
            _ => None,
        });
        steps.max().unwrap_or_default()
    }

    /// The last repair of the line with this root that anybody has heard of, with state or without.
    fn last_heard(&self, root: Lineage) -> Option<Lineage> {
        self.peers
            .values()
            .filter_map(|peer| peer.status.as_ref())
            .map(Status::lineage)
            .filter(|lineage| lineage.root() == root)
            .max()
    }

    /// The newest line of state that can go on without losing a decided step.
    fn plan(&self) -> Option<Plan> {
        let mut lines: BTreeMap<Lineage, Vec<Holding<'_>>> = BTreeMap::new();
        for peer in self.peers.values() {
            if let Some(Status::Shard {
                lineage, blocks, ..
            }) = &peer.status
                && !blocks.is_empty()
            {
                lines.entry(lineage.root()).or_default().push(Holding {
                    member: peer.member,
                    lineage: *lineage,
                    blocks,
                });
            }
        }
        lines.values().rev().find_map(|line| self.plan_line(line))
    }

    fn plan_line(&self, line: &[Holding<'_>]) -> Option<Plan> {
        let lineage = self.last_heard(line.first()?.lineage.root())?;
        let statuses = || {
            line.iter().flat_map(|holding| {
                let is_current = holding.lineage == lineage;
                let blocks = holding.blocks.iter();
                blocks.map(move |status| (holding.member, status, is_current))
            })
        };
        let newest = statuses().map(|(_, status, _)| status.version).max()?;
        if self.high_water > newest.next() {
            return None;
        }
        // Decided, but applied nowhere yet: the commit rule says that its gradient is on all replicas. With audits it is decided once more: what
        // they hold may have been summed again after a rollback, and then nobody has compared it yet. If none of them has heard of the last
        // repair, they will give it up.
        let is_void = line.iter().all(|holding| holding.lineage < lineage);
        let step = if self.config.audit.share > 0.0 || is_void {
            newest
        } else {
            newest.max(self.high_water)
        };
        let mut full: Vec<Vec<Member>> = Vec::new();
        let mut behind = false;
        let mut reports: Vec<Option<GradientReport>> = Vec::new();
        for block in 0..self.config.num_blocks {
            let mut members = Vec::new();
            let mut report = None;
            let of_block = statuses().filter(|(_, status, _)| status.block == block);
            for (member, status, is_current) in of_block {
                if status.version == step {
                    members.push(member);
                    report = report.or(status.last);
                } else if status.version.next() == step && status.reduced.is_some() && is_current {
                    // What a later repair made void does not count.
                    members.push(member);
                    report = report.or(status.reduced);
                    behind = true;
                }
            }
            if members.is_empty() {
                return None;
            }
            full.push(members);
            reports.push(report);
        }
        let decision = if behind {
            let reports: Vec<GradientReport> = reports.into_iter().collect::<Option<_>>()?;
            Some(self.numerics.decide(Step(step.0 - 1), &reports))
        } else {
            None
        };
        Some(Plan {
            lineage,
            step,
            full,
            decision,
        })
    }

    fn resume(&mut self, now_ms: u64, plan: Plan) {
        self.lineage = plan.lineage;
        self.work.step = plan.step;
        if plan.lineage.repairs() > 0 || !self.quarantined.is_empty() {
            // Not everybody may have heard of the last repair: one more covers all of them.
            self.lineage = plan.lineage.repaired();
            self.repair = Some(Repair {
                from: plan.step,
                recompute: false,
            });
        }
        let rules = self.rules();
        let mut placements = rules.over(&plan.full);
        rules.fill(&mut placements, &self.live(Role::Shard));
        self.phase = Phase::Training;
        let restored_from = self.committed;
        self.publish(now_ms, placements, restored_from);
        if let Some(decision) = plan.decision {
            let step = Step(plan.step.0 - 1);
            if step >= self.high_water {
                self.log_step(step, decision);
            }
            self.announce_decision(now_ms, step, decision, false);
        }
        self.start(now_ms);
    }

    /// Restores the checkpoint that was found on a new line, on all shards that are there.
    fn rollback(&mut self, now_ms: u64) {
        self.lineage = Lineage::new(self.epoch, self.num_lineages);
        self.repair = None;
        self.num_lineages += 1;
        let from = self.high_water.max(self.work.step);
        if from > self.committed {
            self.note(Note::Rollback {
                lineage: self.lineage,
                to: self.committed,
                from,
            });
        }
        self.loaded.clear();
        self.decided = None;
        self.checkpoints
            .retain(|_, checkpoint| checkpoint.is_committing());
        self.work = super::step::Work {
            step: self.committed,
            ..Default::default()
        };
        self.phase = Phase::Restoring;
        self.restore_retry = Some(Retry::new(
            now_ms,
            GATHERINGS_BEFORE_SEEKING * self.config.gather_ms,
        ));
        let shards = self.live(Role::Shard);
        let placements = self.rules().initial(self.config.num_blocks, &shards);
        let restored_from = self.committed;
        self.publish(now_ms, placements, restored_from);
    }

    /// Shards that do not get done may be in front of an object that was damaged after it was verified: the store is asked again, and if
    /// another checkpoint is the newest intact one now, that is restored instead.
    pub(super) fn tend_restoring(&mut self, now_ms: u64) {
        let restores = self
            .view
            .as_ref()
            .is_some_and(|view| view.restored_from.0 > 0);
        let due = self
            .restore_retry
            .as_mut()
            .is_some_and(|retry| retry.fires(now_ms));
        if restores && due {
            self.seeking = true;
            self.out.push(Effect::FindCheckpoint);
        }
    }

    pub(super) fn on_view_ready(&mut self, now_ms: u64, from: Member, view: ViewId) {
        let Some(current) = &self.view else {
            return;
        };
        if view != current.id() {
            return;
        }
        if let Some(peer) = self.peers.get_mut(&(from.role, from.index)) {
            peer.view = Some(view);
        }
        if from.role == Role::Shard && self.phase == Phase::Restoring {
            self.loaded.insert(from);
            self.try_start(now_ms);
        }
    }

    /// Restoring is over when every replica that counts has its state.
    pub(super) fn try_start(&mut self, now_ms: u64) {
        let complete = self.view.as_ref().is_some_and(|view| {
            view.placements
                .iter()
                .flat_map(|placement| placement.replicas())
                .all(|member| self.loaded.contains(&member))
        });
        if complete {
            self.phase = Phase::Training;
            self.start(now_ms);
        }
    }

    fn start(&mut self, now_ms: u64) {
        let step = self.work.step;
        let epoch = self.epoch;
        self.note(Note::Resumed { epoch, step });
        self.hold = self.hold.filter(|_| self.is_stranded());
        self.open(now_ms, step);
        self.begin_checkpoint_here(now_ms);
        self.try_commit(step);
    }

    /// Opens the step with what workers already hold of it.
    fn open(&mut self, now_ms: u64, step: Step) {
        self.prepare_step(now_ms, step);
        let held: Vec<(Member, Status)> = self
            .peers
            .values_mut()
            .filter_map(|peer| Some((peer.member, peer.status.take()?)))
            .collect();
        for (member, status) in held {
            self.adopt_held(now_ms, member, &status);
        }
        self.assign(now_ms);
    }
}
