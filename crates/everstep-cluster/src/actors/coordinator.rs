//! The coordinator actor: the protocol's coordinator, its election, and the logs of the run.

mod cadence;
mod drain;
mod notes;
mod policy;
mod quarantine;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use everstep_optim::TrainingNumerics;
use everstep_protocol::coordinator::{Effect, Event, Phase};
use everstep_protocol::{Coordinator, Decision, Epoch, Member, Message, Role, Step};
use everstep_store::Quarantine;
use everstep_telemetry::names::{metric, span};
use everstep_telemetry::{MetricsLog, StepMetrics, TensorBoard};
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tracing::Span;

use self::cadence::Cadence;
use self::drain::Leaving;
use super::ActorArguments;
use super::checkpointer::{CheckpointerMessage, Committed};
use super::recovery::Recoveries;
use super::refusals::Refusals;
use crate::election;
use crate::message::{ClusterMessage, Delivery, PeerEvent};
use crate::process::{ProcessContext, process_life};
use crate::router::member_of;
use crate::status::LeaderStatus;
use crate::topology::{ActorAddress, ActorRole};

/// Checkpoints that are looked for one by one, beside those that the store lists.
const HINTS_MAX: usize = 8;
/// A leader writes its status five times a second; one that has not for so long does not lead.
const STATUS_AGE_MAX: Duration = Duration::from_secs(2);

/// Leads the run, or stands by.
pub(crate) struct CoordinatorActor;

/// What the coordinator actor is told.
#[derive(Debug)]
pub(crate) enum CoordinatorMessage {
    /// From another actor.
    Delivery(Box<Delivery>),
    /// From the transport or the node agent.
    Peer(PeerEvent),
    /// The election was won.
    Elected {
        /// The epoch.
        epoch: u64,
        /// Version of the newest intact checkpoint.
        checkpoint: u64,
        /// Quarantined workers, if the store told them in time.
        quarantined: Option<Vec<Quarantine>>,
    },
    /// What the store says of quarantined workers, later than at the election.
    Quarantined(Vec<Quarantine>),
    /// A manifest is committed.
    ManifestCommitted(Step),
    /// A manifest cannot be committed: objects that it names are gone.
    ManifestRefused(Step),
    /// The newest intact checkpoint.
    CheckpointFound(Step),
    /// Time passed.
    Tick,
}

/// A leader that this coordinator heard.
struct Leader {
    address: ActorAddress,
    /// Which life of its process.
    life: u64,
    /// When its process went, if it did.
    gone_ms: Option<u64>,
}

pub(crate) struct CoordinatorState {
    context: Arc<ProcessContext>,
    address: ActorAddress,
    me: Member,
    machine: Coordinator<TrainingNumerics>,
    epoch: Option<Epoch>,
    /// When a leader was last heard, for the standby's patience.
    leader_heard_ms: u64,
    /// Who led last, as far as this coordinator heard.
    leader: Option<Leader>,
    electing: bool,
    /// How long nothing had been heard of the process that is being declared lost.
    silent: Option<Duration>,
    recoveries: Recoveries,
    refusals: Refusals,
    /// A checkpoint is looked for.
    search: Option<tokio::task::AbortHandle>,
    members: BTreeSet<Member>,
    /// Processes that shall leave.
    leaving: BTreeMap<u32, Leaving>,
    /// When checkpoints are due, if not by steps.
    cadence: Cadence,
    /// The newest step that should have a checkpoint.
    checkpoint_due: u64,
    /// The last evaluation: version and loss.
    evaluated: Option<(Step, f64)>,
    /// Workers whose quarantine is recorded, or being recorded.
    quarantines: BTreeMap<u32, Quarantine>,
    metrics: MetricsLog,
    tensorboard: TensorBoard,
    step_started: Instant,
    step_span: Span,
    status_written_ms: u64,
    /// The run is over: that processes go now is not worth an event.
    finished: bool,
}

