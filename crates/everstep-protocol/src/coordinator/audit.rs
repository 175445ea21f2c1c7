//! Audits of the open step: who computes a slot once more, what the digests say, and what becomes of a device that lied.
//!
//! ```text
//!  slot leased ─▶ audit leased to another worker ─▶ its digest, and those of the gradients that are in the sums: equal ─▶ may be decided
//!                   ▲ lost, or slow                      │ different
//!                   └──────── once more: a third ◀───────┤ nobody guilty yet
//!                             worker, or both again      ▼
//!                                 quarantine, repair: a view that voids the step's sums; workers push again what they hold
//! ```
//!
//! With one worker it computes the slot twice itself, which finds what it does not repeat. A worker that is the only one is never
//! quarantined; everything it said of the step is void, and is computed again. A dispute that nobody can settle (two devices, each standing by
//! its digest) holds the step until another worker comes.

use std::collections::{BTreeMap, BTreeSet};

use super::machine::{Coordinator, Phase};
use super::{Effect, Note};
use crate::audit::{Verdict, judge};
use crate::ids::{BlockId, Member, Role, Step};
use crate::message::{Digest, Numerics, Repair, Task, Testimony};

/// A computation that was asked for.
#[derive(Clone, Copy, Debug)]
struct Lease {
    worker: Member,
    run: u32,
    since_ms: u64,
}

/// One audited slot.
#[derive(Clone, Debug, Default)]
struct Audit {
    leases: Vec<Lease>,
    /// What was computed only to compare.
    said: Vec<(Member, Digest)>,
    num_runs: u32,
    noted: bool,
}

/// The audits of the open step.
#[derive(Clone, Debug, Default)]
pub(super) struct Audits {
    slots: BTreeMap<u32, Audit>,
    pub(super) counted: Counted,
}

/// Whose gradients are in the blocks' sums, on all replicas.
#[derive(Clone, Debug, Default)]
pub(super) struct Counted {
    blocks: BTreeMap<BlockId, Vec<Testimony>>,
    /// The same by slot, each once: most blocks say the same.
    slots: BTreeMap<u32, BTreeSet<(Member, Digest)>>,
}

impl Counted {
    pub(super) fn insert(&mut self, block: BlockId, testimonies: Vec<Testimony>) {
        let known = self.blocks.insert(block, testimonies);
        if known.is_some_and(|known| known != self.blocks[&block]) {
            self.slots.clear();
            self.blocks
                .values()
                .for_each(|said| index(&mut self.slots, said));
        } else {
            index(&mut self.slots, &self.blocks[&block]);
        }
    }

    pub(super) fn clear(&mut self) {
        self.blocks.clear();
        self.slots.clear();
    }

    fn of_slot(&self, slot: u32) -> impl Iterator<Item = (Member, Digest)> + '_ {
        self.slots.get(&slot).into_iter().flatten().copied()
    }

    fn workers(&self) -> impl Iterator<Item = Member> + '_ {
        self.slots.values().flatten().map(|(worker, _)| *worker)
    }
}

fn index(slots: &mut BTreeMap<u32, BTreeSet<(Member, Digest)>>, testimonies: &[Testimony]) {
    for testimony in testimonies {
        let said = (testimony.worker, testimony.digest);
        slots.entry(testimony.slot).or_default().insert(said);
    }
}

impl Audits {
    pub(super) fn new(slots: impl Iterator<Item = u32>) -> Self {
        Self {
            slots: slots.map(|slot| (slot, Audit::default())).collect(),
            counted: Counted::default(),
        }
    }

    /// A worker is gone, or trusted no more.
    pub(super) fn release(&mut self, worker: Member) {
        for audit in self.slots.values_mut() {
            audit.leases.retain(|lease| lease.worker != worker);
        }
    }

    pub(super) fn outstanding(&self, worker: Member) -> impl Iterator<Item = Task> + '_ {
        self.slots.iter().flat_map(move |(slot, audit)| {
            let mine = audit
                .leases
                .iter()
                .filter(move |lease| lease.worker == worker);
            mine.map(|lease| Task::Audit {
                slot: *slot,
                run: lease.run,
            })
        })
    }

    /// Every digest of a slot that is known, one per computation, without those of quarantined workers.
    fn testimonies(&self, slot: u32, is_trusted: impl Fn(Member) -> bool) -> Vec<(Member, Digest)> {
        let mut counted: Vec<(Member, Digest)> = self.counted.of_slot(slot).collect();
        if let Some(audit) = self.slots.get(&slot) {
            counted.extend(&audit.said);
        }
        counted.retain(|(worker, _)| is_trusted(*worker));
        counted
    }
}

