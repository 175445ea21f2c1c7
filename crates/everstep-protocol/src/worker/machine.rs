//! The worker's state and dispatch.

use std::collections::{BTreeMap, BTreeSet};

use super::held::Held;
use super::parameters::Device;
use super::tasks::Order;
use super::{Effect, Event, WorkerConfig};
use crate::allegiance::{Allegiance, Standing};
use crate::ids::{Epoch, Lineage, Member, Role, Step};
use crate::message::{Digest, EvaluationSums, Message, Numerics, Status, Task, View};
use crate::retry::Pulse;

/// The worker machine.
#[derive(Debug)]
pub struct Worker<N: Numerics> {
    pub(super) config: WorkerConfig,
    pub(super) numerics: N,
    allegiance: Allegiance,
    pub(super) view: Option<View>,
    pub(super) lineage: Lineage,
    /// The step of the lease.
    pub(super) step: Option<Step>,
    /// Epoch of the leader that leased it. A later one may go on from an earlier step.
    pub(super) step_epoch: Epoch,
    /// Steps below are decided; their leases are late.
    pub(super) floor: Step,
    /// All tasks of the step that were ever leased here.
    pub(super) leased: BTreeSet<Order>,
    /// Those that are not computed yet, in order.
    pub(super) queue: BTreeMap<Order, Task>,
    pub(super) in_flight: Option<(Step, Task)>,
    pub(super) device: Device<N>,
    pub(super) held: Vec<Held<N>>,
    pub(super) evaluated: BTreeMap<u32, EvaluationSums>,
    /// What audits of the step gave, by slot and run.
    pub(super) audited: BTreeMap<(u32, u32), Digest>,
    pulse: Pulse,
    over: bool,
    pub(super) out: Vec<Effect<N>>,
}

impl<N: Numerics> Worker<N> {
    /// An idle worker.
    pub fn new(config: WorkerConfig, numerics: N) -> Self {
        Self {
            allegiance: Allegiance::new(config.resend_ms),
            pulse: Pulse::new(config.resend_ms),
            device: Device::new(config.num_blocks),
            config,
            numerics,
            view: None,
            lineage: Lineage::default(),
            step: None,
            step_epoch: Epoch::default(),
            floor: Step::default(),
            leased: BTreeSet::new(),
            queue: BTreeMap::new(),
            in_flight: None,
            held: Vec::new(),
            evaluated: BTreeMap::new(),
            audited: BTreeMap::new(),
            over: false,
            out: Vec::new(),
        }
    }

    /// The highest epoch seen.
    pub fn epoch(&self) -> Epoch {
        self.allegiance.epoch()
    }

    /// The step it works on, if any.
    pub fn step(&self) -> Option<Step> {
        self.step
    }

    /// What the device computes now.
    pub fn computing(&self) -> Option<(Step, Task)> {
        self.in_flight
    }

    /// What it would tell a new leader.
    pub fn status(&self) -> Status {
        Status::Worker {
            lineage: self.lineage,
            step: self.step.unwrap_or(self.floor),
            held: self
                .held
                .iter()
                .filter(|held| held.is_complete())
                .map(|held| held.range)
                .collect(),
        }
    }

    /// When `Tick` is wanted.
    pub fn next_deadline_ms(&self) -> Option<u64> {
        self.pulse.due_ms()
    }

    /// Takes an event; returns what is to be done, in order.
    pub fn handle(&mut self, now_ms: u64, event: Event<N>) -> Vec<Effect<N>> {
        if self.over {
            return Vec::new();
        }
        match event {
            Event::Started => {
                self.pulse.start(now_ms);
                self.greet(now_ms);
            }
            Event::Message { from, message } => self.on_message(now_ms, from, message),
            Event::Computed {
                step,
                slot,
                gradients,
            } => self.on_computed(now_ms, step, slot, gradients),
            Event::Evaluated { step, chunk, sums } => self.on_evaluated(step, chunk, sums),
            Event::Tick => {
                if self.pulse.beats(now_ms) {
                    if self.allegiance.must_greet(now_ms) {
                        self.greet(now_ms);
                    }
                    self.pull(now_ms);
                    self.push(now_ms);
                }
            }
        }
        std::mem::take(&mut self.out)
    }

    pub(super) fn send(&mut self, to: Member, message: Message<N>) {
        self.out.push(Effect::Send { to, message });
    }

    pub(super) fn send_leader(&mut self, message: Message<N>) {
        if let Some(leader) = self.allegiance.leader() {
            self.send(leader, message);
        }
    }

    fn hello(&self) -> Message<N> {
        Message::Hello {
            epoch: self.allegiance.epoch(),
            status: self.status(),
        }
    }

