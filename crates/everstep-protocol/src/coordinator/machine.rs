//! The coordinator's state and dispatch.

use std::collections::{BTreeMap, BTreeSet};

use super::checkpoint::Checkpoint;
use super::drain::Drain;
use super::members::Peer;
use super::step::{Decided, Work};
use super::{CoordinatorConfig, Effect, Event, Note};
use crate::ids::{BlockId, Epoch, Lineage, Member, Role, Step};
use crate::message::{Message, Numerics, Repair, View, ViewId};
use crate::retry::{Pulse, Retry};

/// What a leader is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Not leading.
    Standby,
    /// Waits for shards to say what they hold.
    Gathering,
    /// Waits for shards to load a checkpoint, or to make initial weights.
    Restoring,
    /// Leases, decides, commits.
    Training,
    /// The last version is committed.
    Finished,
}

/// The coordinator machine.
#[derive(Debug)]
pub struct Coordinator<N: Numerics> {
    pub(super) config: CoordinatorConfig,
    pub(super) me: Member,
    pub(super) numerics: N,
    /// The highest epoch seen anywhere.
    seen: Epoch,
    pub(super) epoch: Epoch,
    pub(super) phase: Phase,
    /// Members by actor.
    pub(super) peers: BTreeMap<(Role, u32), Peer>,
    /// Lives up to this one are lost, by actor.
    pub(super) lost: BTreeMap<(Role, u32), u64>,
    pub(super) view: Option<View>,
    pub(super) view_number: u64,
    /// Workers that have lied.
    pub(super) quarantined: Vec<Member>,
    /// What the last repair of this line made void.
    pub(super) repair: Option<Repair>,
    pub(super) lineage: Lineage,
    pub(super) num_lineages: u64,
    /// Shards that have loaded their blocks of a restored line.
    pub(super) loaded: BTreeSet<Member>,
    pub(super) gathering_since_ms: u64,
    /// Whether what the shards hold may be resumed; not after a block has lost all its replicas.
    pub(super) resumable: bool,
    /// `FindCheckpoint` was asked and not answered yet.
    pub(super) seeking: bool,
    /// When the checkpoint that is being restored is verified again.
    pub(super) restore_retry: Option<Retry>,
    /// Number of the view that changed a primary last: what was delivered in an earlier one does not count.
    pub(super) primaries_since: u64,
    /// Blocks that were declared degraded last.
    pub(super) degraded: Vec<BlockId>,
    pub(super) degraded_since_ms: Option<u64>,
    pub(super) work: Work,
    pub(super) decided: Option<Decided>,
    pub(super) checkpoints: BTreeMap<Step, Checkpoint>,
    /// Version of the newest committed checkpoint.
    pub(super) committed: Step,
    /// One past the highest step known to be decided.
    pub(super) high_water: Step,
    /// One past the last step logged in this epoch.
    pub(super) logged: Step,
    /// Version evaluated last in this epoch.
    pub(super) evaluated: Option<Step>,
    pub(super) slots_recomputed: u64,
    /// Members that shall leave.
    pub(super) draining: BTreeMap<Member, Drain>,
    /// The next version is checkpointed, due or not.
    pub(super) checkpoint_next: bool,
    /// The shell's clock asked for a checkpoint.
    pub(super) checkpoint_due: bool,
    /// The version to stop at, if nobody can take what draining shards hold.
    pub(super) hold: Option<Step>,
    /// When the open step began.
    pub(super) step_since_ms: u64,
    /// How long steps take.
    pub(super) step_ms: Option<f64>,
    heartbeat_due_ms: u64,
    pulse: Pulse,
    pub(super) out: Vec<Effect<N>>,
}

impl<N: Numerics> Coordinator<N> {
    /// A standby.
    pub fn new(config: CoordinatorConfig, me: Member, numerics: N) -> Self {
        Self {
            pulse: Pulse::new(config.resend_ms),
            config,
            me,
            numerics,
            seen: Epoch::default(),
            epoch: Epoch::default(),
            phase: Phase::Standby,
            peers: BTreeMap::new(),
            lost: BTreeMap::new(),
            view: None,
            view_number: 0,
            quarantined: Vec::new(),
            repair: None,
            lineage: Lineage::default(),
            num_lineages: 0,
            loaded: BTreeSet::new(),
            gathering_since_ms: 0,
            resumable: true,
            seeking: false,
            restore_retry: None,
            primaries_since: 0,
            degraded: Vec::new(),
            degraded_since_ms: None,
            work: Work::default(),
            decided: None,
            checkpoints: BTreeMap::new(),
            committed: Step::default(),
            high_water: Step::default(),
            logged: Step::default(),
            evaluated: None,
            slots_recomputed: 0,
            draining: BTreeMap::new(),
            checkpoint_next: false,
            checkpoint_due: false,
            hold: None,
            step_since_ms: 0,
            step_ms: None,
            heartbeat_due_ms: 0,
            out: Vec::new(),
        }
    }

