//! Leases: which worker computes which task of the step.

use super::machine::{Coordinator, Phase};
use super::members::is_live;
use super::{Effect, Note};
use crate::ids::{Member, SlotRange, Step};
use crate::message::{Message, Numerics, Status, Task, ViewId};
use crate::retry::Retry;

/// One slot or evaluation chunk.
#[derive(Clone, Debug, Default)]
pub(super) struct Item {
    /// Workers that compute or deliver it, and since when.
    holders: Vec<(Member, u64)>,
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
            None => self.holders.iter().map(|(holder, _)| *holder).collect(),
        }
    }

    fn waits_for(&self, member: Member) -> bool {
        self.done.is_none() && self.holders.iter().any(|(holder, _)| *holder == member)
    }

    /// Its only holder, if that has had it since `since_ms` or longer.
    fn sole_holder(&self, since_ms: u64) -> Option<Member> {
        match (self.done, self.holders.as_slice()) {
            (None, [(holder, since)]) if *since <= since_ms => Some(*holder),
            _ => None,
        }
    }
}

fn indices(items: &[Item], pick: impl Fn(&Item) -> bool) -> Vec<u32> {
    (0..)
        .zip(items)
        .filter(|(_, item)| pick(item))
        .map(|(index, _)| index)
        .collect()
}

/// Part `part` of `all` in `parts` contiguous, near-equal parts, the longer ones first.
fn share(all: &[u32], part: usize, parts: usize) -> &[u32] {
    let (base, extra) = (all.len() / parts, all.len() % parts);
    let start = part * base + part.min(extra);
    let end = start + base + usize::from(part < extra);
    &all[start..end]
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

    /// Leases free tasks over all workers, in contiguous ranges; the least busy ones get the larger shares.
    fn assign_free(&mut self, now_ms: u64) {
        if self.phase != Phase::Training {
            return;
        }
        let chunks = indices(&self.work.chunks, Item::is_free);
        let slots = indices(&self.work.slots, Item::is_free);
        if chunks.is_empty() && slots.is_empty() {
            return;
        }
        let mut workers: Vec<(usize, Member)> = self
            .trusted_workers()
            .into_iter()
            .map(|worker| (self.outstanding(worker).len(), worker))
            .collect();
        workers.sort();
        let count = workers.len();
        for (part, (_, worker)) in workers.into_iter().enumerate() {
            let chunks = share(&chunks, part, count).iter().copied();
            let slots = share(&slots, part, count).iter().copied();
            let tasks: Vec<Task> = chunks
                .map(Task::Evaluate)
                .chain(slots.map(Task::Slot))
                .collect();
            self.lease(now_ms, worker, tasks);
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
        for task in &tasks {
            if let Some(item) = self.item(*task) {
                item.holders.push((worker, now_ms));
            }
        }
        let resend_ms = self.config.resend_ms;
        if let Some(peer) = self.peers.get_mut(&(worker.role, worker.index)) {
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
                item.holders.push((worker, now_ms));
            }
        }
    }

    pub(super) fn on_delivered(
        &mut self,
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
    }

    pub(super) fn on_evaluated(
        &mut self,
        now_ms: u64,
        from: Member,
        step: Step,
        chunk: u32,
        loss_sum: f64,
        tokens: u64,
    ) {
        if self.phase != Phase::Training || step != self.work.step || self.is_evaluated() {
            return;
        }
        let index = chunk as usize;
        let (Some(item), Some(loss)) = (
            self.work.chunks.get_mut(index),
            self.work.losses.get_mut(index),
        ) else {
            return;
        };
        item.done = Some(from);
        loss.get_or_insert((loss_sum, tokens));
        if !self.is_evaluated() {
            return;
        }
        // In chunk order, so that the mean has the same bits whoever computed what.
        let (loss_sum, tokens) = self
            .work
            .losses
            .iter()
            .flatten()
            .fold((0.0, 0), |(loss_sum, tokens), (loss, count)| {
                (loss_sum + loss, tokens + count)
            });
        self.evaluated = Some(step);
        self.out.push(Effect::LogEvaluation {
            version: step,
            loss: if tokens > 0 {
                loss_sum / tokens as f64
            } else {
                0.0
            },
            tokens,
        });
        self.try_decide(now_ms);
        self.try_commit(step);
    }

    /// A worker is gone: what it had not delivered is leased again at once.
    pub(super) fn release_worker(&mut self, now_ms: u64, worker: Member) {
        self.drop_leases(worker);
        self.assign(now_ms);
    }

    fn drop_leases(&mut self, worker: Member) {
        self.work.audits.release(worker);
        let waits = |item: &Item| item.waits_for(worker);
        let before = indices(&self.work.slots, waits);
        for item in self.work.slots.iter_mut().chain(&mut self.work.chunks) {
            item.holders.retain(|(holder, _)| *holder != worker);
        }
        let freed: Vec<u32> = before
            .into_iter()
            .filter(|slot| self.work.slots[*slot as usize].is_free())
            .collect();
        self.count_again(freed, worker, true);
    }

    /// A worker is trusted no more: neither what it has nor what it delivered counts.
    pub(super) fn drop_worker(&mut self, worker: Member) {
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
                item.holders = vec![(worker, now_ms)];
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
        let Some(since_ms) = now_ms.checked_sub(self.config.lease_ms) else {
            return;
        };
        for helper in idle {
            let slow = self
                .work
                .chunks
                .iter()
                .chain(&self.work.slots)
                .find_map(|item| item.sole_holder(since_ms));
            let Some(slow) = slow else {
                return;
            };
            let held = |item: &Item| item.sole_holder(since_ms) == Some(slow);
            let chunks = indices(&self.work.chunks, held);
            let slots = indices(&self.work.slots, held);
            let tasks = chunks
                .into_iter()
                .map(Task::Evaluate)
                .chain(slots.iter().copied().map(Task::Slot))
                .collect();
            self.count_again(slots, slow, false);
            self.lease(now_ms, helper, tasks);
        }
    }
}
