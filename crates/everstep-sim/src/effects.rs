//! The shells: they feed events to machines and carry out effects, as the real actors do.

use everstep_protocol::coordinator::{
    Effect as CoordinatorEffect, Event as CoordinatorEvent, Note, Phase as LeaderPhase,
};
use everstep_protocol::shard::{Effect as ShardEffect, Event as ShardEvent};
use everstep_protocol::worker::{Effect as WorkerEffect, Event as WorkerEvent};
use everstep_protocol::{Epoch, EvaluationSums, Message, Role, Task};

use crate::coverage::Branch;
use crate::fault::Fault;
use crate::outcome::Recovery;
use crate::phase::Phase;
use crate::process::Machine;
use crate::store::Write;
use crate::toy::{Toy, evaluate, lie, slot_gradient};
use crate::weather::Condition;
use crate::world::{Happening, Local, World};

/// Repeats of unanswered messages, in the simulated cluster.
pub(crate) const RESEND_MS: u64 = 50;
/// A lease older than this goes to an idle worker too.
pub(crate) const LEASE_MS: u64 = 400;
/// A new leader waits this long for shards.
pub(crate) const GATHER_MS: u64 = 300;

/// How often a coordinator's shell looks whether somebody leads.
const CAMPAIGN_MS: u64 = 40;
/// A standby that has not heard of a leader for this long tries to win an epoch.
const SILENCE_MS: u64 = 5 * RESEND_MS;

#[derive(Debug)]
enum Effect {
    Coordinator(CoordinatorEffect<Toy>),
    Shard(ShardEffect<Toy>),
    Worker(WorkerEffect<Toy>),
}