impl<N: Numerics> Coordinator<N> {
    pub(super) fn is_quarantined(&self, worker: Member) -> bool {
        self.quarantined.iter().any(|liar| liar.same_actor(&worker))
    }

    /// Live workers that may be leased something.
    pub(super) fn trusted_workers(&self) -> Vec<Member> {
        self.live(Role::Worker)
            .into_iter()
            .filter(|worker| !self.is_quarantined(*worker))
            .collect()
    }

    fn testimonies(&self, slot: u32) -> Vec<(Member, Digest)> {
        self.work
            .audits
            .testimonies(slot, |worker| !self.is_quarantined(worker))
    }

    /// Whether every audited slot of a reduced step is what two computations say.
    pub(super) fn is_audited(&self) -> bool {
        let num_workers = self.trusted_workers().len();
        !self.counts_a_liar()
            && self
                .work
                .audits
                .slots
                .keys()
                .all(|slot| judge(&self.testimonies(*slot), num_workers) == Verdict::Agreed)
    }

    /// Whether a gradient of a quarantined worker is in the sums.
    fn counts_a_liar(&self) -> bool {
        !self.quarantined.is_empty()
            && self
                .work
                .audits
                .counted
                .workers()
                .any(|worker| self.is_quarantined(worker))
    }

    /// Leases computations that are missing, to those that have least to do.
    pub(super) fn tend_audits(&mut self, now_ms: u64) {
        if self.phase != Phase::Training || self.work.audits.slots.is_empty() {
            return;
        }
        let workers = self.trusted_workers();
        let mut load: BTreeMap<Member, usize> = workers
            .iter()
            .map(|worker| (*worker, self.outstanding(*worker).len()))
            .collect();
        let slots: Vec<u32> = self.work.audits.slots.keys().copied().collect();
        let mut leases: BTreeMap<Member, Vec<Task>> = BTreeMap::new();
        for slot in slots {
            let Some(worker) = self.next_auditor(now_ms, slot, &workers, &load) else {
                continue;
            };
            let Some(audit) = self.work.audits.slots.get_mut(&slot) else {
                continue;
            };
            let run = audit.num_runs;
            audit.num_runs += 1;
            audit.leases.push(Lease {
                worker,
                run,
                since_ms: now_ms,
            });
            *load.entry(worker).or_default() += 1;
            leases
                .entry(worker)
                .or_default()
                .push(Task::Audit { slot, run });
        }
        for (worker, tasks) in leases {
            self.lease(now_ms, worker, tasks);
        }
    }

    /// Who is to compute the slot now, if anybody.
    fn next_auditor(
        &self,
        now_ms: u64,
        slot: u32,
        workers: &[Member],
        load: &BTreeMap<Member, usize>,
    ) -> Option<Member> {
        let audit = self.work.audits.slots.get(&slot)?;
        let testimonies = self.testimonies(slot);
        let Verdict::Open { mismatch } = judge(&testimonies, workers.len()) else {
            return None;
        };
        let is_waited_for =
            |lease: &&Lease| now_ms < lease.since_ms.saturating_add(self.config.lease_ms);
        let waited = || {
            audit
                .leases
                .iter()
                .filter(is_waited_for)
                .map(|lease| lease.worker)
        };
        let count = |worker: Member| {
            let said = testimonies
                .iter()
                .filter(|(other, _)| other.same_actor(&worker));
            said.count()
        };
        // Of equals, those that shall leave are asked last. A dispute between one of them and one that stays needs both.
        let leaves = |worker: &Member| self.draining.contains_key(worker);
        if mismatch {
            // A third one if there is one, else those that were asked least.
            if !self.is_reduced() || waited().next().is_some() {
                return None;
            }
            return workers
                .iter()
                .copied()
                .filter(|worker| audit.leases.iter().all(|lease| lease.worker != *worker))
                .min_by_key(|worker| (count(*worker), leaves(worker), load.get(worker), *worker));
        }
        // Before the sums are known, whoever has the slot will be in them.
        let mut expected: Vec<Member> = testimonies.iter().map(|(worker, _)| *worker).collect();
        let mut num_expected = testimonies.len();
        if !self.is_reduced() {
            let item = self.work.slots.get(slot as usize)?;
            let holders = item.workers();
            if holders.is_empty() {
                return None;
            }
            num_expected += 1;
            expected.extend(holders);
        }
        num_expected += waited().count();
        expected.extend(waited());
        if let [only] = workers {
            let asked = audit.leases.iter().any(|lease| lease.worker == *only);
            return (num_expected < 2 && !asked).then_some(*only);
        }
        expected.sort_by_key(|worker| worker.index);
        expected.dedup_by_key(|worker| worker.index);
        if expected.len() >= 2 {
            return None;
        }
        workers
            .iter()
            .copied()
            .filter(|worker| expected.iter().all(|other| !other.same_actor(worker)))
            .filter(|worker| audit.leases.iter().all(|lease| lease.worker != *worker))
            .min_by_key(|worker| (leaves(worker), load.get(worker), *worker))
    }