impl Actor for CoordinatorActor {
    type Msg = CoordinatorMessage;
    type State = CoordinatorState;
    type Arguments = ActorArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<CoordinatorMessage>,
        arguments: ActorArguments,
    ) -> Result<CoordinatorState, ActorProcessingErr> {
        let ActorArguments { context, address } = arguments;
        let me = Member {
            role: Role::Coordinator,
            index: address.index,
            incarnation: context.next_life(),
        };
        let machine = Coordinator::new(
            context.run.coordinator_config(),
            me,
            context.run.numerics.clone(),
        );
        let metrics = MetricsLog::open(context.run_dir.metrics())?;
        let tensorboard = TensorBoard::create(context.run_dir.tensorboard(), context.node())?;
        let inbox = myself.clone();
        context.router.register(
            address,
            me.incarnation,
            Arc::new(move |delivery| {
                let _ = inbox.cast(CoordinatorMessage::Delivery(Box::new(delivery)));
            }),
        );
        let peers = myself.clone();
        context.router.listen(Arc::new(move |event| {
            let _ = peers.cast(CoordinatorMessage::Peer(event));
        }));
        myself.send_interval(context.run.timing.tick(), || CoordinatorMessage::Tick);
        let leader_heard_ms = context.now_ms();
        let cadence = Cadence::new(context.run.config.checkpoint.every, leader_heard_ms);
        let mut state = CoordinatorState {
            context,
            address,
            me,
            machine,
            epoch: None,
            leader_heard_ms,
            leader: None,
            electing: false,
            silent: None,
            recoveries: Recoveries::default(),
            refusals: Refusals::default(),
            search: None,
            members: BTreeSet::new(),
            leaving: BTreeMap::new(),
            cadence,
            checkpoint_due: 0,
            evaluated: None,
            quarantines: BTreeMap::new(),
            metrics,
            tensorboard,
            step_started: Instant::now(),
            step_span: Span::none(),
            status_written_ms: 0,
            finished: false,
        };
        // The first coordinator of a new run does not wait for another one to lead. After a restart a standby may have taken over, and
        // racing it for the next epoch would stop training a second time.
        let alone = state.context.run.topology.count(ActorRole::Coordinator) == 1
            || state.context.run.is_static_election();
        if address.index == 0 && (state.context.is_first_election() || alone) {
            state.elect(&myself);
        }
        tracing::info!(member = %me, "coordinator started");
        Ok(state)
    }

    async fn handle(
        &self,
        myself: ActorRef<CoordinatorMessage>,
        message: CoordinatorMessage,
        state: &mut CoordinatorState,
    ) -> Result<(), ActorProcessingErr> {
        state.context.panic_if_asked(ActorRole::Coordinator);
        match message {
            CoordinatorMessage::Tick => state.tick(&myself),
            CoordinatorMessage::Peer(event) => state.peer(&myself, event),
            CoordinatorMessage::ManifestCommitted(version) => {
                state.step(&myself, Event::ManifestCommitted { version })
            }
            CoordinatorMessage::ManifestRefused(version) => {
                state.step(&myself, Event::ManifestRefused { version })
            }
            CoordinatorMessage::CheckpointFound(version) => {
                state.step(&myself, Event::CheckpointFound { version })
            }
            CoordinatorMessage::Quarantined(found) => {
                let workers = state.adopt_quarantines(found);
                state.step(&myself, Event::Quarantined { workers })
            }
            CoordinatorMessage::Elected {
                epoch,
                checkpoint,
                quarantined,
            } => {
                state.electing = false;
                state.epoch = Some(Epoch(epoch));
                // A standby has not followed what its predecessors committed.
                state.metrics.refresh()?;
                state.step_started = Instant::now();
                let high_water = Step(state.metrics.last_step().unwrap_or(0));
                state.cadence.elected(state.context.now_ms(), high_water.0);
                let (process, node) = (
                    state.context.name().to_owned(),
                    state.context.node().to_owned(),
                );
                state
                    .context
                    .event(&everstep_telemetry::Event::LeaderElected {
                        process,
                        node,
                        epoch,
                        step: high_water.0,
                    });
                let quarantined = match quarantined {
                    Some(found) => state.adopt_quarantines(found),
                    None => {
                        state.find_quarantines(&myself);
                        Vec::new()
                    }
                };
                state.step(
                    &myself,
                    Event::Elected {
                        epoch: Epoch(epoch),
                        checkpoint: Step(checkpoint),
                        high_water,
                        quarantined,
                    },
                )
            }
            CoordinatorMessage::Delivery(delivery) => {
                let Delivery {
                    from,
                    from_incarnation,
                    message,
                    trace,
                } = *delivery;
                let message = match message {
                    ClusterMessage::Protocol(message) => message,
                    ClusterMessage::Drain {
                        processes,
                        seconds_left,
                    } => return state.drain(&myself, processes, seconds_left),
                    ClusterMessage::Released => {
                        state.context.released(state.address);
                        return Ok(());
                    }
                    ClusterMessage::Failed { reason } => {
                        state.context.fail(reason);
                        return Ok(());
                    }
                    ClusterMessage::BatchRequest { .. } | ClusterMessage::Batch { .. } => {
                        return Ok(());
                    }
                };
                let Some(from) = member_of(from, from_incarnation) else {
                    return Ok(());
                };
                if matches!(message, Message::Announce { .. }) {
                    state.heard_leader(from);
                }
                state.members.insert(from);
                let span = match &message {
                    Message::Reduced { step, block, .. } => {
                        tracing::info_span!(span::DECIDE, step = step.0, block)
                    }
                    _ => Span::none(),
                };
                trace.adopt(&span);
                let _entered = span.enter();
                state.step(&myself, Event::Message { from, message })
            }
        }
    }
}

