//! One block of a shard: its state, and the log of steps that are not applied yet.

use std::collections::BTreeMap;

use crate::ids::{BlockId, Member, SlotRange, Step};
use crate::message::{BlockStatus, Decision, Digest, GradientReport, Numerics, Testimony, ViewId};
use crate::retry::Retry;
use crate::tree::{Insertion, TreeSum};

/// Steps that a replica without state, or with a gap, keeps for its replay; older ones are dropped and it is seeded again.
const LOG_STEPS_MAX: usize = 64;

/// A complete sum.
#[derive(Debug)]
pub(super) struct Reduced<N: Numerics> {
    pub(super) gradient: N::Gradient,
    pub(super) report: GradientReport,
    /// Whose gradients of audited slots are in it.
    pub(super) testimonies: Vec<Testimony>,
    /// The primary that sent it, if it was not summed here.
    pub(super) from: Option<Member>,
}

/// What a step's log holds of one block.
#[derive(Debug)]
pub(super) struct Entry<N: Numerics> {
    pub(super) reduced: Option<Reduced<N>>,
    /// The decision, and whether the next version is to be snapshotted.
    pub(super) decision: Option<(Decision, bool)>,
}

impl<N: Numerics> Default for Entry<N> {
    fn default() -> Self {
        Self {
            reduced: None,
            decision: None,
        }
    }
}

/// State at a version, and the sum of the step that reads it.
#[derive(Debug)]
pub(super) struct Replica<N: Numerics> {
    pub(super) version: Step,
    pub(super) state: N::State,
    pub(super) last: Option<GradientReport>,
    pub(super) tree: TreeSum<N::Gradient>,
    /// Whose gradients of audited slots are in it.
    pub(super) testimonies: Vec<Testimony>,
    /// What workers read of this version, once one has asked.
    pub(super) parameters: Option<N::Parameters>,
}

/// A partial sum of the step after the replica's version; its sender saw the decision earlier.
#[derive(Debug)]
pub(super) struct Early<N: Numerics> {
    pub(super) from: Member,
    pub(super) step: Step,
    pub(super) range: SlotRange,
    pub(super) gradient: N::Gradient,
    pub(super) digests: Vec<(u32, Digest)>,
}

/// One block.
#[derive(Debug)]
pub(super) struct Block<N: Numerics> {
    pub(super) replica: Option<Replica<N>>,
    pub(super) log: BTreeMap<Step, Entry<N>>,
    pub(super) early: Vec<Early<N>>,
    /// Workers that wait for a version, by their index.
    pub(super) pulls: BTreeMap<u32, (Member, Step)>,
    /// Members known to hold the reduced gradient of this version, in any view.
    pub(super) acked: BTreeMap<Member, Vec<Testimony>>,
    /// Followers that were sent it.
    pub(super) sent: BTreeMap<Member, Retry>,
    /// View in which it was reported to the leader.
    pub(super) reported: Option<(ViewId, Retry)>,
    /// To whom this replica said on its own that it holds it.
    pub(super) acked_to: Option<Member>,
    /// Outstanding request for the whole block.
    pub(super) seeding: Option<Retry>,
    /// Since when the log has had a gap.
    pub(super) gap: Option<Retry>,
    /// Version and time of the last `Seeded`.
    pub(super) seeded: Option<(Step, Retry)>,
}

impl<N: Numerics> Block<N> {
    pub(super) fn new() -> Self {
        Self {
            replica: None,
            log: BTreeMap::new(),
            early: Vec::new(),
            pulls: BTreeMap::new(),
            acked: BTreeMap::new(),
            sent: BTreeMap::new(),
            reported: None,
            acked_to: None,
            seeding: None,
            gap: None,
            seeded: None,
        }
    }

    pub(super) fn version(&self) -> Option<Step> {
        self.replica.as_ref().map(|replica| replica.version)
    }

    pub(super) fn install(
        &mut self,
        version: Step,
        state: N::State,
        last: Option<GradientReport>,
        num_slots: u32,
    ) {
        self.replica = Some(Replica {
            version,
            state,
            last,
            tree: TreeSum::new(SlotRange::new(0, num_slots)),
            testimonies: Vec::new(),
            parameters: None,
        });
        self.forget_step(version);
    }

    /// Clears what belongs to the step before `version`.
    fn forget_step(&mut self, version: Step) {
        self.log = self.log.split_off(&version);
        self.acked.clear();
        self.sent.clear();
        self.reported = None;
        self.acked_to = None;
        self.gap = None;
    }

    /// The log's entry of a step that is not applied yet, if it can be kept.
    pub(super) fn entry(&mut self, step: Step) -> Option<&mut Entry<N>> {
        if self.version().is_some_and(|version| step < version) {
            return None;
        }
        if !self.log.contains_key(&step) && self.log.len() >= LOG_STEPS_MAX {
            let keep = self.version();
            let oldest = self.log.keys().copied().find(|&step| Some(step) != keep);
            if let Some(oldest) = oldest {
                self.log.remove(&oldest);
            }
        }
        Some(self.log.entry(step).or_default())
    }