impl World<'_> {
    /// Feeds an event to an actor's machine and carries out what it wants done.
    pub(crate) fn local(&mut self, actor: usize, event: Local) {
        let event = match event {
            Local::Campaign => return self.campaign(actor),
            Local::Device => match self.device_done(actor) {
                Some(event) => Local::Worker(event),
                None => return,
            },
            other => other,
        };
        let now_ms = self.now_ms;
        let before = self.before(actor, &event);
        let effects = match (&mut self.actors[actor].machine, event) {
            (Some(Machine::Coordinator(_)), Local::Start) => {
                self.campaign(actor);
                Vec::new()
            }
            (Some(Machine::Coordinator(machine)), Local::Wake) => wrap(
                machine.handle(now_ms, CoordinatorEvent::Tick),
                Effect::Coordinator,
            ),
            (Some(Machine::Coordinator(machine)), Local::Coordinator(event)) => {
                wrap(machine.handle(now_ms, event), Effect::Coordinator)
            }
            (Some(Machine::Shard(machine)), Local::Start) => {
                wrap(machine.handle(now_ms, ShardEvent::Started), Effect::Shard)
            }
            (Some(Machine::Shard(machine)), Local::Wake) => {
                wrap(machine.handle(now_ms, ShardEvent::Tick), Effect::Shard)
            }
            (Some(Machine::Shard(machine)), Local::Shard(event)) => {
                wrap(machine.handle(now_ms, event), Effect::Shard)
            }
            (Some(Machine::Worker(machine)), Local::Start) => {
                wrap(machine.handle(now_ms, WorkerEvent::Started), Effect::Worker)
            }
            (Some(Machine::Worker(machine)), Local::Wake) => {
                wrap(machine.handle(now_ms, WorkerEvent::Tick), Effect::Worker)
            }
            (Some(Machine::Worker(machine)), Local::Worker(event)) => {
                wrap(machine.handle(now_ms, event), Effect::Worker)
            }
            _ => return,
        };
        self.check_shard(actor);
        self.observe_state(actor, &before);
        self.declare(actor, &effects);
        let incarnation = self.actors[actor].member.incarnation;
        let torn_at = if self.actors[actor].torn && !effects.is_empty() {
            Some(self.random.below(effects.len() as u64 + 1) as usize)
        } else {
            None
        };
        self.pending.acting = Some(actor);
        for (index, effect) in effects.into_iter().enumerate() {
            if torn_at == Some(index) {
                break;
            }
            match effect {
                Effect::Coordinator(effect) => self.coordinator_effect(actor, effect),
                Effect::Shard(effect) => self.shard_effect(actor, effect),
                Effect::Worker(effect) => self.worker_effect(actor, effect),
            }
            if self.outcome.violation.is_some() {
                return;
            }
            // A fault that waited for what was just done may end this life before it does the rest.
            while let Some(index) = self.pending.due.pop() {
                self.strike(index, Some(actor));
            }
            if !self.lives(actor, incarnation) {
                self.pending.acting = None;
                return;
            }
        }
        self.pending.acting = None;
        if torn_at.is_some() {
            self.count_fault(Fault::KillMidway);
            let host = self.actors[actor].host;
            return self.crash(host, None);
        }
        self.arm(actor, incarnation);
    }

    /// What a leader declares between two steps counts for its view, which is the later one already when the decision is checked.
    fn declare(&mut self, actor: usize, effects: &[Effect]) {
        let Some(Machine::Coordinator(machine)) = &self.actors[actor].machine else {
            return;
        };
        let epoch = machine.epoch();
        for effect in effects {
            if let Effect::Coordinator(CoordinatorEffect::Note(Note::Degraded { blocks, .. })) =
                effect
            {
                let declared = self.checker.degraded.entry(epoch).or_default();
                declared.extend(blocks);
            }
        }
    }

    /// Schedules the next wake-up of a machine.
    fn arm(&mut self, actor: usize, incarnation: u64) {
        let deadline_ms = match &self.actors[actor].machine {
            Some(Machine::Coordinator(machine)) => machine.next_deadline_ms(),
            Some(Machine::Shard(machine)) => machine.next_deadline_ms(),
            Some(Machine::Worker(machine)) => machine.next_deadline_ms(),
            None => None,
        };
        if deadline_ms == self.actors[actor].wake_ms {
            return;
        }
        self.actors[actor].wake_ms = deadline_ms;
        if let Some(deadline_ms) = deadline_ms {
            self.schedule(
                deadline_ms,
                Happening::Local {
                    actor,
                    incarnation,
                    event: Local::Wake,
                },
            );
        }
    }

    /// The election: a coordinator that has heard of no leader for a while tries to create the next epoch in the store.
    fn campaign(&mut self, actor: usize) {
        let member = self.actors[actor].member;
        let at_ms = self.after(CAMPAIGN_MS, CAMPAIGN_MS + 20);
        self.schedule(
            at_ms,
            Happening::Local {
                actor,
                incarnation: member.incarnation,
                event: Local::Campaign,
            },
        );
        let Some(Machine::Coordinator(machine)) = &self.actors[actor].machine else {
            return;
        };
        if machine.is_leading() {
            self.actors[actor].heard_ms = self.now_ms;
            return self.announce_drains(actor);
        }
        let patience_ms = SILENCE_MS + 60 * u64::from(member.index);
        let first = self.store.latest_epoch() == 0;
        let silent = self.now_ms >= self.actors[actor].heard_ms + patience_ms;
        if self.actors[actor].campaigns || !(silent || first) {
            return;
        }
        self.stand(actor);
    }

    /// Tries to create the next epoch's lease.
    pub(crate) fn stand(&mut self, actor: usize) {
        let member = self.actors[actor].member;
        let Some(Machine::Coordinator(machine)) = &self.actors[actor].machine else {
            return;
        };
        let seen = machine.epoch().0;
        self.actors[actor].campaigns = true;
        let epoch = self.listed_epoch().max(seen) + 1;
        self.reached(Phase::Election, actor);
        self.say(|| format!("{member} tries epoch {epoch}"));
        self.begin(Write::Lease {
            actor,
            incarnation: member.incarnation,
            epoch,
        });
    }

    fn broadcast(&mut self, actor: usize, message: Message<Toy>, only: Option<Role>) {
        for target in 0..self.actors.len() {
            let to = self.actors[target].member;
            if target != actor && only.is_none_or(|role| to.role == role) {
                self.transmit(actor, to, message.clone());
            }
        }
    }

    fn coordinator_effect(&mut self, actor: usize, effect: CoordinatorEffect<Toy>) {
        let member = self.actors[actor].member;
        match effect {
            CoordinatorEffect::Send { to, message } => return self.transmit(actor, to, message),
            CoordinatorEffect::Broadcast { message } => {
                return self.broadcast(actor, message, None);
            }
            _ => {}
        }
        self.say(|| format!("{member}: {effect:?}"));
        match effect {
            CoordinatorEffect::LogStep { step, decision } => {
                self.observe_logging();
                if decision.is_spike {
                    self.met(Branch::SpikeSkipped);
                }
                self.check_decision(actor, step, decision);
                self.strike_steps();
                self.reached(Phase::Decided, actor);
            }
            CoordinatorEffect::LogEvaluation { version, sums } => {
                self.check_evaluation(version, sums.loss(), sums.tokens);
            }
            CoordinatorEffect::CommitManifest { version, objects } => {
                self.begin(Write::Manifest {
                    actor,
                    incarnation: member.incarnation,
                    version,
                    objects,
                });
                self.reached(Phase::Manifest, actor);
            }
            CoordinatorEffect::FindCheckpoint => self.begin(Write::Find {
                actor,
                incarnation: member.incarnation,
            }),
            CoordinatorEffect::Release { member } => {
                self.check_release(actor, member);
                self.release(member);
            }
            CoordinatorEffect::Note(note) => self.note(actor, note),
            CoordinatorEffect::Finished => {
                self.is_finished = true;
                self.heal();
            }
            CoordinatorEffect::GaveUp { step, .. } => {
                self.violate(format!("gave up at step {} without a limit", step.0));
            }
            CoordinatorEffect::Deposed { .. } => {
                self.count(Recovery::Deposed);
                self.observe_deposition(actor);
                self.actors[actor].heard_ms = self.now_ms;
            }
            CoordinatorEffect::Send { .. } | CoordinatorEffect::Broadcast { .. } => {}
        }
    }

    fn note(&mut self, actor: usize, note: Note) {
        let epoch = match &self.actors[actor].machine {
            Some(Machine::Coordinator(machine)) => machine.epoch(),
            _ => Epoch(0),
        };
        match note {
            Note::SlotsReassigned { slots, lost, .. } => {
                self.outcome.slots_recomputed += slots.len() as u64;
                if lost && self.watch.ticks {
                    self.met(Branch::DoubtSettled);
                }
                self.count(if lost {
                    Recovery::SlotsReleased
                } else {
                    Recovery::SlotsDoubled
                });
            }
            Note::ShardPromoted { member, blocks } => {
                self.count(Recovery::ShardPromoted);
                self.observe_promotion(actor, &blocks);
                self.shake();
                if let Some(promoted) = self.actor_of(member) {
                    self.reached(Phase::Promotion, promoted);
                }
            }
            Note::BackupSeeded { .. } => {
                self.count(Recovery::BackupSeeded);
                self.shake();
            }
            Note::Degraded { blocks, .. } => {
                self.checker.degraded.insert(epoch, blocks);
                self.count(Recovery::Degraded);
            }
            Note::Resumed { step, .. } => {
                self.observe_resuming();
                if step.0 > 0 {
                    self.count(Recovery::Resumed);
                    self.shake();
                }
            }
            Note::Rollback { lineage, to, .. } => {
                self.checker.rolled_back(epoch, lineage, to);
                if to.0 == 0 {
                    self.met(Branch::RolledBackToStart);
                }
                self.count(Recovery::Rollback);
                self.shake();
            }
            Note::Expelled { .. } | Note::Refused { .. } => {}
            Note::AuditMismatch { .. } => self.count(Recovery::AuditMismatch),
            Note::WorkerQuarantined {
                worker, permanent, ..
            } => {
                if !self.liars.contains(&worker.index) {
                    self.violate(format!("honest {worker} was accused"));
                }
                if permanent {
                    // As the shell does: on disk before anybody hears of it.
                    self.recorded_liars.push(worker);
                }
                self.count(if permanent {
                    Recovery::WorkerQuarantined
                } else {
                    Recovery::StepRecomputed
                });
                self.shake();
            }
            Note::CheckpointAbandoned { .. } | Note::CheckpointSuperseded { .. } => {
                self.count(Recovery::CheckpointAbandoned);
            }
            Note::CheckpointCommitted { .. } => self.count(Recovery::CheckpointCommitted),
            Note::MemberLost { member } => {
                self.watch.declared.insert(member);
                self.outcome.detected(self.now_ms, member);
            }
            Note::MemberJoined { member } => {
                let restores = matches!(&self.actors[actor].machine,
                    Some(Machine::Coordinator(machine)) if machine.phase() == LeaderPhase::Restoring)
                    && self.checker.has_rolled_back(epoch);
                if member.role == Role::Shard && restores {
                    self.met(Branch::JoinedWhileRestoring);
                }
            }
            Note::DrainHolds { .. } => self.count(Recovery::DrainHeld),
            Note::MemberLeft { .. } | Note::DrainStarted { .. } | Note::DrainFinished { .. } => {}
        }
    }

    /// The actor ends: for a new life, or because the run is over.
    fn end(&mut self, actor: usize, over: bool) {
        self.stop(actor);
        if over {
            self.actors[actor].over = true;
        } else {
            self.count(Recovery::Expelled);
            let at_ms = self.after(5, 60);
            self.schedule(at_ms, Happening::StartActor(actor));
        }
    }

    fn shard_effect(&mut self, actor: usize, effect: ShardEffect<Toy>) {
        let member = self.actors[actor].member;
        let incarnation = member.incarnation;
        match effect {
            ShardEffect::Send { to, message } => self.transmit(actor, to, message),
            ShardEffect::SendCoordinators { message } => {
                self.broadcast(actor, message, Some(Role::Coordinator));
            }
            ShardEffect::Load {
                lineage,
                version,
                blocks,
            } => {
                self.say(|| format!("{member} loads {blocks:?} at version {}", version.0));
                self.check_load(lineage, version);
                if version.0 > 0 {
                    self.count(Recovery::CheckpointLoaded);
                }
                self.reached(Phase::Restoring, actor);
                for block in blocks {
                    self.begin(Write::Load {
                        actor,
                        incarnation,
                        lineage,
                        version,
                        block,
                    });
                }
            }
            ShardEffect::Store { version, blocks } => {
                self.say(|| format!("{member} stores {blocks:?} at version {}", version.0));
                self.begin(Write::Object {
                    actor,
                    incarnation,
                    version,
                    blocks,
                });
                self.reached(Phase::Snapshot, actor);
            }
            ShardEffect::Refused { .. } => {}
            ShardEffect::Restart => {
                self.observe_restart();
                self.end(actor, false);
            }
            ShardEffect::Finished => self.end(actor, true),
        }
    }

    fn worker_effect(&mut self, actor: usize, effect: WorkerEffect<Toy>) {
        let member = self.actors[actor].member;
        match effect {
            WorkerEffect::Send { to, message } => self.transmit(actor, to, message),
            WorkerEffect::SendCoordinators { message } => {
                self.broadcast(actor, message, Some(Role::Coordinator));
            }
            WorkerEffect::Prefetch { .. } => {}
            WorkerEffect::LoadParameters {
                version,
                block,
                parameters,
            } => {
                if self.actors[actor].running.is_some() {
                    return self.violate(format!("{member} loads parameters while it computes"));
                }
                self.actors[actor].device[block as usize] = Some((version, parameters));
            }
            WorkerEffect::Compute { step, task } => {
                self.say(|| format!("{member} computes {task:?} of step {}", step.0));
                let mixed = self.actors[actor]
                    .device
                    .iter()
                    .any(|block| block.is_none_or(|(version, _)| version != step));
                if mixed || self.actors[actor].running.is_some() {
                    return self.violate(format!("{member} computes on a mixed or busy device"));
                }
                self.actors[actor].running = Some((step, task));
                let host = self.actors[actor].host;
                let factor = self
                    .weather
                    .strength(Condition::SlowWorker, host, self.now_ms)
                    .max(1);
                if factor > 1 {
                    self.count_fault(Fault::SlowWorker);
                }
                let at_ms = self.after(1, self.plan.timing.compute_max_ms * factor);
                self.schedule(
                    at_ms,
                    Happening::Local {
                        actor,
                        incarnation: member.incarnation,
                        event: Local::Device,
                    },
                );
            }
            WorkerEffect::Refused { .. } => {}
            WorkerEffect::Restart => self.end(actor, false),
            WorkerEffect::Finished => self.end(actor, true),
        }
    }

    /// The device's answer, from the parameters that are on it.
    fn device_done(&mut self, actor: usize) -> Option<WorkerEvent<Toy>> {
        let (step, task) = self.actors[actor].running.take()?;
        let parameters: Vec<u64> = self.actors[actor]
            .device
            .iter()
            .flatten()
            .map(|(_, parameters)| *parameters)
            .collect();
        Some(match task {
            Task::Slot(slot) | Task::Audit { slot, .. } => {
                let mut gradients = slot_gradient(&parameters, step, slot);
                let host = self.actors[actor].host;
                let permille = self
                    .weather
                    .strength(Condition::LyingWorker, host, self.now_ms);
                // Only where it is found, so that every seed has a known result.
                if permille > 0
                    && self.audit().covers(step, slot)
                    && self.random.below(1000) < permille
                {
                    self.count_fault(Fault::LyingWorker);
                    self.liars.insert(self.actors[actor].member.index);
                    lie(&mut gradients, self.random.next_u64());
                }
                WorkerEvent::Computed {
                    step,
                    slot,
                    gradients,
                }
            }
            Task::Evaluate(chunk) => {
                let (loss_sum, tokens) = evaluate(&parameters, step, chunk);
                let sums = EvaluationSums {
                    loss_sum,
                    tokens,
                    ..EvaluationSums::default()
                };
                WorkerEvent::Evaluated { step, chunk, sums }
            }
        })
    }
}

fn wrap<E>(effects: Vec<E>, into: impl Fn(E) -> Effect) -> Vec<Effect> {
    effects.into_iter().map(into).collect()
}
