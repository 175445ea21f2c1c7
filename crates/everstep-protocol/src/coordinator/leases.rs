//! Leases: which worker computes which task of the step.

use std::collections::BTreeMap;

use super::machine::{Coordinator, Phase};
use super::members::is_live;
use super::shares::{self, Load};
use super::{Effect, Note};
use crate::ids::{Member, Role, SlotRange, Step};
use crate::message::{EvaluationSums, Message, Numerics, Status, Task, ViewId};
use crate::retry::Retry;

/// Leases of a task at once, at most.
const HOLDERS_MAX: usize = 3;
/// A worker that is too slow for a share computes a slot that another one computes too, every so many steps, to be measured.
const PROBE_STEPS: u64 = 8;

/// A lease of a task.
#[derive(Clone, Copy, Debug)]
struct Holder {
    member: Member,
    since_ms: u64,
    /// Whether its time is known already, or says nothing of the worker's pace.
    timed: bool,
}

/// One slot or evaluation chunk.
#[derive(Clone, Debug, Default)]
pub(super) struct Item {
    /// Workers that compute or deliver it.
    holders: Vec<Holder>,
    /// Who delivered it first.
    done: Option<Member>,
}

impl Item {
    fn is_free(&self) -> bool {
        self.done.is_none() && self.holders.is_empty()
    }

    /// Who delivered it, or whoever has it.
    pub(super) fn workers(&self) -> Vec<Member> {
        match self.done {
            Some(worker) => vec![worker],
            None => self.holders.iter().map(|holder| holder.member).collect(),
        }
    }

    fn is_held_by(&self, member: Member) -> bool {
        self.holders.iter().any(|holder| holder.member == member)
    }

    fn waits_for(&self, member: Member) -> bool {
        self.done.is_none() && self.is_held_by(member)
    }

    /// Whether all its holders have had it for longer than they should take.
    fn is_late(&self, now_ms: u64, patience_ms: &BTreeMap<Member, u64>) -> bool {
        self.done.is_none()
            && (1..HOLDERS_MAX).contains(&self.holders.len())
            && self.holders.iter().all(|holder| {
                patience_ms
                    .get(&holder.member)
                    .is_some_and(|patience_ms| now_ms >= holder.since_ms + patience_ms)
            })
    }
}

/// How fast a worker is.
#[derive(Clone, Debug, Default)]
pub(super) struct Pace {
    /// Time per slot, mean of the latest, once one was seen.
    slot_ms: Option<f64>,
    /// When it got or delivered something last.
    since_ms: u64,
}

impl Pace {
    fn observe(&mut self, now_ms: u64, num_slots: u64) {
        let slot_ms = self.slot_ms_at(now_ms, num_slots);
        self.slot_ms = Some(self.slot_ms.map_or(slot_ms, |mean| (mean + slot_ms) / 2.0));
        self.since_ms = now_ms;
    }

    /// It takes at least as long as it has had for slots that others delivered first.
    fn observe_lost(&mut self, now_ms: u64, num_slots: u64) {
        let slot_ms = self.slot_ms_at(now_ms, num_slots);
        if self.slot_ms.is_some_and(|mean| mean < slot_ms) {
            self.observe(now_ms, num_slots);
        }
    }

    fn slot_ms_at(&self, now_ms: u64, num_slots: u64) -> f64 {
        (now_ms.saturating_sub(self.since_ms) as f64 / num_slots.max(1) as f64).max(1.0)
    }
}

fn indices(items: &[Item], pick: impl Fn(&Item) -> bool) -> Vec<u32> {
    (0..)
        .zip(items)
        .filter(|(_, item)| pick(item))
        .map(|(index, _)| index)
        .collect()
}

impl<N: Numerics> Coordinator<N> {
    pub(super) fn outstanding(&self, worker: Member) -> Vec<Task> {
        let waits = |item: &Item| item.waits_for(worker);
        let chunks = indices(&self.work.chunks, waits);
        let slots = indices(&self.work.slots, waits);
        chunks
            .into_iter()
            .map(Task::Evaluate)
            .chain(slots.into_iter().map(Task::Slot))
            .chain(self.work.audits.outstanding(worker))
            .collect()
    }