    /// Makes void what was summed of `from` and later steps; of every step that is not applied if `None`.
    pub(super) fn void(&mut self, from: Option<Step>) {
        let from = from.unwrap_or_default();
        self.early.clear();
        self.log.retain(|step, _| *step < from);
        if let Some(replica) = &mut self.replica
            && replica.version >= from
        {
            replica.tree.clear();
            replica.testimonies.clear();
            self.acked.clear();
            self.sent.clear();
            self.reported = None;
            self.acked_to = None;
            self.gap = None;
        }
    }

    /// Adds a partial sum of the current step, that `worker` computed of this `block`.
    pub(super) fn add(
        &mut self,
        numerics: &N,
        block: BlockId,
        worker: Member,
        range: SlotRange,
        gradient: N::Gradient,
        digests: &[(u32, Digest)],
    ) -> Insertion {
        let Some(replica) = &mut self.replica else {
            return Insertion::NotANode;
        };
        let entry = self.log.entry(replica.version).or_default();
        if entry.reduced.is_some() {
            return Insertion::Known;
        }
        let insertion = replica
            .tree
            .insert(range, gradient, |left, right| numerics.sum(left, right));
        if insertion == Insertion::Added {
            // It replaces what was known of its parts.
            let testimonies = &mut replica.testimonies;
            testimonies.retain(|testimony| !range.contains(testimony.slot));
            testimonies.extend(digests.iter().map(|&(slot, digest)| Testimony {
                slot,
                worker,
                digest,
            }));
        }
        if let Some(sum) = replica.tree.complete() {
            entry.reduced = Some(Reduced {
                report: numerics.report(block, sum),
                gradient: sum.clone(),
                testimonies: std::mem::take(&mut replica.testimonies),
                from: None,
            });
            replica.tree.clear();
        }
        insertion
    }

    /// Whether the reduced gradient of the current step is here.
    pub(super) fn is_reduced(&self) -> bool {
        self.version()
            .and_then(|version| self.log.get(&version))
            .is_some_and(|entry| entry.reduced.is_some())
    }

    /// The reduced gradient of the current step.
    pub(super) fn reduced(&self) -> Option<&Reduced<N>> {
        self.log.get(&self.version()?)?.reduced.as_ref()
    }

    /// The report of the current step's reduced gradient, with the history of the state that it is of.
    pub(super) fn report(&self, numerics: &N) -> Option<GradientReport> {
        let history = numerics.history(&self.replica.as_ref()?.state);
        Some(GradientReport {
            history,
            ..self.reduced()?.report
        })
    }

    /// Whose gradients of audited slots are in what is held of `step`.
    pub(super) fn testimonies(&self, step: Step) -> Vec<Testimony> {
        self.log
            .get(&step)
            .and_then(|entry| entry.reduced.as_ref())
            .map(|reduced| reduced.testimonies.clone())
            .unwrap_or_default()
    }

    /// Whose gradients of audited slots are in the current step's sums, here and on the backups.
    pub(super) fn all_testimonies(&self, backups: &[Member]) -> Vec<Testimony> {
        let mine = self
            .reduced()
            .into_iter()
            .flat_map(|reduced| &reduced.testimonies);
        let theirs = backups.iter().filter_map(|backup| self.acked.get(backup));
        let mut all: Vec<Testimony> = mine.chain(theirs.flatten()).copied().collect();
        all.sort();
        all.dedup();
        all
    }

    /// Applies the current step if it is reduced and decided. Returns the step and whether the new version is to be snapshotted.
    pub(super) fn advance(&mut self, numerics: &N, block: BlockId) -> Option<(Step, bool)> {
        let replica = self.replica.as_mut()?;
        let entry = self.log.get(&replica.version)?;
        let (Some(reduced), Some((decision, snapshot))) = (&entry.reduced, &entry.decision) else {
            return None;
        };
        let (step, snapshot) = (replica.version, *snapshot);
        replica.last = Some(GradientReport {
            history: numerics.history(&replica.state),
            ..reduced.report
        });
        // They may share the state's memory, which would then be copied to be changed.
        replica.parameters = None;
        if decision.apply {
            numerics.apply(block, step, decision, &reduced.gradient, &mut replica.state);
        }
        numerics.remember(decision, &mut replica.state);
        replica.version = step.next();
        replica.tree.clear();
        replica.testimonies.clear();
        let version = replica.version;
        self.forget_step(version);
        Some((step, snapshot))
    }

    /// Whether the log shows that steps were missed: something of a later step is here, or the current one is decided but not reduced.
    pub(super) fn has_gap(&self) -> bool {
        let Some(version) = self.version() else {
            return false;
        };
        self.log.range(version.next()..).next().is_some()
            || self
                .log
                .get(&version)
                .is_some_and(|entry| entry.decision.is_some() && entry.reduced.is_none())
    }

    /// The parameters of the current version.
    pub(super) fn parameters(&mut self, numerics: &N, block: BlockId) -> Option<N::Parameters> {
        let replica = self.replica.as_mut()?;
        let state = &replica.state;
        let parameters = replica
            .parameters
            .get_or_insert_with(|| numerics.parameters(block, state));
        Some(parameters.clone())
    }

    pub(super) fn status(&self, numerics: &N, block: BlockId) -> Option<BlockStatus> {
        let replica = self.replica.as_ref()?;
        Some(BlockStatus {
            block,
            version: replica.version,
            last: replica.last,
            reduced: self.report(numerics),
        })
    }
}
