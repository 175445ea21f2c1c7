//! The shard's dispatch, and the path of a step through its blocks.

use std::collections::{BTreeMap, BTreeSet};

use super::block::{Block, Early};
use super::checkpoint::StoredObject;
use super::{Effect, Event, ShardConfig};
use crate::allegiance::{Allegiance, Standing};
use crate::ids::{BlockId, Epoch, Lineage, Member, Role, SlotRange, Step};
use crate::message::{Decision, Message, Numerics, ReplicaRole, Status, View, ViewId};
use crate::retry::Pulse;
use crate::tree::Insertion;

/// The shard machine.
#[derive(Debug)]
pub struct Shard<N: Numerics> {
    pub(super) config: ShardConfig,
    pub(super) numerics: N,
    pub(super) allegiance: Allegiance,
    pub(super) view: Option<View>,
    pub(super) ready: Option<ViewId>,
    pub(super) lineage: Lineage,
    pub(super) blocks: BTreeMap<BlockId, Block<N>>,
    /// Snapshots taken while an event is handled.
    pub(super) snapshots: BTreeMap<Step, Vec<(BlockId, N::State)>>,
    /// Snapshots on their way to the store.
    pub(super) storing: BTreeSet<(Step, BlockId)>,
    /// Stored objects of the newest checkpoints, for a leader that did not hear of them.
    pub(super) stored: BTreeMap<Step, Vec<StoredObject>>,
    pub(super) pulse: Pulse,
    pub(super) over: bool,
    pub(super) out: Vec<Effect<N>>,
}

impl<N: Numerics> Shard<N> {
    /// An empty shard.
    pub fn new(config: ShardConfig, numerics: N) -> Self {
        Self {
            allegiance: Allegiance::new(config.resend_ms),
            pulse: Pulse::new(config.resend_ms),
            config,
            numerics,
            view: None,
            ready: None,
            lineage: Lineage::default(),
            blocks: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            storing: BTreeSet::new(),
            stored: BTreeMap::new(),
            over: false,
            out: Vec::new(),
        }
    }

    /// The highest epoch seen.
    pub fn epoch(&self) -> Epoch {
        self.allegiance.epoch()
    }

    /// The line of state it holds.
    pub fn lineage(&self) -> Lineage {
        self.lineage
    }

    /// The view it follows.
    pub fn view(&self) -> Option<&View> {
        self.view.as_ref()
    }

    /// The versions of the blocks that are here.
    pub fn versions(&self) -> BTreeMap<BlockId, Step> {
        self.blocks
            .iter()
            .filter_map(|(&id, block)| Some((id, block.version()?)))
            .collect()
    }

    /// The state of a block and its version, if it is here.
    pub fn state(&self, block: BlockId) -> Option<(Step, &N::State)> {
        let replica = self.blocks.get(&block)?.replica.as_ref()?;
        Some((replica.version, &replica.state))
    }

