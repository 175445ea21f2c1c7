//! Looks at what members say and do: phases that faults wait for, and rare branches that were taken.

use std::collections::{BTreeMap, BTreeSet};

use everstep_protocol::coordinator::{Event as CoordinatorEvent, Phase as LeaderPhase};
use everstep_protocol::message::ReplicaRole;
use everstep_protocol::{BlockId, Epoch, Lineage, Member, Message, Status, Step, View};

use crate::coverage::Branch;
use crate::fault::Fault;
use crate::phase::Phase;
use crate::process::Machine;
use crate::toy::Toy;
use crate::world::{Local, World};

/// What was seen lately.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    /// Lives that some leader has declared lost.
    pub(crate) declared: BTreeSet<Member>,
    /// Replaced leaders that woke up and do not know it yet.
    pub(crate) woken: BTreeSet<usize>,
    /// Whether the machine at work was woken by time.
    pub(crate) ticks: bool,
    /// Whether the shard at work was given a view.
    has_view: bool,
    /// What the coordinator at work has said and noted so far.
    has_decided: bool,
    has_logged: bool,
    has_resumed: bool,
    /// Blocks of a step whose reports were sent, as bits.
    reduced: (Step, u64),
    /// Blocks of a step whose sums were sent to followers, as bits.
    replicating: (Step, u64),
    /// The latest leader and what it does.
    latest: (Epoch, Option<LeaderPhase>),
    /// The view of each coordinator.
    views: BTreeMap<usize, View>,
}

/// A coordinator before an event.
#[derive(Debug)]
pub(crate) struct Before {
    phase: LeaderPhase,
    epoch: Epoch,
    lineage: Option<Lineage>,
}

fn mark(seen: &mut (Step, u64), step: Step, block: BlockId) {
    if seen.0 != step {
        *seen = (step, 0);
    }
    seen.1 |= 1 << block;
}