    pub(super) fn on_audited(
        &mut self,
        now_ms: u64,
        from: Member,
        step: Step,
        slot: u32,
        run: u32,
        digest: Digest,
    ) {
        if self.phase != Phase::Training || step != self.work.step {
            return;
        }
        let Some(audit) = self.work.audits.slots.get_mut(&slot) else {
            return;
        };
        let before = audit.leases.len();
        audit
            .leases
            .retain(|lease| !(lease.worker == from && lease.run == run));
        if audit.leases.len() == before {
            // Not asked for, or answered before: counted once.
            return;
        }
        audit.said.push((from, digest));
        self.try_decide(now_ms);
        self.settle_audits(now_ms);
    }

    /// Acts on what the digests say, once the sums are known.
    pub(super) fn settle_audits(&mut self, now_ms: u64) {
        if self.phase != Phase::Training || !self.is_reduced() {
            return;
        }
        if self.counts_a_liar() {
            return self.repair(now_ms, false);
        }
        let workers = self.trusted_workers();
        let slots: Vec<u32> = self.work.audits.slots.keys().copied().collect();
        for slot in slots {
            let testimonies = self.testimonies(slot);
            let verdict = judge(&testimonies, workers.len());
            let differs = matches!(
                verdict,
                Verdict::Guilty { .. } | Verdict::Open { mismatch: true }
            );
            let step = self.work.step;
            if differs
                && let Some(audit) = self.work.audits.slots.get_mut(&slot)
                && !audit.noted
            {
                audit.noted = true;
                self.out.push(Effect::Note(Note::AuditMismatch {
                    step,
                    slot,
                    testimonies,
                }));
            }
            if let Verdict::Guilty { culprits, truth } = verdict {
                return self.condemn(now_ms, slot, &culprits, truth, &workers);
            }
        }
        self.tend_audits(now_ms);
    }

    /// Quarantines those that lied and repairs the step.
    fn condemn(
        &mut self,
        now_ms: u64,
        slot: u32,
        culprits: &[(Member, Digest)],
        truth: Option<Digest>,
        workers: &[Member],
    ) {
        let step = self.work.step;
        let others = workers.iter().any(|worker| {
            culprits
                .iter()
                .all(|(culprit, _)| !culprit.same_actor(worker))
        });
        for (worker, lied) in culprits {
            self.note(Note::WorkerQuarantined {
                worker: *worker,
                step,
                slot,
                lied: *lied,
                truth,
                permanent: others,
            });
            if others {
                self.quarantined.push(*worker);
            }
        }
        self.repair(now_ms, !others);
    }

    /// Others know of workers that this leader did not know to have lied.
    pub(super) fn learn_quarantined(&mut self, now_ms: u64, known: &[Member]) {
        let news: Vec<Member> = known
            .iter()
            .copied()
            .filter(|worker| worker.role == Role::Worker && !self.is_quarantined(*worker))
            .collect();
        if news.is_empty() {
            return;
        }
        self.quarantined.extend(news);
        if self.phase == Phase::Training {
            self.repair(now_ms, false);
        }
    }

    /// Begins the open step anew on the line that continues this one: what was summed of it is void. Workers push again what they
    /// hold, unless it is void too (`recompute`).
    fn repair(&mut self, now_ms: u64, recompute: bool) {
        self.lineage = self.lineage.repaired();
        self.repair = Some(Repair {
            from: self.work.step,
            recompute,
        });
        let Some(view) = &self.view else {
            return;
        };
        let (placements, restored_from) = (view.placements.clone(), view.restored_from);
        self.publish(now_ms, placements, restored_from);
        if recompute {
            for item in &mut self.work.slots {
                *item = Default::default();
            }
            for audit in self.work.audits.slots.values_mut() {
                audit.leases.clear();
                audit.said.clear();
            }
        } else {
            for worker in self.live(Role::Worker) {
                if self.is_quarantined(worker) {
                    self.drop_worker(worker);
                }
            }
            self.doubt_deliveries(now_ms);
        }
        self.assign(now_ms);
    }
}
