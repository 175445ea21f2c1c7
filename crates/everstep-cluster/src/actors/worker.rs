//! The worker actor: the protocol's worker with a real device.
//!
//! The device has a thread of its own (`device`); this actor fetches batches from the loader and passes jobs on in order.

use std::collections::BTreeMap;
use std::sync::Arc;

use everstep_data::TokenBatch;
use everstep_optim::{Gradient, TrainingNumerics};
use everstep_protocol::worker::{Effect, Event, WorkerConfig};
use everstep_protocol::{EvaluationSums, Member, Message, Role, Step, Task, Worker};
use everstep_telemetry::TraceContext;
use everstep_telemetry::names::span;
use ractor::{Actor, ActorProcessingErr, ActorRef};

use super::ActorArguments;
use super::device::{Device, Job};
use super::refusals::Refusals;
use super::sizes;
use crate::message::{ClusterMessage, Delivery};
use crate::process::ProcessContext;
use crate::router::member_of;
use crate::topology::{ActorAddress, ActorRole};

/// Computes slots on one device.
pub(crate) struct WorkerActor;

/// What the worker actor is told.
#[derive(Debug)]
pub(crate) enum WorkerMessage {
    /// From another actor.
    Delivery(Box<Delivery>),
    /// From the device.
    Computed {
        /// The step.
        step: Step,
        /// The slot.
        slot: u32,
        /// Its gradient by block.
        gradients: Vec<Gradient>,
    },
    /// From the device.
    Evaluated {
        /// Version of the parameters.
        step: Step,
        /// The chunk.
        chunk: u32,
        /// What it gave.
        sums: EvaluationSums,
    },
    /// The device failed; the actor starts again with a new one.
    DeviceFailed(String),
    /// Time passed.
    Tick,
}

/// A batch that was asked for, or is here.
struct Fetch {
    asked_ms: u64,
    batch: Option<Arc<TokenBatch>>,
}

pub(crate) struct WorkerState {
    context: Arc<ProcessContext>,
    address: ActorAddress,
    me: Member,
    machine: Worker<TrainingNumerics>,
    device: Device,
    fetches: BTreeMap<(Step, Task), Fetch>,
    /// The task that the machine wants computed and whose batch is not here yet.
    waiting: Option<(Step, Task)>,
    lease_trace: TraceContext,
    refusals: Refusals,
}

impl Actor for WorkerActor {
    type Msg = WorkerMessage;
    type State = WorkerState;
    type Arguments = ActorArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<WorkerMessage>,
        arguments: ActorArguments,
    ) -> Result<WorkerState, ActorProcessingErr> {
        let ActorArguments { context, address } = arguments;
        let me = Member {
            role: Role::Worker,
            index: address.index,
            incarnation: context.next_life(),
        };
        let config = WorkerConfig {
            me,
            num_slots: context.run.num_slots(),
            num_blocks: context.run.num_blocks(),
            resend_ms: context.run.timing.resend_ms,
            audit: context.run.audit_plan(),
        };
        let device = Device::start(context.clone(), myself.clone())?;
        let inbox = myself.clone();
        context.router.register(
            address,
            me.incarnation,
            Arc::new(move |delivery| {
                let _ = inbox.cast(WorkerMessage::Delivery(Box::new(delivery)));
            }),
        );
        myself.send_interval(context.run.timing.tick(), || WorkerMessage::Tick);
        let machine = Worker::new(config, context.run.numerics.clone());
        let mut state = WorkerState {
            context,
            address,
            me,
            machine,
            device,
            fetches: BTreeMap::new(),
            waiting: None,
            lease_trace: TraceContext::default(),
            refusals: Refusals::default(),
        };
        state.step(Event::Started)?;
        tracing::info!(member = %me, "worker started");
        Ok(state)
    }

    async fn handle(
        &self,
        _myself: ActorRef<WorkerMessage>,
        message: WorkerMessage,
        state: &mut WorkerState,
    ) -> Result<(), ActorProcessingErr> {
        state.context.panic_if_asked(ActorRole::Worker);
        match message {
            WorkerMessage::Tick => {
                state.fetch_again();
                state.step(Event::Tick)
            }
            WorkerMessage::Computed {
                step,
                slot,
                gradients,
            } => {
                let span = tracing::info_span!(span::PUSH, step = step.0, slot);
                state.lease_trace.adopt(&span);
                let _entered = span.enter();
                state.step(Event::Computed {
                    step,
                    slot,
                    gradients,
                })
            }
            WorkerMessage::Evaluated { step, chunk, sums } => {
                state.step(Event::Evaluated { step, chunk, sums })
            }
            WorkerMessage::DeviceFailed(reason) => {
                Err(format!("device of {} failed: {reason}", state.me).into())
            }
            WorkerMessage::Delivery(delivery) => state.deliver(*delivery),
        }
    }
}