    /// What it would tell a new leader.
    pub fn status(&self) -> Status {
        Status::Shard {
            lineage: self.lineage,
            blocks: self
                .blocks
                .iter()
                .filter_map(|(&id, block)| block.status(id))
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
            Event::Loaded {
                lineage,
                version,
                block,
                state,
            } => self.on_loaded(now_ms, lineage, version, block, state),
            Event::Stored {
                version,
                blocks,
                object,
            } => self.on_stored(version, blocks, object),
            Event::Tick => {
                if self.pulse.beats(now_ms) {
                    self.on_tick(now_ms);
                }
            }
        }
        for (version, blocks) in std::mem::take(&mut self.snapshots) {
            self.out.push(Effect::Store { version, blocks });
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

    pub(super) fn greet(&mut self, now_ms: u64) {
        self.allegiance.greets(now_ms);
        let message = self.hello();
        match self.allegiance.leader() {
            Some(leader) => self.send(leader, message),
            None => self.out.push(Effect::SendCoordinators { message }),
        }
    }

    pub(super) fn role(&self, block: BlockId) -> Option<ReplicaRole> {
        let view = self.view.as_ref()?;
        view.placements.get(block as usize)?.role_of(self.config.me)
    }

    pub(super) fn end(&mut self, effect: Effect<N>) {
        self.over = true;
        self.pulse.stop();
        self.out.push(effect);
    }

    fn on_message(&mut self, now_ms: u64, from: Member, message: Message<N>) {
        match message {
            Message::Announce { .. }
            | Message::Expelled { .. }
            | Message::View(_)
            | Message::Decide { .. }
            | Message::Snapshot { .. }
            | Message::Finish { .. }
                if from.role == Role::Coordinator =>
            {
                self.on_leader(now_ms, from, message);
            }
            Message::Pull { version, blocks } => self.on_pull(from, version, &blocks),
            Message::Partial {
                lineage,
                step,
                range,
                block,
                gradient,
            } if lineage == self.lineage => {
                self.on_partial(now_ms, from, step, range, block, gradient);
            }
            Message::Replicate {
                lineage,
                step,
                block,
                gradient,
            } if lineage == self.lineage => self.on_replicate(now_ms, from, step, block, gradient),
            Message::ReplicateAck {
                lineage,
                step,
                block,
            } if lineage == self.lineage => self.on_replicate_ack(now_ms, from, step, block),
            Message::SeedRequest { lineage, block } if lineage == self.lineage => {
                self.on_seed_request(from, block);
            }
            Message::Seed {
                lineage,
                block,
                version,
                last,
                state,
            } if lineage == self.lineage => {
                if let Some(held) = self.blocks.get_mut(&block) {
                    held.seeding = None;
                    if held.version().is_none_or(|mine| mine < version) {
                        held.install(version, state, last, self.config.num_slots);
                        self.settle(now_ms, block);
                        self.check_ready();
                    }
                }
            }
            // What other roles say to others, or what belongs to another line of state.
            _ => {}
        }
    }

    fn on_leader(&mut self, now_ms: u64, from: Member, message: Message<N>) {
        let epoch = match &message {
            Message::Announce { epoch }
            | Message::Expelled { epoch }
            | Message::Decide { epoch, .. }
            | Message::Snapshot { epoch, .. }
            | Message::Finish { epoch } => *epoch,
            Message::View(view) => view.epoch,
            _ => return,
        };
        if matches!(message, Message::Finish { .. }) {
            // The end is a fact of the store, whoever says it.
            return self.end(Effect::Finished);
        }
        let standing = self.allegiance.judge(from, epoch);
        if standing == Standing::Fenced {
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
            Message::Decide {
                lineage,
                step,
                decision,
                snapshot,
                ..
            } => {
                self.allegiance.heard(now_ms, false);
                self.on_decide(now_ms, lineage, step, decision, snapshot);
            }
            Message::Snapshot {
                version, blocks, ..
            } => self.on_snapshot(version, blocks),
            _ => {}
        }
        if standing == Standing::New {
            self.greet(now_ms);
        }
    }

    fn on_pull(&mut self, from: Member, version: Step, blocks: &[BlockId]) {
        for &id in blocks {
            let Some(block) = self.blocks.get_mut(&id) else {
                continue;
            };
            match block.version() {
                Some(mine) if mine > version => {}
                Some(mine) if mine == version => {
                    if let Some(parameters) = block.parameters(&self.numerics, id) {
                        self.out.push(Effect::Send {
                            to: from,
                            message: Message::Parameters {
                                version,
                                block: id,
                                parameters,
                            },
                        });
                    }
                }
                _ => {
                    block.pulls.insert(from.index, (from, version));
                }
            }
        }
    }

    fn on_partial(
        &mut self,
        now_ms: u64,
        from: Member,
        step: Step,
        range: SlotRange,
        id: BlockId,
        gradient: N::Gradient,
    ) {
        let Some(block) = self.blocks.get_mut(&id) else {
            return;
        };
        let Some(version) = block.version() else {
            return;
        };
        if step > version {
            // One step ahead: the worker got its parameters from a replica that has applied already.
            if step == version.next() && block.early.len() < 2 * self.config.num_slots as usize {
                block.early.push(Early {
                    from,
                    step,
                    range,
                    gradient,
                });
            }
            return;
        }
        if step == version && block.add(&self.numerics, range, gradient) == Insertion::NotANode {
            return;
        }
        let lineage = self.lineage;
        self.send(
            from,
            Message::PartialAck {
                lineage,
                step,
                range,
                block: id,
            },
        );
        self.settle(now_ms, id);
    }

    fn on_replicate(
        &mut self,
        now_ms: u64,
        from: Member,
        step: Step,
        id: BlockId,
        gradient: N::Gradient,
    ) {
        let Some(block) = self.blocks.get_mut(&id) else {
            return;
        };
        let numerics = &self.numerics;
        if let Some(entry) = block.entry(step)
            && entry.reduced.is_none()
        {
            let report = numerics.report(&gradient);
            entry.reduced = Some((gradient, report));
        }
        // Held or past: say so, again if need be. What is ahead of this replica is acknowledged when it gets there.
        let held = block
            .version()
            .is_some_and(|version| step < version || (step == version && block.is_reduced()));
        if held {
            if block.version() == Some(step) {
                block.acked_to = Some(from);
            }
            let lineage = self.lineage;
            self.send(
                from,
                Message::ReplicateAck {
                    lineage,
                    step,
                    block: id,
                },
            );
        }
        self.settle(now_ms, id);
    }

    fn on_replicate_ack(&mut self, now_ms: u64, from: Member, step: Step, id: BlockId) {
        let Some(block) = self.blocks.get_mut(&id) else {
            return;
        };
        for (_, retry) in block.sent.iter_mut() {
            retry.postpone(now_ms);
        }
        if block.version() == Some(step) {
            block.acked.insert(from);
            block.sent.remove(&from);
            self.settle(now_ms, id);
        }
    }

    fn on_seed_request(&mut self, from: Member, id: BlockId) {
        let Some(replica) = self
            .blocks
            .get(&id)
            .and_then(|block| block.replica.as_ref())
        else {
            return;
        };
        let message = Message::Seed {
            lineage: self.lineage,
            block: id,
            version: replica.version,
            last: replica.last,
            state: replica.state.clone(),
        };
        self.send(from, message);
    }

    fn on_decide(
        &mut self,
        now_ms: u64,
        lineage: Lineage,
        step: Step,
        decision: Decision,
        snapshot: bool,
    ) {
        if lineage != self.lineage {
            return;
        }
        let ids: Vec<BlockId> = self.blocks.keys().copied().collect();
        for id in ids {
            let listed = self.role(id).is_some();
            let Some(block) = self.blocks.get_mut(&id) else {
                continue;
            };
            if !listed && block.version().is_none_or(|version| version <= step) {
                // The step moved on without this replica: nothing that it holds counts any more.
                self.blocks.remove(&id);
                continue;
            }
            if let Some(entry) = block.entry(step) {
                entry.decision.get_or_insert((decision, snapshot));
            }
            self.settle(now_ms, id);
        }
        self.send_leader(Message::Applied { lineage, step });
    }

    /// Carries a block as far as it goes, and says what is due.
    pub(super) fn settle(&mut self, now_ms: u64, id: BlockId) {
        loop {
            self.take_up(id);
            let Some(block) = self.blocks.get_mut(&id) else {
                return;
            };
            let Some((step, snapshot)) = block.advance(&self.numerics, id) else {
                break;
            };
            if snapshot {
                self.snapshot_if_mine(step.next(), id);
            }
        }
        self.replicate(now_ms, id);
        self.report(now_ms, id);
        self.acknowledge(id);
        self.tell_seeded(now_ms, id);
    }

    /// Answers what waited for this version: early partial sums and pulls.
    fn take_up(&mut self, id: BlockId) {
        let Some(block) = self.blocks.get_mut(&id) else {
            return;
        };
        let Some(version) = block.version() else {
            return;
        };
        if !block.early.is_empty() {
            for early in std::mem::take(&mut block.early) {
                if early.step > version {
                    block.early.push(early);
                    continue;
                }
                if early.step == version
                    && block.add(&self.numerics, early.range, early.gradient) == Insertion::NotANode
                {
                    continue;
                }
                self.out.push(Effect::Send {
                    to: early.from,
                    message: Message::PartialAck {
                        lineage: self.lineage,
                        step: early.step,
                        range: early.range,
                        block: id,
                    },
                });
            }
        }
        if block.pulls.values().any(|(_, wanted)| *wanted <= version) {
            for (index, (worker, wanted)) in std::mem::take(&mut block.pulls) {
                if wanted > version {
                    block.pulls.insert(index, (worker, wanted));
                } else if wanted == version
                    && let Some(parameters) = block.parameters(&self.numerics, id)
                {
                    self.out.push(Effect::Send {
                        to: worker,
                        message: Message::Parameters {
                            version,
                            block: id,
                            parameters,
                        },
                    });
                }
            }
        }
    }
}
