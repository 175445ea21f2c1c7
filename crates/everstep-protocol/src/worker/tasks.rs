//! Leases in, computations out, one at a time and in order.

use std::collections::BTreeMap;

use super::Effect;
use super::held::Held;
use super::machine::Worker;
use crate::ids::{Epoch, Lineage, SlotRange, Step};
use crate::message::{EvaluationSums, Message, Numerics, Task};
use crate::tree::maximal_ranges;

/// Place of a task in the queue: kind, number, run.
pub(super) type Order = (u8, u32, u32);

/// Evaluations come first: the leader's decision waits for them, and shards keep the version until then. Audits come last, while
/// gradients are on their way.
fn order(task: Task) -> Order {
    match task {
        Task::Evaluate(chunk) => (0, chunk, 0),
        Task::Slot(slot) => (1, slot, 0),
        Task::Audit { slot, run } => (2, slot, run),
    }
}

impl<N: Numerics> Worker<N> {
    pub(super) fn on_lease(
        &mut self,
        now_ms: u64,
        epoch: Epoch,
        lineage: Lineage,
        step: Step,
        tasks: Vec<Task>,
    ) {
        let known = self
            .view
            .as_ref()
            .is_some_and(|view| view.epoch == epoch && view.lineage == lineage);
        // Without this leader's view nothing can be pulled or pushed; the leader says both again.
        let is_late = step < self.floor
            || self
                .step
                .is_some_and(|mine| step < mine && self.step_epoch == epoch);
        if !known || is_late {
            return;
        }
        self.step_epoch = epoch;
        if self.step != Some(step) {
            self.leave_step();
            self.step = Some(step);
        }
        let tasks: Vec<Task> = tasks
            .into_iter()
            .filter(|task| match task {
                Task::Slot(slot) | Task::Audit { slot, .. } => *slot < self.config.num_slots,
                Task::Evaluate(_) => true,
            })
            .collect();
        let mut new: BTreeMap<Order, Task> = BTreeMap::new();
        for task in &tasks {
            if self.leased.insert(order(*task)) {
                new.insert(order(*task), *task);
            } else {
                self.repeat(*task);
            }
        }
        if !new.is_empty() {
            let slots: Vec<u32> = new
                .values()
                .filter_map(|task| match task {
                    Task::Slot(slot) => Some(*slot),
                    Task::Evaluate(_) | Task::Audit { .. } => None,
                })
                .collect();
            let root = SlotRange::new(0, self.config.num_slots);
            for range in maximal_ranges(root, &slots) {
                self.held.push(Held::new(range, self.config.num_blocks));
            }
            self.out.push(Effect::Prefetch {
                step,
                tasks: new.values().copied().collect(),
            });
            self.queue.append(&mut new);
        }
        self.pull(now_ms);
        self.push(now_ms);
        self.next();
    }

    /// The leader asks for a task again: its answer was lost, or is still to come.
    fn repeat(&mut self, task: Task) {
        let Some(step) = self.step else {
            return;
        };
        match task {
            Task::Evaluate(chunk) => {
                if let Some(sums) = self.evaluated.get(&chunk).cloned() {
                    self.send_leader(Message::Evaluated { step, chunk, sums });
                }
            }
            Task::Audit { slot, run } => {
                if let Some(&digest) = self.audited.get(&(slot, run)) {
                    self.send_leader(Message::Audited {
                        step,
                        slot,
                        run,
                        digest,
                    });
                }
            }
            Task::Slot(slot) => {
                for held in &mut self.held {
                    if held.range.contains(slot) {
                        held.delivered = false;
                    }
                }
            }
        }
    }

    /// Starts the next computation when the device is free and has the step's parameters.
    pub(super) fn next(&mut self) {
        let Some(step) = self.step else {
            return;
        };
        if self.in_flight.is_some() {
            return;
        }
        for (block, parameters) in self.device.load(step) {
            self.out.push(Effect::LoadParameters {
                version: step,
                block,
                parameters,
            });
        }
        if !self.device.is_at(step) {
            return;
        }
        if let Some((_, task)) = self.queue.pop_first() {
            self.in_flight = Some((step, task));
            self.out.push(Effect::Compute { step, task });
        }
    }

    pub(super) fn on_computed(
        &mut self,
        now_ms: u64,
        step: Step,
        slot: u32,
        gradients: Vec<N::Gradient>,
    ) {
        let task = match self.in_flight {
            Some((of, task @ (Task::Slot(at) | Task::Audit { slot: at, .. })))
                if of == step && at == slot =>
            {
                task
            }
            _ => return,
        };
        self.in_flight = None;
        let complete = gradients.len() == self.config.num_blocks as usize;
        if self.step == Some(step) && complete {
            match task {
                Task::Audit { run, .. } => {
                    let digest = self.numerics.digest(&gradients);
                    self.audited.insert((slot, run), digest);
                    self.send_leader(Message::Audited {
                        step,
                        slot,
                        run,
                        digest,
                    });
                }
                _ => self.add(now_ms, step, slot, gradients),
            }
        }
        self.next();
    }

    fn add(&mut self, now_ms: u64, step: Step, slot: u32, gradients: Vec<N::Gradient>) {
        let digest = self
            .config
            .audit
            .covers(step, slot)
            .then(|| self.numerics.digest(&gradients));
        let held = self.held.iter_mut().find(|held| held.range.contains(slot));
        if let Some(held) = held
            && held.add(&self.numerics, slot, gradients, digest)
        {
            self.push(now_ms);
        }
    }

    pub(super) fn on_evaluated(&mut self, step: Step, chunk: u32, sums: EvaluationSums) {
        if self.in_flight != Some((step, Task::Evaluate(chunk))) {
            return;
        }
        self.in_flight = None;
        if self.step == Some(step) {
            self.evaluated.insert(chunk, sums.clone());
            self.send_leader(Message::Evaluated { step, chunk, sums });
        }
        self.next();
    }
}