impl CoordinatorState {
    fn heard_leader(&mut self, from: Member) {
        self.leader_heard_ms = self.context.now_ms();
        self.leader = Some(Leader {
            address: ActorAddress {
                role: ActorRole::Coordinator,
                index: from.index,
            },
            life: process_life(from.incarnation),
            gone_ms: None,
        });
    }

    /// Whether it is this standby's turn: the leader's process is gone, or nothing was heard of it for long. Standbys take turns,
    /// so that two of them seldom race for one epoch; those that reach nobody would lead nobody.
    fn is_my_turn(&self, now_ms: u64) -> bool {
        let is_leaving = self.finished || self.context.is_ending();
        if self.epoch.is_some() || self.electing || is_leaving {
            return false;
        }
        if self.context.run.is_static_election() && self.address.index > 0 {
            return false;
        }
        let router = &self.context.router;
        let leads = |process: u32| {
            let leader = self.leader.as_ref();
            leader.and_then(|leader| router.process_of(leader.address)) == Some(process)
        };
        let is_other = |process: &u32| *process != self.context.process && !leads(*process);
        let mut others = (0..self.context.run.topology.processes.len() as u32).filter(is_other);
        if others.clone().next().is_some() && !others.any(|process| router.is_up(process)) {
            return false;
        }
        let before_me = router
            .actors(ActorRole::Coordinator)
            .filter(|coordinator| coordinator.index < self.address.index)
            .filter_map(|coordinator| router.process_of(coordinator))
            .filter(|process| router.is_up(*process) && !leads(*process))
            .count() as u64;
        let timing = &self.context.run.timing;
        match self.leader.as_ref().and_then(|leader| leader.gone_ms) {
            Some(gone_ms) => now_ms.saturating_sub(gone_ms) >= before_me * timing.resend_ms,
            None => {
                let silent_ms = now_ms.saturating_sub(self.leader_heard_ms);
                let is_rival_up = router
                    .actors(ActorRole::Coordinator)
                    .filter_map(|coordinator| router.process_of(coordinator))
                    .any(|process| router.is_up(process));
                if self.leader.is_none() && !is_rival_up {
                    // Started again while no other coordinator is there: two announcements' time is enough to hear a leader.
                    return silent_ms > 2 * timing.resend_ms;
                }
                silent_ms > timing.leader_timeout_ms * (1 + before_me)
            }
        }
    }