impl World<'_> {
    pub(crate) fn before(&mut self, actor: usize, event: &Local) -> Option<Before> {
        let Some(Machine::Coordinator(machine)) = &self.actors[actor].machine else {
            return None;
        };
        self.watch.ticks = matches!(
            event,
            Local::Wake | Local::Coordinator(CoordinatorEvent::Tick)
        );
        self.watch.has_decided = false;
        self.watch.has_logged = false;
        self.watch.has_resumed = false;
        Some(Before {
            phase: machine.phase(),
            epoch: machine.epoch(),
            lineage: machine.view().map(|view| view.lineage),
        })
    }

    /// What an event has changed at a coordinator.
    pub(crate) fn observe_state(&mut self, actor: usize, before: &Option<Before>) {
        let (Some(before), Some(Machine::Coordinator(machine))) =
            (before, &self.actors[actor].machine)
        else {
            return;
        };
        let (phase, epoch) = (machine.phase(), machine.epoch());
        let mut branches = Vec::new();
        let is_new = epoch != before.epoch;
        if machine.is_leading() && epoch >= self.watch.latest.0 {
            if is_new {
                match self.watch.latest.1 {
                    Some(LeaderPhase::Gathering) => branches.push(Branch::FailoverWhileGathering),
                    Some(LeaderPhase::Restoring) => branches.push(Branch::FailoverWhileRestoring),
                    _ => {}
                }
            }
            self.watch.latest = (epoch, Some(phase));
        }
        let gathers =
            phase == LeaderPhase::Gathering && (is_new || before.phase != LeaderPhase::Gathering);
        let lineage = machine.view().map(|view| view.lineage);
        let restores_anew = phase == LeaderPhase::Restoring && lineage != before.lineage;
        if !is_new && before.phase == LeaderPhase::Restoring && (gathers || restores_anew) {
            branches.push(Branch::RollbackWhileRestoring);
        }
        if let Some(view) = machine.view() {
            let old = self.watch.views.get(&actor);
            if old.is_none_or(|old| old.id() != view.id()) {
                if let Some(old) = old
                    && old.lineage == view.lineage
                    && old.epoch == view.epoch
                {
                    let members: BTreeSet<Member> = machine.members().collect();
                    compare(old, view, &members, &mut branches);
                }
                let view = view.clone();
                self.watch.views.insert(actor, view);
            }
        }
        for branch in branches {
            self.met(branch);
        }
        if gathers {
            self.reached(Phase::Gathering, actor);
        }
    }

    /// A message is sent.
    pub(crate) fn observe(&mut self, from: usize, target: usize, message: &Message<Toy>) {
        match message {
            Message::Lease { .. } => self.reached(Phase::LeaseSent, target),
            Message::Partial {
                step, range, block, ..
            } => {
                let sent = &mut self.actors[from].sent;
                if sent.step != *step {
                    sent.step = *step;
                    sent.primaries.clear();
                }
                let to = target as u32;
                let before = sent.primaries.insert((*block, range.start), to);
                if before.is_some_and(|before| before != to) {
                    self.met(Branch::ResentAfterPromotion);
                }
                self.reached(Phase::PartialPushed, from);
            }
            Message::Replicate { step, block, .. } => {
                mark(&mut self.watch.replicating, *step, *block);
                self.reached(Phase::Replicating, from);
            }
            Message::Reduced { step, block, .. } => {
                mark(&mut self.watch.reduced, *step, *block);
                if self.watch.reduced.1.count_ones() == self.plan.workload.num_blocks {
                    self.reached(Phase::AllReduced, from);
                }
            }
            Message::Decide { .. } => self.watch.has_decided = true,
            Message::Snapshot { .. } if !self.watch.ticks && !self.watch.has_resumed => {
                self.met(Branch::SnapshotReassigned);
            }
            Message::Seed { .. } => self.reached(Phase::Seeding, target),
            Message::SeedRequest { block, .. } => {
                let role = match &self.actors[from].machine {
                    Some(Machine::Shard(shard)) => shard
                        .view()
                        .and_then(|view| view.placements.get(*block as usize))
                        .and_then(|placement| placement.role_of(self.actors[from].member)),
                    _ => None,
                };
                if role == Some(ReplicaRole::Backup) {
                    self.met(Branch::GapSeeded);
                }
            }
            _ => {}
        }
    }

    /// A message arrives.
    pub(crate) fn observe_arrival(&mut self, actor: usize, message: &Message<Toy>) {
        let branch = match (&self.actors[actor].machine, message) {
            (Some(Machine::Shard(shard)), message) => {
                self.watch.has_view = matches!(message, Message::View(_));
                match message {
                    Message::Partial { lineage, .. }
                    | Message::Replicate { lineage, .. }
                    | Message::ReplicateAck { lineage, .. }
                    | Message::Seed { lineage, .. }
                        if *lineage < shard.lineage() =>
                    {
                        Some(Branch::StaleLine)
                    }
                    Message::Partial { step, block, .. } => shard
                        .state(*block)
                        .filter(|(version, _)| version < step)
                        .map(|_| Branch::EarlyPartial),
                    _ => None,
                }
            }
            (
                Some(Machine::Coordinator(machine)),
                Message::Hello {
                    epoch,
                    status: Status::Worker { held, .. },
                },
            ) => {
                let adopts = machine.phase() == LeaderPhase::Gathering
                    && *epoch == machine.epoch()
                    && !held.is_empty();
                adopts.then_some(Branch::HeldSumsAdopted)
            }
            _ => None,
        };
        if let Some(branch) = branch {
            self.met(branch);
        }
    }

    pub(crate) fn observe_logging(&mut self) {
        self.watch.has_logged = true;
    }

    pub(crate) fn observe_resuming(&mut self) {
        self.watch.has_resumed = true;
        if self.watch.has_decided {
            self.met(Branch::DecisionRederived);
        }
        if self.watch.has_logged {
            self.met(Branch::DecisionLoggedLate);
        }
    }

    pub(crate) fn observe_promotion(&mut self, actor: usize, blocks: &[BlockId]) {
        let Some(Machine::Coordinator(machine)) = &self.actors[actor].machine else {
            return;
        };
        let (step, replicating) = self.watch.replicating;
        if step == machine.step() && blocks.iter().any(|block| replicating & (1 << block) != 0) {
            self.met(Branch::PromotedWhileReplicating);
        }
    }

    pub(crate) fn observe_restart(&mut self) {
        if self.watch.has_view {
            self.met(Branch::LeftLineRejoined);
        }
    }

    /// A process goes on; what it stands for may have been given up.
    pub(crate) fn observe_waking(&mut self, host: usize) {
        for actor in self.hosts[host].actors.clone() {
            if self.watch.declared.contains(&self.actors[actor].member) {
                self.count_fault(Fault::Zombie);
            }
            if let Some(Machine::Coordinator(machine)) = &self.actors[actor].machine
                && machine.is_leading()
                && machine.epoch().0 < self.store.latest_epoch()
            {
                self.watch.woken.insert(actor);
                self.count_fault(Fault::ZombieLeader);
            }
        }
    }

    pub(crate) fn observe_deposition(&mut self, actor: usize) {
        if self.watch.woken.remove(&actor) {
            self.met(Branch::DeposedLeaderWoke);
        }
    }
}

/// What a view changes on one line of state.
fn compare(old: &View, new: &View, members: &BTreeSet<Member>, branches: &mut Vec<Branch>) {
    let pairs = || old.placements.iter().zip(&new.placements);
    let seeding = pairs().any(|(old, new)| {
        old.joining
            .iter()
            .any(|member| !new.replicas().any(|replica| replica == *member))
    });
    if seeding {
        branches.push(Branch::ViewChangedWhileSeeding);
    }
    let trimmed = pairs().any(|(old, new)| {
        old.replicas()
            .any(|member| members.contains(&member) && new.role_of(member).is_none())
    });
    if trimmed {
        branches.push(Branch::ReplicaTrimmed);
    }
    let moved =
        pairs().any(|(old, new)| old.primary != new.primary && new.backups.contains(&old.primary));
    if moved {
        branches.push(Branch::PrimaryMoved);
    }
}
