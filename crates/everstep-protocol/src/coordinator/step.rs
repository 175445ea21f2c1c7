//! One step: what is known of it, its decision, and the next one.

use std::collections::{BTreeMap, BTreeSet};

use super::Effect;
use super::audit::Audits;
use super::leases::Item;
use super::machine::{Coordinator, Phase};
use crate::ids::{BlockId, Member, Role, Step};
use crate::message::{Decision, EvaluationSums, GradientReport, Message, Numerics, Testimony};
use crate::retry::Retry;

/// The step that is not decided yet.
#[derive(Debug, Default)]
pub(super) struct Work {
    pub(super) step: Step,
    /// Its slots; none at the last version, which is only evaluated.
    pub(super) slots: Vec<Item>,
    /// Evaluation chunks of its version; none if it is not due.
    pub(super) chunks: Vec<Item>,
    /// Loss sum and tokens of each chunk.
    pub(super) evaluations: Vec<Option<EvaluationSums>>,
    /// Blocks that are reduced and replicated in the current view.
    pub(super) reduced: BTreeMap<BlockId, GradientReport>,
    /// Joining replicas that are at this step's version.
    pub(super) seeded: BTreeSet<(Member, BlockId)>,
    pub(super) audits: Audits,
    /// When deliveries of dead workers are given up, if some primary still lacks something then.
    pub(super) doubt_ms: Option<u64>,
}

/// The step decided last.
#[derive(Debug)]
pub(super) struct Decided {
    pub(super) step: Step,
    pub(super) decision: Decision,
    pub(super) snapshot: bool,
    /// Shards that have it.
    pub(super) applied: BTreeSet<Member>,
    pub(super) retry: Retry,
}

impl<N: Numerics> Coordinator<N> {
    pub(super) fn is_last(&self, version: Step) -> bool {
        version.0 >= self.config.num_steps
    }

    /// Opens the step; its tasks are free.
    pub(super) fn prepare_step(&mut self, now_ms: u64, step: Step) {
        self.step_since_ms = now_ms;
        let last = self.is_last(step);
        let every = self.config.evaluate_every;
        let is_due = every > 0 && (last || step.0.is_multiple_of(every));
        let num_slots = if last { 0 } else { self.config.num_slots };
        let num_chunks = if is_due && self.evaluated.is_none_or(|done| done < step) {
            self.config.num_evaluation_chunks
        } else {
            0
        };
        let plan = self.config.audit;
        self.work = Work {
            step,
            slots: (0..num_slots).map(|_| Item::default()).collect(),
            chunks: (0..num_chunks).map(|_| Item::default()).collect(),
            evaluations: vec![None; num_chunks as usize],
            audits: Audits::new((0..num_slots).filter(|slot| plan.covers(step, *slot))),
            ..Work::default()
        };
    }

    pub(super) fn on_reduced(
        &mut self,
        now_ms: u64,
        step: Step,
        block: BlockId,
        report: GradientReport,
        testimonies: Vec<Testimony>,
    ) {
        if self.phase == Phase::Training && step == self.work.step && block < self.config.num_blocks
        {
            self.work.reduced.insert(block, report);
            self.work.audits.counted.insert(block, testimonies);
            self.try_decide(now_ms);
            if step == self.work.step {
                self.settle_audits(now_ms);
            }
        }
    }

    pub(super) fn is_evaluated(&self) -> bool {
        self.work.evaluations.iter().all(Option::is_some)
    }

    pub(super) fn is_reduced(&self) -> bool {
        self.work.reduced.len() == self.config.num_blocks as usize
    }

    /// Decides the step if nothing is missing.
    pub(super) fn try_decide(&mut self, now_ms: u64) {
        let step = self.work.step;
        if self.phase != Phase::Training
            || self.is_last(step)
            || self.is_held()
            || !self.is_reduced()
            || !self.is_evaluated()
            || !self.is_audited()
        {
            return;
        }
        self.measure_losers(now_ms);
        let took_ms = now_ms.saturating_sub(self.step_since_ms) as f64;
        self.step_ms = Some(self.step_ms.map_or(took_ms, |mean| (mean + took_ms) / 2.0));
        let reports: Vec<GradientReport> = self.work.reduced.values().copied().collect();
        // From the committed state, and before anything of this step is: so it does not matter who led when the last one was skipped.
        let num_skipped = reports.first().map_or(0, |one| one.history.num_skipped);
        if self.config.skip_limit > 0 && num_skipped >= self.config.skip_limit {
            return self.abandon_run(step, num_skipped);
        }
        let decision = self.numerics.decide(step, &reports);
        self.log_step(step, decision);
        let snapshot = self.begin_checkpoint(now_ms, step.next());
        self.announce_decision(now_ms, step, decision, snapshot);
        // The last step's lease bookkeeping goes before the view may change for the next one.
        self.work = Work {
            step: step.next(),
            ..Work::default()
        };
        self.settle_placement(now_ms);
        self.prepare_step(now_ms, step.next());
        self.assign(now_ms);
        self.try_commit(step.next());
        self.tend_drain(now_ms);
    }

    /// Asks for the step's metrics line, once in an epoch.
    pub(super) fn log_step(&mut self, step: Step, decision: Decision) {
        if step >= self.logged {
            self.logged = step.next();
            self.high_water = self.high_water.max(step.next());
            self.out.push(Effect::LogStep { step, decision });
        }
    }

    pub(super) fn announce_decision(
        &mut self,
        now_ms: u64,
        step: Step,
        decision: Decision,
        snapshot: bool,
    ) {
        self.decided = Some(Decided {
            step,
            decision,
            snapshot,
            applied: BTreeSet::new(),
            retry: Retry::new(now_ms, self.config.resend_ms),
        });
        // Shards first: workers can do nothing before these have applied it.
        for role in [Role::Shard, Role::Worker] {
            for member in self.live(role) {
                self.send_decision(member);
            }
        }
    }

    fn send_decision(&mut self, to: Member) {
        if let (Some(decided), Some(view)) = (&self.decided, self.view_id()) {
            let message = Message::Decide {
                view,
                lineage: self.lineage,
                step: decided.step,
                decision: decided.decision,
                snapshot: decided.snapshot,
            };
            self.send(to, message);
        }
    }

    pub(super) fn on_applied(&mut self, from: Member, step: Step) {
        if let Some(decided) = &mut self.decided
            && decided.step == step
        {
            decided.applied.insert(from);
        }
    }

    /// Says the last decision again to shards that have not confirmed it.
    pub(super) fn repeat_decision(&mut self, now_ms: u64) {
        let shards = self.live(Role::Shard);
        let Some(decided) = &mut self.decided else {
            return;
        };
        let waiting: Vec<Member> = shards
            .into_iter()
            .filter(|shard| !decided.applied.contains(shard))
            .collect();
        if !waiting.is_empty() && decided.retry.fires(now_ms) {
            for shard in waiting {
                self.send_decision(shard);
            }
        }
    }
}