    /// Tells the story of the leader that this one follows, if there was one and it went a moment ago.
    fn succeed_leader(&mut self, now_ms: u64) {
        let Some(leader) = &self.leader else {
            return;
        };
        let whereabouts = self.context.whereabouts(leader.address);
        let noticed_ms = leader.gone_ms.unwrap_or(now_ms);
        let silent = Duration::from_millis(noticed_ms.saturating_sub(self.leader_heard_ms));
        self.recoveries.lost(
            Instant::now() - Duration::from_millis(now_ms.saturating_sub(noticed_ms)),
            "leader",
            whereabouts,
            Some(silent),
        );
    }

    fn elect(&mut self, myself: &ActorRef<CoordinatorMessage>) {
        self.electing = true;
        self.succeed_leader(self.context.now_ms());
        let (context, owner, reply) = (self.context.clone(), self.me.to_string(), myself.clone());
        let at_least = self.machine.epoch().0;
        let hints = self.checkpoint_hints();
        tokio::spawn(async move {
            let won = election::win(&context, &owner, at_least, &hints).await;
            let _ = reply.cast(CoordinatorMessage::Elected {
                epoch: won.epoch,
                checkpoint: won.checkpoint,
                quarantined: won.quarantined,
            });
        });
    }

    fn find_checkpoint(&mut self, myself: &ActorRef<CoordinatorMessage>) {
        let (context, reply, hints) = (
            self.context.clone(),
            myself.clone(),
            self.checkpoint_hints(),
        );
        let search = tokio::spawn(async move {
            let version = election::find_checkpoint(&context, &hints).await;
            let _ = reply.cast(CoordinatorMessage::CheckpointFound(Step(version)));
        });
        // What an earlier search finds may be older than what was committed since.
        if let Some(earlier) = self.search.replace(search.abort_handle()) {
            earlier.abort();
        }
    }

    /// Steps that may have a checkpoint, newest first, should the store's list be old.
    fn checkpoint_hints(&self) -> Vec<u64> {
        let config = self.context.run.coordinator_config();
        let logged = self.metrics.last_step().unwrap_or(0);
        let every = config.checkpoint_every;
        let due = logged.checked_div(every).unwrap_or(0);
        let mut hints: Vec<u64> = (1..=due)
            .rev()
            .take(HINTS_MAX)
            .map(|number| number * every)
            .collect();
        // Those that were due by time are known to who committed them.
        if let Ok(Some(commit)) = self.context.ledger.last_commit() {
            hints.push(commit.step);
        }
        hints.sort_unstable_by_key(|step| std::cmp::Reverse(*step));
        hints.dedup();
        if logged >= config.num_steps {
            hints.insert(0, config.num_steps);
        }
        hints
    }

    fn tick(&mut self, myself: &ActorRef<CoordinatorMessage>) -> Result<(), ActorProcessingErr> {
        let now_ms = self.context.now_ms();
        if self.is_my_turn(now_ms) {
            self.elect(myself);
        }
        self.step(myself, Event::Tick)?;
        if self.machine.phase() == Phase::Training
            && (self.cadence.is_due(now_ms, self.machine.is_checkpointing())
                || self.context.store_health.take_newest_damaged())
        {
            self.checkpoint_due = self.machine.step().0 + 1;
            self.step(myself, Event::CheckpointDue)?;
        }
        self.tend_leaving();
        let health = &self.context.store_health;
        health.speak(self.electing || self.machine.is_leading());
        if self.machine.is_leading() {
            let (step, committed) = (self.machine.step().0, self.machine.committed().0);
            let every = self.context.run.config.checkpoint.every.steps();
            if let Some(due) = every.and_then(|every| step.checked_div(every)) {
                self.checkpoint_due = due * every.unwrap_or(0);
            }
            let cadence = self.cadence.status(now_ms);
            health.progress(step, committed, self.checkpoint_due, cadence);
        }
        if self.epoch.is_some() && now_ms.saturating_sub(self.status_written_ms) >= 200 {
            self.status_written_ms = now_ms;
            self.record_quarantines();
            self.write_status();
        }
        Ok(())
    }