    /// Leases what nobody has.
    pub(super) fn assign(&mut self, now_ms: u64) {
        self.assign_free(now_ms);
        self.tend_audits(now_ms);
    }

    /// Leases free tasks over all workers, in contiguous ranges; the quick and the least busy ones get the larger shares.
    fn assign_free(&mut self, now_ms: u64) {
        if self.phase != Phase::Training || self.is_held() {
            return;
        }
        let chunks = indices(&self.work.chunks, Item::is_free);
        let slots = indices(&self.work.slots, Item::is_free);
        if chunks.is_empty() && slots.is_empty() {
            return;
        }
        let usual_ms = self.usual_slot_ms().unwrap_or(1.0);
        let mut workers: Vec<(usize, Member)> = self
            .lessees()
            .into_iter()
            .map(|worker| (self.outstanding(worker).len(), worker))
            .collect();
        workers.sort();
        let load: Vec<Load> = workers
            .iter()
            .map(|(outstanding, worker)| {
                let slot_ms = self.slot_ms(*worker).unwrap_or(usual_ms);
                Load {
                    busy_ms: *outstanding as f64 * slot_ms,
                    slot_ms,
                }
            })
            .collect();
        let workers: Vec<Member> = workers.into_iter().map(|(_, worker)| worker).collect();
        self.lease_shares(now_ms, &workers, &load, &chunks, &slots);
        self.probe(now_ms, &workers);
    }

    /// Who may be leased something: workers that stay, or, for the evaluation of the last version, whoever is left.
    fn lessees(&self) -> Vec<Member> {
        let staying = self.staying(Role::Worker);
        if staying.is_empty() && self.is_last(self.work.step) {
            self.trusted_workers()
        } else {
            staying
        }
    }

    /// Leases contiguous shares.
    fn lease_shares(
        &mut self,
        now_ms: u64,
        workers: &[Member],
        load: &[Load],
        chunks: &[u32],
        slots: &[u32],
    ) {
        let mut chunks = shares::split(chunks, load).into_iter();
        let mut slots = shares::split(slots, load).into_iter();
        for worker in workers {
            let chunks = chunks.next().unwrap_or_default();
            let slots = slots.next().unwrap_or_default();
            let tasks: Vec<Task> = chunks
                .iter()
                .copied()
                .map(Task::Evaluate)
                .chain(slots.iter().copied().map(Task::Slot))
                .collect();
            self.lease(now_ms, *worker, tasks);
        }
    }

    /// Workers that were too slow for a share get a slot that somebody else computes too, now and then: who delivers in time gets its
    /// share back.
    fn probe(&mut self, now_ms: u64, workers: &[Member]) {
        let step = self.work.step.0;
        for worker in workers {
            let is_due = (step + u64::from(worker.index)).is_multiple_of(PROBE_STEPS);
            if !is_due || self.has_part(*worker) || self.slot_ms(*worker).is_none() {
                continue;
            }
            let slots = indices(&self.work.slots, |item| {
                item.done.is_none() && item.holders.len() == 1
            });
            if let Some(slot) = slots.last() {
                self.lease(now_ms, *worker, vec![Task::Slot(*slot)]);
            }
        }
    }

    fn slot_ms(&self, worker: Member) -> Option<f64> {
        self.peers
            .get(&(worker.role, worker.index))
            .and_then(|peer| peer.pace.slot_ms)
    }

    /// Median time per slot of the workers that are there, the lower one of two.
    fn usual_slot_ms(&self) -> Option<f64> {
        let mut known: Vec<f64> = self
            .peers
            .values()
            .filter_map(|peer| peer.pace.slot_ms)
            .collect();
        known.sort_by(f64::total_cmp);
        known.get(known.len().saturating_sub(1) / 2).copied()
    }

