//! The invariants, checked at every event.

use std::collections::{BTreeMap, BTreeSet};

use everstep_protocol::{
    BlockId, Coordinator, Decision, Epoch, Lineage, Member, Message, Role, Status, Step,
};

use crate::outcome::Digest;
use crate::plan::Plan;
use crate::process::Machine;
use crate::toy::{State, Toy};
use crate::world::World;

/// A shard's line of state and the versions of its blocks.
pub(crate) type Versions = (Lineage, BTreeMap<BlockId, Step>);

/// What was seen, by a witness that no fault touches.
#[derive(Debug)]
pub(crate) struct Checker {
    num_steps: u64,
    /// The metrics log: first decision and the epoch that logged it.
    log: BTreeMap<Step, (Decision, Epoch)>,
    /// High-water mark of each coordinator's own log.
    own_logs: BTreeMap<usize, Step>,
    /// High-water mark at each election.
    elections: BTreeMap<Epoch, Step>,
    /// Lowest version that an epoch declared a rollback to.
    rollbacks: BTreeMap<Epoch, Step>,
    /// Lines of state that a rollback was declared for.
    restored: BTreeSet<Lineage>,
    /// Blocks that an epoch has declared degraded last.
    pub(crate) degraded: BTreeMap<Epoch, Vec<BlockId>>,
    /// Steps below this are applied, or their reduced gradient held, by a replica on a line of state.
    held: BTreeMap<(Member, Lineage, BlockId), u64>,
    versions: BTreeMap<(Member, Lineage, BlockId), Step>,
    pub(crate) evaluated: BTreeMap<Step, (f64, u64)>,
}

impl Checker {
    pub(crate) fn new(plan: &Plan) -> Self {
        Self {
            num_steps: plan.workload.num_steps,
            log: BTreeMap::new(),
            own_logs: BTreeMap::new(),
            elections: BTreeMap::new(),
            rollbacks: BTreeMap::new(),
            restored: BTreeSet::new(),
            degraded: BTreeMap::new(),
            held: BTreeMap::new(),
            versions: BTreeMap::new(),
            evaluated: BTreeMap::new(),
        }
    }

    /// One past the last step in the metrics log.
    pub(crate) fn high_water(&self) -> Step {
        self.log
            .keys()
            .last()
            .map(|step| step.next())
            .unwrap_or_default()
    }

    /// What a coordinator can tell of the high-water mark: of the shared log, or of its own.
    pub(crate) fn mark_of(&self, actor: usize, shares_log: bool) -> Step {
        if shares_log {
            self.high_water()
        } else {
            self.own_logs.get(&actor).copied().unwrap_or_default()
        }
    }

    pub(crate) fn elected(&mut self, epoch: Epoch, mark: Step) {
        self.elections.insert(epoch, mark);
    }

    pub(crate) fn rolled_back(&mut self, epoch: Epoch, lineage: Lineage, to: Step) {
        self.restored.insert(lineage);
        let lowest = self.rollbacks.entry(epoch).or_insert(to);
        *lowest = (*lowest).min(to);
    }

    pub(crate) fn has_rolled_back(&self, epoch: Epoch) -> bool {
        self.rollbacks.contains_key(&epoch)
    }

    pub(crate) fn progress(&self) -> String {
        format!(
            "{} of {} steps decided, {} elections",
            self.high_water().0,
            self.num_steps,
            self.elections.len()
        )
    }
}

