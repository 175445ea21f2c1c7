//! The shard's state and dispatch.

use std::collections::{BTreeMap, BTreeSet};

use super::block::{Block, Early};
use super::checkpoint::StoredObject;
use super::{Effect, Event, ShardConfig};
use crate::allegiance::{Allegiance, Standing};
use crate::ids::{BlockId, Epoch, Lineage, Member, Role, Step};
use crate::message::{Message, Numerics, ReplicaRole, Status, View, ViewId};
use crate::retry::Pulse;

/// The shard machine.
#[derive(Debug)]
pub struct Shard<N: Numerics> {
    pub(super) config: ShardConfig,
    pub(super) numerics: N,
    pub(super) allegiance: Allegiance,
    pub(super) view: Option<View>,
    pub(super) ready: Option<ViewId>,
    pub(super) lineage: Lineage,
    /// Lines that this life has held state of and given up.
    pub(super) left: BTreeSet<Lineage>,
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
            left: BTreeSet::new(),
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
                .filter_map(|(&id, block)| block.status(&self.numerics, id))
                .collect(),
            quarantined: self
                .view
                .as_ref()
                .map(|view| view.quarantined.clone())
                .unwrap_or_default(),
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
            Event::StoreAbandoned { version, blocks } => {
                for id in blocks {
                    self.storing.remove(&(version, id));
                }
            }
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

    pub(super) fn primary(&self, block: BlockId) -> Option<Member> {
        let view = self.view.as_ref()?;
        Some(view.placements.get(block as usize)?.primary)
    }

    pub(super) fn role(&self, block: BlockId) -> Option<ReplicaRole> {
        let view = self.view.as_ref()?;
        view.placements.get(block as usize)?.role_of(self.config.me)
    }

    /// Whether its view is of the leader that it follows. Until then that one counts on what this shard has told it.
    pub(super) fn follows_view(&self) -> bool {
        self.view
            .as_ref()
            .is_some_and(|view| view.epoch == self.allegiance.epoch())
    }

    fn is_quarantined(&self, worker: Member) -> bool {
        self.view
            .as_ref()
            .is_some_and(|view| view.is_quarantined(worker))
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
                digests,
            } if lineage == self.lineage && !self.is_quarantined(from) => {
                let partial = Early {
                    from,
                    step,
                    range,
                    gradient,
                    digests,
                };
                self.on_partial(now_ms, block, partial);
            }
            Message::Replicate {
                lineage,
                step,
                block,
                gradient,
                testimonies,
            } if lineage == self.lineage => {
                self.on_replicate(now_ms, from, step, block, gradient, testimonies);
            }
            Message::ReplicateAck {
                lineage,
                step,
                block,
                testimonies,
            } if lineage == self.lineage => {
                self.on_replicate_ack(now_ms, from, step, block, testimonies);
            }
            Message::SeedRequest { lineage, block } if lineage == self.lineage => {
                self.on_seed_request(from, block);
            }
            Message::Seed {
                lineage,
                block,
                version,
                last,
                state,
            } if lineage == self.lineage
                && self.follows_view()
                && self.primary(block) == Some(from) =>
            {
                // Only from the primary of this leader's view: one of an earlier leader may be ahead of what this one has decided, and a
                // replica that is ahead of what it told this one can neither reduce nor hold the open step.
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
            | Message::Snapshot { epoch, .. }
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
        if standing == Standing::New {
            self.forget_decisions();
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
                view,
                lineage,
                step,
                decision,
                snapshot,
            } => {
                self.allegiance.heard(now_ms, false);
                self.on_decide(now_ms, view, lineage, step, decision, snapshot);
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
}