    /// The epoch it leads, or led last.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// What it is doing.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether it leads.
    pub fn is_leading(&self) -> bool {
        self.phase != Phase::Standby
    }

    /// The step that is not decided yet.
    pub fn step(&self) -> Step {
        self.work.step
    }

    /// The current view.
    pub fn view(&self) -> Option<&View> {
        self.view.as_ref()
    }

    /// The members it knows.
    pub fn members(&self) -> impl Iterator<Item = Member> + '_ {
        self.peers.values().map(|peer| peer.member)
    }

    /// Version of the newest committed checkpoint that it knows of.
    pub fn committed(&self) -> Step {
        self.committed
    }

    /// Whether a checkpoint is on its way, or will be with the next version.
    pub fn is_checkpointing(&self) -> bool {
        self.checkpoint_due || !self.checkpoints.is_empty()
    }

    /// Workers that are leased nothing, in any life, because they lied.
    pub fn quarantined(&self) -> &[Member] {
        &self.quarantined
    }

    /// Slots that were leased again because their holder was lost or slow, in this life.
    pub fn slots_recomputed(&self) -> u64 {
        self.slots_recomputed
    }

    /// When `Tick` is wanted.
    pub fn next_deadline_ms(&self) -> Option<u64> {
        self.pulse.due_ms()
    }

    /// Takes an event; returns what is to be done, in order.
    pub fn handle(&mut self, now_ms: u64, event: Event<N>) -> Vec<Effect<N>> {
        match event {
            Event::Elected {
                epoch,
                checkpoint,
                high_water,
                quarantined,
            } => {
                self.learn_quarantined(now_ms, &quarantined);
                self.on_elected(now_ms, epoch, checkpoint, high_water);
            }
            Event::Quarantined { workers } => {
                if self.is_leading() {
                    self.learn_quarantined(now_ms, &workers);
                }
            }
            Event::Message { from, message } => self.on_message(now_ms, from, message),
            Event::Lost { member } => {
                if self.is_leading() && member.role != Role::Coordinator {
                    self.lose(now_ms, member);
                }
            }
            Event::Drain {
                members,
                seconds_left,
            } => {
                if self.is_leading() {
                    self.on_drain(now_ms, members, seconds_left);
                }
            }
            Event::CheckpointDue => self.checkpoint_due = self.is_leading(),
            Event::ManifestRefused { version } => {
                if self.is_leading() {
                    self.on_manifest_refused(version);
                }
            }
            Event::ManifestCommitted { version } => {
                if self.is_leading() {
                    self.on_manifest_committed(now_ms, version);
                }
            }
            Event::CheckpointFound { version } => {
                if self.seeking && matches!(self.phase, Phase::Gathering | Phase::Restoring) {
                    self.on_checkpoint_found(now_ms, version);
                }
            }
            Event::Tick => {
                if self.is_leading() && self.pulse.beats(now_ms) {
                    self.on_tick(now_ms);
                }
            }
        }
        std::mem::take(&mut self.out)
    }

    pub(super) fn send(&mut self, to: Member, message: Message<N>) {
        self.out.push(Effect::Send { to, message });
    }

    pub(super) fn note(&mut self, note: Note) {
        self.out.push(Effect::Note(note));
    }

    fn on_elected(&mut self, now_ms: u64, epoch: Epoch, checkpoint: Step, high_water: Step) {
        if self.phase == Phase::Finished || (epoch <= self.epoch && self.is_leading()) {
            return;
        }
        if epoch < self.seen {
            self.out.push(Effect::Deposed { by: self.seen });
            return;
        }
        self.seen = epoch;
        self.reset();
        self.epoch = epoch;
        self.committed = checkpoint;
        self.high_water = high_water;
        self.pulse.start(now_ms);
        if self.config.num_steps > 0 && checkpoint.0 >= self.config.num_steps {
            // The last manifest is only written when everything else is done.
            return self.finish(now_ms);
        }
        self.gather(now_ms, true);
        self.announce(now_ms);
    }

    /// Forgets everything that belongs to an epoch.
    fn reset(&mut self) {
        self.phase = Phase::Standby;
        self.peers.clear();
        self.lost.clear();
        self.view = None;
        self.view_number = 0;
        self.repair = None;
        self.num_lineages = 0;
        self.loaded.clear();
        self.primaries_since = 0;
        self.degraded.clear();
        self.degraded_since_ms = None;
        self.work = Work::default();
        self.decided = None;
        self.checkpoints.clear();
        self.logged = Step::default();
        self.evaluated = None;
        self.draining.clear();
        self.checkpoint_next = false;
        self.checkpoint_due = false;
        self.hold = None;
        self.step_ms = None;
        self.pulse.stop();
    }

    pub(super) fn gather(&mut self, now_ms: u64, resumable: bool) {
        self.phase = Phase::Gathering;
        self.gathering_since_ms = now_ms;
        self.resumable = resumable;
        self.seeking = false;
    }

    fn announce(&mut self, now_ms: u64) {
        self.heartbeat_due_ms = now_ms.saturating_add(self.config.resend_ms);
        let message = match self.phase {
            Phase::Finished => Message::Finish { epoch: self.epoch },
            _ => Message::Announce { epoch: self.epoch },
        };
        self.out.push(Effect::Broadcast { message });
    }

    /// Leads no more, and says why.
    pub(super) fn abandon_run(&mut self, step: Step, num_skipped: u32) {
        self.reset();
        self.out.push(Effect::GaveUp { step, num_skipped });
    }

    pub(super) fn finish(&mut self, now_ms: u64) {
        self.phase = Phase::Finished;
        self.pulse.start(now_ms);
        self.announce(now_ms);
        self.out.push(Effect::Finished);
    }

    /// Whether a message comes from a later epoch than any seen so far; then this coordinator leads no more.
    fn is_deposed_by(&mut self, message: &Message<N>) -> bool {
        let epoch = match message {
            Message::Announce { epoch }
            | Message::Hello { epoch, .. }
            | Message::Expelled { epoch }
            | Message::Lease { epoch, .. }
            | Message::Snapshot { epoch, .. }
            | Message::Finish { epoch } => *epoch,
            Message::View(view) => view.epoch,
            Message::ViewReady { view }
            | Message::Reduced { view, .. }
            | Message::Decide { view, .. } => view.epoch,
            _ => return false,
        };
        if epoch <= self.seen {
            return false;
        }
        self.seen = epoch;
        if self.is_leading() {
            self.reset();
            self.out.push(Effect::Deposed { by: epoch });
        }
        true
    }

    fn on_message(&mut self, now_ms: u64, from: Member, message: Message<N>) {
        if self.phase == Phase::Finished {
            if from.role != Role::Coordinator {
                let epoch = self.epoch;
                self.send(from, Message::Finish { epoch });
            }
            return;
        }
        if from.role == Role::Coordinator && matches!(message, Message::Finish { .. }) {
            // The last manifest is a fact of the store, whichever epoch committed it.
            return self.finish(now_ms);
        }
        if self.is_deposed_by(&message) || !self.is_leading() {
            return;
        }
        if from.role == Role::Coordinator {
            if let Message::Announce { epoch } = message
                && epoch < self.epoch
            {
                self.note(Note::Refused { from, epoch });
            }
            return;
        }
        if !self.admit(now_ms, from, &message) {
            return;
        }
        match message {
            Message::Hello { status, .. } => self.on_hello(now_ms, from, status),
            Message::ViewReady { view } => self.on_view_ready(now_ms, from, view),
            Message::Delivered { view, step, range } => {
                self.on_delivered(now_ms, from, view, step, range);
            }
            Message::Evaluated { step, chunk, sums } => {
                self.on_evaluated(now_ms, from, step, chunk, sums);
            }
            Message::Reduced {
                view,
                step,
                block,
                report,
                testimonies,
            } if Some(view) == self.view_id() => {
                self.on_reduced(now_ms, step, block, report, testimonies);
            }
            Message::Audited {
                step,
                slot,
                run,
                digest,
            } => self.on_audited(now_ms, from, step, slot, run, digest),
            Message::Applied { lineage, step } if lineage == self.lineage => {
                self.on_applied(from, step);
            }
            Message::Stored {
                version,
                blocks,
                object,
            } => self.on_stored(version, &blocks, object),
            Message::Seeded {
                lineage,
                block,
                version,
            } if lineage == self.lineage => self.on_seeded(now_ms, from, block, version),
            // What other roles say to others, or what belongs to another view or line of state.
            _ => {}
        }
    }

    pub(super) fn view_id(&self) -> Option<ViewId> {
        self.view.as_ref().map(View::id)
    }

    fn on_tick(&mut self, now_ms: u64) {
        if now_ms >= self.heartbeat_due_ms {
            self.announce(now_ms);
        }
        if self.phase == Phase::Gathering {
            self.try_gather(now_ms);
        }
        if self.phase == Phase::Restoring {
            self.tend_restoring(now_ms);
        }
        if matches!(self.phase, Phase::Restoring | Phase::Training) {
            self.repeat_views(now_ms);
        }
        if self.phase == Phase::Training {
            self.repair_placement(now_ms);
            self.repeat_decision(now_ms);
            self.tend_leases(now_ms);
            self.settle_audits(now_ms);
            self.tend_audits(now_ms);
            self.tend_checkpoints(now_ms);
            self.tend_drain(now_ms);
        }
    }
}