    /// How long each worker may take for what it holds: half as much again as it should, and one slot more. As long as nobody has
    /// delivered anything, the configured time.
    fn patience_ms(&self) -> BTreeMap<Member, u64> {
        let usual_ms = self.usual_slot_ms();
        let patience_ms = |worker: Member| {
            let Some(usual_ms) = usual_ms else {
                return self.config.lease_ms;
            };
            let items = self.work.slots.iter().chain(&self.work.chunks);
            let held = items.filter(|item| item.is_held_by(worker)).count() as f64;
            let own_ms = self.slot_ms(worker).unwrap_or(usual_ms);
            let slot_ms = own_ms.clamp(usual_ms, 3.0 * usual_ms);
            ((1.5 * (held * slot_ms + usual_ms)) as u64).max(self.config.resend_ms)
        };
        self.live(Role::Worker)
            .into_iter()
            .map(|worker| (worker, patience_ms(worker)))
            .collect()
    }

    /// How long a worker will need for what it has not delivered, if its pace is known.
    pub(super) fn outstanding_ms(&self, worker: Member) -> Option<f64> {
        let slot_ms = self.slot_ms(worker)?;
        Some(self.outstanding(worker).len() as f64 * slot_ms)
    }

    /// Whether a worker has delivered all that it was leased.
    pub(super) fn is_idle(&self, worker: Member) -> bool {
        self.outstanding(worker).is_empty()
    }

    /// Whether a worker holds or has delivered something of the open step.
    pub(super) fn has_part(&self, worker: Member) -> bool {
        self.work
            .slots
            .iter()
            .chain(&self.work.chunks)
            .any(|item| item.is_held_by(worker) || item.done == Some(worker))
            || self.work.audits.outstanding(worker).next().is_some()
    }

    /// The step is decided: who has not delivered what it was leased is at least as slow as that.
    pub(super) fn measure_losers(&mut self, now_ms: u64) {
        for worker in self.live(Role::Worker) {
            let untimed = |holder: &Holder| holder.member == worker && !holder.timed;
            let lost = self
                .work
                .slots
                .iter()
                .filter(|item| item.holders.iter().any(untimed))
                .count() as u64;
            if lost > 0
                && let Some(peer) = self.peers.get_mut(&(worker.role, worker.index))
            {
                peer.pace.observe_lost(now_ms, lost);
            }
        }
    }

    fn item(&mut self, task: Task) -> Option<&mut Item> {
        match task {
            Task::Slot(slot) => self.work.slots.get_mut(slot as usize),
            Task::Evaluate(chunk) => self.work.chunks.get_mut(chunk as usize),
            Task::Audit { .. } => None,
        }
    }

    pub(super) fn lease(&mut self, now_ms: u64, worker: Member, tasks: Vec<Task>) {
        if tasks.is_empty() {
            return;
        }
        let is_idle = self.outstanding(worker).is_empty();
        for task in &tasks {
            if let Some(item) = self.item(*task) {
                item.holders.push(Holder {
                    member: worker,
                    since_ms: now_ms,
                    timed: false,
                });
            }
        }
        let resend_ms = self.config.resend_ms;
        if let Some(peer) = self.peers.get_mut(&(worker.role, worker.index)) {
            if is_idle {
                peer.pace.since_ms = now_ms;
            }
            peer.lease_retry = Retry::new(now_ms, resend_ms);
        }
        self.send_lease(worker, tasks);
    }

    fn send_lease(&mut self, worker: Member, tasks: Vec<Task>) {
        let message = Message::Lease {
            epoch: self.epoch,
            lineage: self.lineage,
            step: self.work.step,
            tasks,
        };
        self.send(worker, message);
    }

    /// Ranges that a worker holds from before count as leased to it: it delivers them in this leader's view.
    pub(super) fn adopt_held(&mut self, now_ms: u64, worker: Member, status: &Status) {
        let Status::Worker {
            lineage,
            step,
            held,
        } = status
        else {
            return;
        };
        if lineage.root() != self.lineage.root() || *step != self.work.step {
            return;
        }
        if self.is_quarantined(worker) {
            return;
        }
        for (slot, item) in (0..).zip(self.work.slots.iter_mut()) {
            if item.is_free() && held.iter().any(|range| range.contains(slot)) {
                item.holders.push(Holder {
                    member: worker,
                    since_ms: now_ms,
                    timed: true,
                });
            }
        }
    }