    fn greet(&mut self, now_ms: u64) {
        self.allegiance.greets(now_ms);
        let message = self.hello();
        match self.allegiance.leader() {
            Some(leader) => self.send(leader, message),
            None => self.out.push(Effect::SendCoordinators { message }),
        }
    }

    fn end(&mut self, effect: Effect<N>) {
        self.over = true;
        self.pulse.stop();
        self.out.push(effect);
    }

    fn on_message(&mut self, now_ms: u64, from: Member, message: Message<N>) {
        match message {
            Message::Announce { .. }
            | Message::Expelled { .. }
            | Message::View(_)
            | Message::Lease { .. }
            | Message::Decide { .. }
            | Message::Finish { .. }
                if from.role == Role::Coordinator =>
            {
                self.on_leader(now_ms, from, message);
            }
            Message::Parameters {
                version,
                block,
                parameters,
            } if self.step == Some(version) => {
                self.device.arrive(now_ms, version, block, parameters);
                self.next();
            }
            Message::PartialAck {
                lineage,
                step,
                range,
                block,
            } if lineage == self.lineage && self.step == Some(step) => {
                self.on_partial_ack(now_ms, from, range, block);
            }
            // What other roles say to others, or what belongs to another line of state.
            _ => {}
        }
    }

    fn on_leader(&mut self, now_ms: u64, from: Member, message: Message<N>) {
        let epoch = match &message {
            Message::Announce { epoch }
            | Message::Expelled { epoch }
            | Message::Lease { epoch, .. }
            | Message::Finish { epoch } => *epoch,
            Message::Decide { view, .. } => view.epoch,
            Message::View(view) => view.epoch,
            _ => return,
        };
        if matches!(message, Message::Finish { .. }) {
            // The end is a fact of the store, whoever says it.
            return self.end(Effect::Finished);
        }
        let standing = self.allegiance.judge(from, epoch);
        if standing == Standing::Fenced {
            self.out.push(Effect::Refused { from, epoch });
            if matches!(message, Message::Announce { .. }) {
                // A leader that does not know it is deposed would keep others from standing for election.
                let message = self.hello();
                self.send(from, message);
            }
            return;
        }
        match message {
            Message::Announce { .. } => {
                if standing == Standing::New || self.allegiance.must_answer_heartbeat(now_ms) {
                    self.greet(now_ms);
                }
                return;
            }
            Message::Expelled { .. } => return self.end(Effect::Restart),
            Message::View(view) => self.on_view(now_ms, view),
            Message::Lease {
                epoch,
                lineage,
                step,
                tasks,
            } => {
                self.allegiance.heard(now_ms, false);
                self.on_lease(now_ms, epoch, lineage, step, tasks);
            }
            Message::Decide { lineage, step, .. } => {
                self.allegiance.heard(now_ms, false);
                if lineage == self.lineage && self.step.is_none_or(|mine| mine <= step) {
                    self.leave_step();
                    self.floor = self.floor.max(step.next());
                }
            }
            _ => {}
        }
        if standing == Standing::New {
            self.greet(now_ms);
        }
    }

    /// Forgets the step: it is decided, or belongs to another line.
    pub(super) fn leave_step(&mut self) {
        self.step = None;
        self.leased.clear();
        self.queue.clear();
        self.held.clear();
        self.evaluated.clear();
        self.audited.clear();
        self.device.leave();
    }

    fn on_view(&mut self, now_ms: u64, view: View) {
        if view.placements.len() != self.config.num_blocks as usize {
            return;
        }
        self.allegiance.heard(now_ms, true);
        let old = self.view.as_ref().map(View::id);
        let id = view.id();
        if old.is_some_and(|old| id < old) {
            return;
        }
        self.send_leader(Message::ViewReady { view: id });
        if old == Some(id) {
            return;
        }
        if view.lineage.root() != self.lineage.root() {
            self.leave_step();
            self.floor = Step::default();
        } else if view.lineage != self.lineage {
            let void = view.is_quarantined(self.config.me)
                || view.repair.is_some_and(|repair| repair.recompute);
            if void {
                self.leave_step();
            }
            // What primaries have of it is void.
            for held in &mut self.held {
                held.push_again();
            }
        }
        self.lineage = view.lineage;
        if old.is_none_or(|old| old.epoch < view.epoch) {
            // A new leader may lease a step again that the old one had decided without anybody having applied it.
            self.floor = Step::default();
            for held in &mut self.held {
                held.delivered = false;
            }
        }
        self.device.retarget(&view);
        self.view = Some(view);
        self.pull(now_ms);
        self.push(now_ms);
    }
}