impl WorkerState {
    fn deliver(&mut self, delivery: Delivery) -> Result<(), ActorProcessingErr> {
        let Delivery {
            from,
            from_incarnation,
            message,
            trace,
        } = delivery;
        match message {
            ClusterMessage::Batch { step, task, batch } => {
                if let Some(fetch) = self.fetches.get_mut(&(step, task)) {
                    fetch.batch = Some(batch);
                }
                self.compute_if_ready()
            }
            ClusterMessage::Released => {
                self.context.released(self.address);
                Ok(())
            }
            ClusterMessage::BatchRequest { .. } | ClusterMessage::Drain { .. } => Ok(()),
            ClusterMessage::Failed { reason } => {
                self.context.fail(reason);
                Ok(())
            }
            ClusterMessage::Protocol(message) => {
                let Some(from) = member_of(from, from_incarnation) else {
                    return Ok(());
                };
                if !sizes::fit(&self.context, from, &message) {
                    return Ok(());
                }
                if let Message::Lease { step, .. } = &message {
                    let span =
                        tracing::info_span!(span::LEASE, step = step.0, worker = self.me.index);
                    trace.adopt(&span);
                    let _entered = span.enter();
                    self.lease_trace = TraceContext::current();
                    return self.step(Event::Message { from, message });
                }
                self.step(Event::Message { from, message })
            }
        }
    }

    fn step(&mut self, event: Event<TrainingNumerics>) -> Result<(), ActorProcessingErr> {
        let from = (self.address, self.me.incarnation);
        for effect in self.machine.handle(self.context.now_ms(), event) {
            match effect {
                Effect::Send { to, message } => {
                    self.context
                        .router
                        .send_member(from, to, ClusterMessage::Protocol(message))
                }
                Effect::SendCoordinators { message } => {
                    self.context.router.send_coordinators(from, &message);
                }
                Effect::Prefetch { step, tasks } => {
                    // Batches of earlier steps are not asked for again, but the machine waits for the task that it has asked for.
                    let waiting = self.waiting;
                    self.fetches
                        .retain(|key, _| key.0 >= step || waiting == Some(*key));
                    for task in tasks {
                        self.fetch(step, task);
                    }
                }
                Effect::LoadParameters {
                    block, parameters, ..
                } => {
                    self.device.send(Job::Load { block, parameters })?;
                }
                Effect::Compute { step, task } => {
                    self.waiting = Some((step, task));
                    self.fetch(step, task);
                    self.compute_if_ready()?;
                }
                Effect::Restart => {
                    return Err(
                        format!("{} was declared lost: starting again, empty", self.me).into(),
                    );
                }
                Effect::Refused { from, epoch } => {
                    let own = self.machine.epoch();
                    self.refusals.leader(&self.context, from, epoch, own);
                }
                Effect::Finished => self.context.finish(),
            }
        }
        Ok(())
    }

    fn fetch(&mut self, step: Step, task: Task) {
        let now_ms = self.context.now_ms();
        if self.fetches.contains_key(&(step, task)) {
            return;
        }
        self.fetches.insert(
            (step, task),
            Fetch {
                asked_ms: now_ms,
                batch: None,
            },
        );
        self.ask(step, task);
    }

    fn fetch_again(&mut self) {
        let now_ms = self.context.now_ms();
        let resend_ms = self.context.run.timing.resend_ms;
        let mut late = Vec::new();
        for (key, fetch) in &mut self.fetches {
            if fetch.batch.is_none() && now_ms.saturating_sub(fetch.asked_ms) >= resend_ms {
                fetch.asked_ms = now_ms;
                late.push(*key);
            }
        }
        for (step, task) in late {
            self.ask(step, task);
        }
    }

    /// Asks a loader that is there; workers spread over loaders by their number.
    fn ask(&self, step: Step, task: Task) {
        let router = &self.context.router;
        let loaders: Vec<ActorAddress> = router.actors(ActorRole::Loader).collect();
        let up = |loader: &&ActorAddress| {
            router
                .process_of(**loader)
                .is_some_and(|process| process == self.context.process || router.is_up(process))
        };
        let here: Vec<&ActorAddress> = loaders.iter().filter(up).collect();
        if let Some(loader) = here.get(self.me.index as usize % here.len().max(1)) {
            router.send(
                (self.address, self.me.incarnation),
                **loader,
                ClusterMessage::BatchRequest { step, task },
            );
        }
    }

    fn compute_if_ready(&mut self) -> Result<(), ActorProcessingErr> {
        let Some((step, task)) = self.waiting else {
            return Ok(());
        };
        let Some(batch) = self
            .fetches
            .get(&(step, task))
            .and_then(|fetch| fetch.batch.clone())
        else {
            return Ok(());
        };
        self.fetches.remove(&(step, task));
        self.waiting = None;
        self.device.send(Job::Compute {
            step,
            task,
            batch,
            trace: self.lease_trace,
        })
    }
}