    pub(super) fn on_delivered(
        &mut self,
        now_ms: u64,
        from: Member,
        view: ViewId,
        step: Step,
        range: SlotRange,
    ) {
        let counts = view.epoch == self.epoch && view.number >= self.primaries_since;
        if self.phase != Phase::Training || step != self.work.step || !counts {
            return;
        }
        if self.is_quarantined(from) {
            return;
        }
        for (slot, item) in (0..).zip(self.work.slots.iter_mut()) {
            if range.contains(slot) && item.done.is_none() {
                item.done = Some(from);
            }
        }
        self.measure(now_ms, from, range);
    }

    /// A delivery tells how fast the worker is; what it had computed for an earlier leader, or says again, does not.
    fn measure(&mut self, now_ms: u64, from: Member, range: SlotRange) {
        let mut num_slots = 0;
        for (slot, item) in (0..).zip(self.work.slots.iter_mut()) {
            for holder in &mut item.holders {
                if range.contains(slot) && holder.member == from && !holder.timed {
                    holder.timed = true;
                    num_slots += 1;
                }
            }
        }
        if num_slots > 0
            && let Some(peer) = self.peers.get_mut(&(from.role, from.index))
        {
            peer.pace.observe(now_ms, num_slots);
        }
    }

    pub(super) fn on_evaluated(
        &mut self,
        now_ms: u64,
        from: Member,
        step: Step,
        chunk: u32,
        sums: EvaluationSums,
    ) {
        if self.phase != Phase::Training || step != self.work.step || self.is_evaluated() {
            return;
        }
        let index = chunk as usize;
        let (Some(item), Some(known)) = (
            self.work.chunks.get_mut(index),
            self.work.evaluations.get_mut(index),
        ) else {
            return;
        };
        item.done = Some(from);
        known.get_or_insert(sums);
        if let Some(peer) = self.peers.get_mut(&(from.role, from.index)) {
            peer.pace.since_ms = now_ms;
        }
        if !self.is_evaluated() {
            return;
        }
        let mut sums = EvaluationSums::default();
        for chunk in self.work.evaluations.iter().flatten() {
            sums.add(chunk);
        }
        self.evaluated = Some(step);
        self.out.push(Effect::LogEvaluation {
            version: step,
            sums,
        });
        self.try_decide(now_ms);
        self.try_commit(step);
    }

    /// A worker is gone: what it had not delivered is leased again at once.
    pub(super) fn release_worker(&mut self, now_ms: u64, worker: Member) {
        self.work.audits.release(worker);
        self.hand_over(now_ms, worker);
    }

    /// A worker will not be done in time: the slots and chunks that it has not delivered are leased to others at once. Its audits stay:
    /// there may be nobody else to ask, and those that are late are leased again in any case.
    pub(super) fn hand_over(&mut self, now_ms: u64, worker: Member) {
        self.drop_leases(worker);
        self.assign(now_ms);
    }

    fn drop_leases(&mut self, worker: Member) {
        let waits = |item: &Item| item.waits_for(worker);
        let before = indices(&self.work.slots, waits);
        for item in self.work.slots.iter_mut().chain(&mut self.work.chunks) {
            item.holders.retain(|holder| holder.member != worker);
        }
        let freed: Vec<u32> = before
            .into_iter()
            .filter(|slot| self.work.slots[*slot as usize].is_free())
            .collect();
        self.count_again(freed, worker, true);
    }

    /// A worker is trusted no more: neither what it has nor what it delivered counts.
    pub(super) fn drop_worker(&mut self, worker: Member) {
        self.work.audits.release(worker);
        self.drop_leases(worker);
        let slots = indices(&self.work.slots, |item| {
            item.done.is_some_and(|done| done.same_actor(&worker))
        });
        for slot in &slots {
            self.work.slots[*slot as usize] = Item::default();
        }
        self.count_again(slots, worker, true);
    }