    /// A process that is gone takes all its members along.
    fn peer(
        &mut self,
        myself: &ActorRef<CoordinatorMessage>,
        event: PeerEvent,
    ) -> Result<(), ActorProcessingErr> {
        let PeerEvent::Down {
            process,
            incarnation,
            silent,
        } = event
        else {
            return Ok(());
        };
        if self.finished || self.context.is_ending() {
            return Ok(());
        }
        let router = self.context.router.clone();
        let now_ms = self.context.now_ms();
        if let Some(leader) = &mut self.leader
            && router.process_of(leader.address) == Some(process)
            && leader.life == incarnation
        {
            leader.gone_ms.get_or_insert(now_ms);
            if self.is_my_turn(now_ms) {
                self.elect(myself);
            }
        }
        self.cadence.failed();
        self.gone(process, incarnation);
        let lost = self.members_of(process, incarnation);
        if lost.is_empty() {
            self.lost_before_it_joined(process);
        }
        self.silent = Some(silent);
        for member in lost {
            self.members.remove(&member);
            self.step(myself, Event::Lost { member })?;
        }
        self.silent = None;
        Ok(())
    }

    fn step(
        &mut self,
        myself: &ActorRef<CoordinatorMessage>,
        event: Event<TrainingNumerics>,
    ) -> Result<(), ActorProcessingErr> {
        let effects = self.machine.handle(self.context.now_ms(), event);
        for effect in effects {
            self.perform(myself, effect)?;
        }
        Ok(())
    }

    fn perform(
        &mut self,
        myself: &ActorRef<CoordinatorMessage>,
        effect: Effect<TrainingNumerics>,
    ) -> Result<(), ActorProcessingErr> {
        let from = (self.address, self.me.incarnation);
        match effect {
            Effect::Send { to, message } => {
                // Leases start a step's trace; everything that follows from them continues it.
                let entered = matches!(message, Message::Lease { .. })
                    .then(|| self.step_span.clone().entered());
                self.context
                    .router
                    .send_member(from, to, ClusterMessage::Protocol(message));
                drop(entered);
            }
            Effect::Broadcast { message } => {
                let router = &self.context.router;
                // Loaders take no part in the protocol; all they need to hear is the end.
                let loaders =
                    matches!(message, Message::Finish { .. }).then_some(ActorRole::Loader);
                let roles = [ActorRole::Coordinator, ActorRole::Worker, ActorRole::Shard];
                for role in roles.into_iter().chain(loaders) {
                    for to in router.actors(role).filter(|to| *to != self.address) {
                        router.send(from, to, ClusterMessage::Protocol(message.clone()));
                    }
                }
            }
            Effect::LogStep { step, decision } => self.log_step(step, &decision)?,
            Effect::LogEvaluation { version, sums } => {
                let loss = sums.loss();
                let seconds = self.step_started.elapsed().as_secs_f64();
                self.context.event(&everstep_telemetry::Event::Evaluation {
                    step: version.0,
                    loss,
                    tokens: sums.tokens,
                    seconds,
                    expert_loads: self.context.run.expert_loads(&sums.expert_choices),
                });
                self.tensorboard.scalars(
                    version.0,
                    SystemTime::now(),
                    &[(metric::VALIDATION_LOSS.name, loss)],
                )?;
                self.evaluated = Some((version, loss));
                tracing::info!(step = version.0, loss, "validation loss");
            }
            Effect::CommitManifest { version, objects } => {
                let reply = myself.clone();
                let ended = Box::new(move |committed: Committed| {
                    let _ = reply.cast(match committed {
                        Committed::Yes(version) => CoordinatorMessage::ManifestCommitted(version),
                        Committed::Refused(version) => CoordinatorMessage::ManifestRefused(version),
                    });
                });
                let evaluated = self.evaluated.filter(|(of, _)| *of == version);
                self.context.checkpointer(CheckpointerMessage::Commit {
                    epoch: self.epoch.unwrap_or_default().0,
                    version,
                    objects,
                    evaluation_loss: evaluated.map(|(_, loss)| loss),
                    ended,
                });
            }
            Effect::FindCheckpoint => self.find_checkpoint(myself),
            Effect::Release { member } => self.release(member),
            Effect::Note(note) => self.note(note),
            Effect::Finished => {
                self.finished = true;
                self.write_status();
                tracing::info!("the last step is committed");
                self.context.finish();
            }
            Effect::GaveUp { step, num_skipped } => {
                self.finished = true;
                self.give_up(policy::too_many_skips(step, num_skipped));
            }
            Effect::Deposed { by } => {
                tracing::warn!(epoch = by.0, "another coordinator leads");
                self.context
                    .event(&everstep_telemetry::Event::LeaderDeposed {
                        process: self.context.name().to_owned(),
                        node: self.context.node().to_owned(),
                        epoch: self.epoch.unwrap_or_default().0,
                        by: by.0,
                    });
                return Err(format!("{} is deposed by epoch {}", self.me, by.0).into());
            }
        }
        Ok(())
    }

