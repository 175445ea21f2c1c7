//! How a leader starts: resume from what the shards hold, or restore the committed checkpoint on a new line of state.

use std::collections::BTreeMap;

use super::Note;
use super::machine::{Coordinator, Phase};
use crate::ids::{Lineage, Member, Role, Step};
use crate::message::{BlockStatus, Decision, GradientReport, Numerics, Status, ViewId};

/// Progress is only given up for a checkpoint after this many times the gathering time, unless every shard has answered.
const GATHERINGS_BEFORE_ROLLBACK: u64 = 3;
/// A leader that could go on with the shards that have answered gives the others this many announcements' time.
const RESENDS_BEFORE_RESUME: u64 = 3;
/// Bits of a lineage that count within an epoch.
const LINEAGE_BITS: u32 = 20;

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
        if self.resumable
            && let Some(plan) = self.plan()
        {
            return self.resume(now_ms, plan);
        }
        if !(all || waited_ms >= self.config.gather_ms) {
            return;
        }
        let loses_progress = self.resumable && self.high_water > self.committed;
        let patience_ms = if loses_progress {
            GATHERINGS_BEFORE_ROLLBACK * self.config.gather_ms
        } else {
            self.config.gather_ms
        };
        if all || waited_ms >= patience_ms {
            self.rollback(now_ms);
        }
    }

    /// The newest line of state that can go on without losing a decided step.
    fn plan(&self) -> Option<Plan> {
        let mut lines: BTreeMap<Lineage, Vec<(Member, &[BlockStatus])>> = BTreeMap::new();
        for peer in self.peers.values() {
            if let Some(Status::Shard { lineage, blocks }) = &peer.status
                && !blocks.is_empty()
            {
                lines
                    .entry(*lineage)
                    .or_default()
                    .push((peer.member, blocks.as_slice()));
            }
        }
        lines
            .iter()
            .rev()
            .find_map(|(lineage, shards)| self.plan_line(*lineage, shards))
    }

    fn plan_line(&self, lineage: Lineage, shards: &[(Member, &[BlockStatus])]) -> Option<Plan> {
        let statuses = || {
            shards
                .iter()
                .flat_map(|(member, blocks)| blocks.iter().map(|status| (*member, status)))
        };
        let newest = statuses().map(|(_, status)| status.version).max()?;
        // Decided, but applied nowhere yet: the commit rule says that its gradient is on all replicas.
        let step = newest.max(self.high_water);
        if step > newest.next() {
            return None;
        }
        let mut full: Vec<Vec<Member>> = Vec::new();
        let mut behind = false;
        let mut reports: Vec<Option<GradientReport>> = Vec::new();
        for block in 0..self.config.num_blocks {
            let mut members = Vec::new();
            let mut report = None;
            for (member, status) in statuses().filter(|(_, status)| status.block == block) {
                if status.version == step {
                    members.push(member);
                    report = report.or(status.last);
                } else if status.version.next() == step && status.reduced.is_some() {
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

    /// Restores the committed checkpoint on a new line, on all shards that are there.
    fn rollback(&mut self, now_ms: u64) {
        self.lineage = Lineage((self.epoch.0 << LINEAGE_BITS) | self.num_lineages);
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
        let shards = self.live(Role::Shard);
        let placements = self.rules().initial(self.config.num_blocks, &shards);
        let restored_from = self.committed;
        self.publish(now_ms, placements, restored_from);
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