impl World<'_> {
    /// Invariants 1, 3 and 4 at a shard: every state and every sum has the undisturbed bits, versions only grow on a line.
    pub(crate) fn check_shard(&mut self, actor: usize) {
        let member = self.actors[actor].member;
        let Some(Machine::Shard(shard)) = &self.actors[actor].machine else {
            return;
        };
        let mut problems = Vec::new();
        // A lie in a sum is found before the step is decided, not before it is summed.
        let may_lie = !self.liars.is_empty();
        let Status::Shard {
            lineage, blocks, ..
        } = shard.status()
        else {
            return;
        };
        for status in blocks {
            let (block, version) = (status.block, status.version);
            let state = shard.state(block).map(|(_, state)| *state);
            let expected = self
                .expected
                .states
                .get(version.0 as usize)
                .and_then(|states| states.get(block as usize));
            if state.as_ref() != expected {
                problems.push(format!(
                    "1: {member} holds {state:?} for block {block} at version {}, not {expected:?}",
                    version.0
                ));
            }
            if let Some(reduced) = status.reduced {
                let expected = self
                    .expected
                    .reports
                    .get(version.0 as usize)
                    .map(|reports| reports[block as usize]);
                if Some(reduced) != expected && !may_lie {
                    problems.push(format!(
                        "1: {member} reduced step {} of block {block} to {reduced:?}, not {expected:?}",
                        version.0
                    ));
                }
            }
            if version > self.checker.high_water() {
                problems.push(format!(
                    "2: {member} applied step {} of block {block}, which nobody decided",
                    version.0 - 1
                ));
            }
            let key = (member, lineage, block);
            let before = self.checker.versions.insert(key, version);
            if before.is_some_and(|before| version < before) {
                problems.push(format!(
                    "4: block {block} of {member} went from version {before:?} back to {} on one line",
                    version.0
                ));
            }
            let held = version.0 + u64::from(status.reduced.is_some());
            let known = self.checker.held.entry(key).or_insert(0);
            *known = (*known).max(held);
        }
        // A block that it gave up may be seeded again from an earlier version.
        let held = shard.versions();
        let lines = (member, Lineage(0), 0)..=(member, Lineage(u64::MAX), BlockId::MAX);
        let gone: Vec<(Member, Lineage, BlockId)> = self
            .checker
            .versions
            .range(lines)
            .map(|(key, _)| *key)
            .filter(|(_, _, block)| !held.contains_key(block))
            .collect();
        for key in gone {
            self.checker.versions.remove(&key);
        }
        for problem in problems {
            self.violate(problem);
        }
    }

    /// Whether a shard must refuse this message because it knows a later leader; if so, its versions.
    pub(crate) fn fenced(&self, actor: usize, message: &Message<Toy>) -> Option<Versions> {
        let Some(Machine::Shard(shard)) = &self.actors[actor].machine else {
            return None;
        };
        let epoch = match message {
            Message::Decide { view, .. } => view.epoch,
            Message::View(view) => view.epoch,
            _ => return None,
        };
        (epoch < shard.epoch()).then(|| (shard.lineage(), shard.versions()))
    }

    /// Invariant 3: the message of an earlier leader has changed nothing.
    pub(crate) fn check_fence(&mut self, actor: usize, before: Versions) {
        let Some(Machine::Shard(shard)) = &self.actors[actor].machine else {
            return;
        };
        if before != (shard.lineage(), shard.versions()) {
            let member = self.actors[actor].member;
            self.violate(format!("3: {member} followed a leader that it had left"));
        }
    }

    /// Invariants 2, 3 and 4 at a decision.
    pub(crate) fn check_decision(&mut self, actor: usize, step: Step, decision: Decision) {
        self.outcome.num_decisions += 1;
        self.outcome.recovered(self.now_ms);
        #[cfg(test)]
        if let Some((fault, recovery)) = self.forbidden
            && self.outcome.faults.contains_key(&fault)
            && self.outcome.recoveries.contains_key(&recovery)
        {
            return self.violate(format!("test: {fault} and {recovery}"));
        }
        let Some(Machine::Coordinator(leader)) = &self.actors[actor].machine else {
            return;
        };
        let epoch = leader.epoch();
        let mut problems = self.unreplicated(leader, step);
        if self.expected.decisions.get(step.0 as usize) != Some(&decision) {
            problems.push(format!("3: step {} was decided as {decision:?}", step.0));
        }
        let own = self.checker.own_logs.entry(actor).or_default();
        *own = (*own).max(step.next());
        let high_water = self.checker.high_water();
        match self.checker.log.get(&step) {
            Some((first, by)) => {
                if *first != decision {
                    problems.push(format!(
                        "3: step {} was decided as {first:?} in epoch {} and as {decision:?} in {}",
                        step.0, by.0, epoch.0
                    ));
                }
                // A step below the mark that this leader found when it was elected is only decided again after a rollback; with audits
                // also one that nobody has applied.
                let declared = self
                    .checker
                    .rollbacks
                    .get(&epoch)
                    .is_some_and(|to| *to <= step);
                let again = u64::from(self.plan.workload.audit_permille > 0);
                let found = self.checker.elections.get(&epoch).copied();
                if found.is_some_and(|mark| step.0 + again < mark.0) && !declared {
                    problems.push(format!(
                        "4: epoch {} decided step {} again without a rollback",
                        epoch.0, step.0
                    ));
                }
            }
            None => {
                if step != high_water {
                    problems.push(format!(
                        "4: step {} was decided when {} were",
                        step.0, high_water.0
                    ));
                }
                self.checker.log.insert(step, (decision, epoch));
            }
        }
        for problem in problems {
            self.violate(problem);
        }
    }

    /// Invariant 2: replicas of the leader's view that do not hold the step, and missing replicas that were not declared.
    fn unreplicated(&self, leader: &Coordinator<Toy>, step: Step) -> Vec<String> {
        let Some(view) = leader.view() else {
            return vec![format!("2: step {} was decided without a view", step.0)];
        };
        let declared = self.checker.degraded.get(&leader.epoch());
        let mut problems = Vec::new();
        for (block, placement) in (0..).zip(&view.placements) {
            let mut count = 0;
            for member in placement.replicas() {
                count += 1;
                // What was held before a repair of a later step is held after it.
                let before = view.repair.is_some_and(|repair| step < repair.from);
                let counts = |lineage: Lineage| {
                    lineage == view.lineage || (before && lineage.root() == view.lineage.root())
                };
                let lines = (member, Lineage(0), block)..=(member, Lineage(u64::MAX), block);
                let held = self
                    .checker
                    .held
                    .range(lines)
                    .any(|((_, lineage, of), held)| {
                        *of == block && counts(*lineage) && *held > step.0
                    });
                if !held {
                    problems.push(format!(
                        "2: step {} was decided before {member} held block {block}",
                        step.0
                    ));
                }
            }
            let is_declared = declared.is_some_and(|blocks| blocks.contains(&block));
            if count < self.plan.topology.replication && !is_declared {
                problems.push(format!(
                    "2: step {} was decided with {count} replicas of block {block}, undeclared",
                    step.0
                ));
            }
        }
        problems
    }

    /// A released shard holds nothing that the leader counts on, unless the run waits at a version no further than what is committed.
    pub(crate) fn check_release(&mut self, actor: usize, member: Member) {
        let Some(Machine::Coordinator(leader)) = &self.actors[actor].machine else {
            return;
        };
        let is_placed = leader.view().is_some_and(|view| {
            view.placements
                .iter()
                .any(|placement| placement.role_of(member).is_some())
        });
        if is_placed && leader.committed() < leader.step() {
            self.violate(format!("drain: {member} was released with its blocks"));
        }
    }

    /// A checkpoint is loaded only if it is committed. If that, or making initial weights, gives up decided steps, a rollback declares it.
    pub(crate) fn check_load(&mut self, lineage: Lineage, version: Step) {
        if version.0 > 0 && !self.store.is_committed(version) {
            self.violate(format!("5: checkpoint {} is not committed", version.0));
        }
        let epoch = lineage.epoch();
        let known = self.checker.elections.get(&epoch).copied();
        let mark = known.unwrap_or_default().min(self.checker.high_water());
        if version < mark && !self.checker.restored.contains(&lineage.root()) {
            self.violate(format!(
                "4: version {} was loaded without a declared rollback from {}",
                version.0, mark.0
            ));
        }
    }

    pub(crate) fn check_evaluation(&mut self, version: Step, loss: f64, tokens: u64) {
        let expected = self.expected.evaluations.get(version.0 as usize).copied();
        if expected != Some((loss, tokens)) {
            self.violate(format!(
                "1: evaluation of version {} gave {loss} over {tokens}, not {expected:?}",
                version.0
            ));
        }
        self.checker.evaluated.insert(version, (loss, tokens));
    }

    /// The end: everything is decided, evaluated and committed, and the result is the undisturbed one.
    pub(crate) fn check_end(&mut self) {
        let last = Step(self.plan.workload.num_steps);
        if self.checker.high_water() != last || self.checker.log.len() as u64 != last.0 {
            self.violate(format!("6: finished; {}", self.checker.progress()));
        }
        let every = self.plan.workload.evaluate_every;
        for version in (0..=last.0).map(Step) {
            let is_due = every > 0 && (version == last || version.0.is_multiple_of(every));
            if is_due != self.checker.evaluated.contains_key(&version) {
                self.violate(format!("6: evaluation of version {}", version.0));
            }
        }
        let found: Vec<State> = self.store.checkpoint(last).into_values().collect();
        if found == self.expected.states[last.0 as usize] {
            self.outcome.digest = Digest::Undisturbed;
        } else {
            self.outcome.digest = Digest::Differs;
            self.violate("the final digest differs".to_owned());
        }
        debug_assert!(
            self.actors
                .iter()
                .all(|actor| actor.over || actor.member.role == Role::Coordinator)
        );
    }
}