    fn log_step(&mut self, step: Step, decision: &Decision) -> Result<(), ActorProcessingErr> {
        let step_seconds = self.step_started.elapsed().as_secs_f64();
        self.step_started = Instant::now();
        self.cadence.stepped(step_seconds);
        self.step_span = tracing::info_span!(parent: None, span::STEP, step = step.0 + 1);
        let metrics = StepMetrics {
            // In logs a step is known by how many are committed with it, as checkpoints are.
            step: step.0 + 1,
            loss: decision.loss,
            grad_norm: decision.gradient_norm,
            lr: self.context.run.learning_rate(step),
            tokens: decision.tokens,
            tokens_per_second: decision.tokens as f64 / step_seconds.max(1e-9),
            step_seconds,
            time: String::new(),
            validation_loss: None,
            expert_load: self.context.run.expert_load(step, decision),
        };
        if self.metrics.append(&metrics)? {
            self.tensorboard.step(&metrics)?;
            let epoch = self.epoch.unwrap_or_default().0;
            for event in self
                .recoveries
                .committed(Instant::now(), metrics.step, epoch)
            {
                self.context.event(&event);
            }
        }
        if !decision.apply {
            self.log_skip(step, decision);
        }
        Ok(())
    }

    /// Process and node of a member.
    fn whereabouts(&self, member: Member) -> (String, String) {
        let address = ActorAddress {
            role: member.role.into(),
            index: member.index,
        };
        self.context.whereabouts(address)
    }

    /// It was away, and has not heard yet that another one leads. One that won a later epoch and died before anybody followed it does not count.
    fn is_outdated(&self) -> bool {
        let epoch = self.epoch.unwrap_or_default().0;
        let known = LeaderStatus::read(&self.context.run_dir);
        known.is_some_and(|known| {
            known.epoch > epoch && known.age(&self.context.run_dir) < STATUS_AGE_MAX
        })
    }

    fn write_status(&self) {
        let epoch = self.epoch.unwrap_or_default().0;
        if self.is_outdated() {
            return;
        }
        let status = LeaderStatus {
            leader: self.context.name().to_owned(),
            epoch,
            step: self.machine.step().0,
            quarantined: self.quarantines.values().cloned().collect(),
        };
        if let Err(error) = status.write(&self.context.run_dir) {
            tracing::warn!(%error, "the status file cannot be written");
        }
    }
}