    fn count_again(&mut self, slots: Vec<u32>, from: Member, lost: bool) {
        if slots.is_empty() {
            return;
        }
        self.slots_recomputed += slots.len() as u64;
        let step = self.work.step;
        self.note(Note::SlotsReassigned {
            step,
            slots,
            from,
            lost,
        });
    }

    /// Primaries have changed: what live workers delivered is outstanding again, until they have delivered it to the new ones. What
    /// dead workers delivered may be missing there; the new primaries get a moment to report before it is computed again.
    pub(super) fn doubt_deliveries(&mut self, now_ms: u64) {
        let mut doubt = false;
        let peers = &self.peers;
        for item in &mut self.work.slots {
            let Some(worker) = item.done else {
                continue;
            };
            if is_live(peers, worker) {
                item.done = None;
                item.holders = vec![Holder {
                    member: worker,
                    since_ms: now_ms,
                    timed: true,
                }];
            } else {
                doubt = true;
            }
        }
        if doubt {
            self.work.doubt_ms = Some(now_ms.saturating_add(self.config.resend_ms));
        }
    }

    fn settle_doubt(&mut self, now_ms: u64) {
        if self.work.doubt_ms.is_none_or(|due_ms| now_ms < due_ms) {
            return;
        }
        self.work.doubt_ms = None;
        if self.is_reduced() {
            return;
        }
        let mut dead: Vec<Member> = self
            .work
            .slots
            .iter()
            .filter_map(|item| item.done)
            .filter(|worker| !self.is_live(*worker))
            .collect();
        dead.sort();
        dead.dedup();
        for worker in dead {
            let slots = indices(&self.work.slots, |item| item.done == Some(worker));
            for slot in &slots {
                self.work.slots[*slot as usize] = Item::default();
            }
            self.count_again(slots, worker, true);
        }
        self.assign(now_ms);
    }

    /// Repeats leases that are not answered, gives slow ones to idle workers too, and settles doubts.
    pub(super) fn tend_leases(&mut self, now_ms: u64) {
        self.settle_doubt(now_ms);
        let mut idle = Vec::new();
        for worker in self.trusted_workers() {
            let tasks = self.outstanding(worker);
            if tasks.is_empty() {
                idle.push(worker);
                continue;
            }
            let fires = self
                .peers
                .get_mut(&(worker.role, worker.index))
                .is_some_and(|peer| peer.lease_retry.fires(now_ms));
            if fires {
                self.send_lease(worker, tasks);
            }
        }
        idle.retain(|worker| !self.draining.contains_key(worker));
        if !idle.is_empty() {
            self.lease_again(now_ms, &idle);
        }
    }

    /// Leases late tasks to idle workers too; the first result wins.
    fn lease_again(&mut self, now_ms: u64, idle: &[Member]) {
        let patience_ms = self.patience_ms();
        let late = |item: &Item| item.is_late(now_ms, &patience_ms);
        let chunks = indices(&self.work.chunks, late);
        let slots = indices(&self.work.slots, late);
        if chunks.is_empty() && slots.is_empty() {
            return;
        }
        let mut slow: BTreeMap<Member, Vec<u32>> = BTreeMap::new();
        for slot in &slots {
            if let Some(holder) = self.work.slots[*slot as usize].holders.first() {
                slow.entry(holder.member).or_default().push(*slot);
            }
        }
        for (worker, slots) in slow {
            self.count_again(slots, worker, false);
        }
        let usual_ms = self.usual_slot_ms().unwrap_or(1.0);
        let load: Vec<Load> = idle
            .iter()
            .map(|worker| Load {
                busy_ms: 0.0,
                slot_ms: self.slot_ms(*worker).unwrap_or(usual_ms),
            })
            .collect();
        self.lease_shares(now_ms, idle, &load, &chunks, &slots);
    }
}
