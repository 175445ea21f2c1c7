//! The shard actor: the protocol's shard with real blocks.

use std::sync::Arc;

use everstep_optim::TrainingNumerics;
use everstep_protocol::shard::{Effect, Event, ShardConfig};
use everstep_protocol::{Member, Message, Role, Shard, Step};
use everstep_telemetry::names::span;
use ractor::{Actor, ActorProcessingErr, ActorRef};
use tracing::Span;

use super::ActorArguments;
use super::checkpointer::CheckpointerMessage;
use super::refusals::Refusals;
use super::sizes;
use crate::message::{ClusterMessage, Delivery, StepMessage};
use crate::process::ProcessContext;
use crate::router::member_of;
use crate::topology::{ActorAddress, ActorRole};

/// Owns replicas of blocks.
pub(crate) struct ShardActor;

/// What the shard actor is told.
#[derive(Debug)]
pub(crate) enum ShardMessage {
    /// From another actor.
    Delivery(Delivery),
    /// From the checkpointer.
    Event(Event<TrainingNumerics>),
    /// The checkpoint of this version, which the leader found intact, cannot be read.
    Unloadable(Step),
    /// Time passed.
    Tick,
}

pub(crate) struct ShardState {
    context: Arc<ProcessContext>,
    address: ActorAddress,
    me: Member,
    machine: Shard<TrainingNumerics>,
    refusals: Refusals,
}

impl Actor for ShardActor {
    type Msg = ShardMessage;
    type State = ShardState;
    type Arguments = ActorArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<ShardMessage>,
        arguments: ActorArguments,
    ) -> Result<ShardState, ActorProcessingErr> {
        let ActorArguments { context, address } = arguments;
        let me = Member {
            role: Role::Shard,
            index: address.index,
            incarnation: context.next_life(),
        };
        let config = ShardConfig {
            me,
            num_slots: context.run.num_slots(),
            num_blocks: context.run.num_blocks(),
            resend_ms: context.run.timing.resend_ms,
        };
        let machine = Shard::new(config, context.run.numerics.clone());
        let inbox = myself.clone();
        context.router.register(
            address,
            me.incarnation,
            Arc::new(move |delivery| {
                let _ = inbox.cast(ShardMessage::Delivery(delivery));
            }),
        );
        myself.send_interval(context.run.timing.tick(), || ShardMessage::Tick);
        let mut state = ShardState {
            context,
            address,
            me,
            machine,
            refusals: Refusals::default(),
        };
        state.step(&myself, Event::Started)?;
        tracing::info!(member = %me, "shard started");
        Ok(state)
    }

    async fn handle(
        &self,
        myself: ActorRef<ShardMessage>,
        message: ShardMessage,
        state: &mut ShardState,
    ) -> Result<(), ActorProcessingErr> {
        state.context.panic_if_asked(ActorRole::Shard);
        match message {
            ShardMessage::Tick => state.step(&myself, Event::Tick),
            ShardMessage::Event(event) => state.step(&myself, event),
            // A new life is empty, which makes the leader look for an intact checkpoint anew.
            ShardMessage::Unloadable(version) => {
                Err(format!("checkpoint {} is damaged: starting again, empty", version.0).into())
            }
            ShardMessage::Delivery(Delivery {
                from,
                from_incarnation,
                message,
                trace,
            }) => {
                let message = match message {
                    ClusterMessage::Protocol(message) => message,
                    ClusterMessage::Failed { reason } => {
                        state.context.fail(reason);
                        return Ok(());
                    }
                    ClusterMessage::Released => {
                        state.context.released(state.address);
                        return Ok(());
                    }
                    _ => return Ok(()),
                };
                let Some(from) = member_of(from, from_incarnation) else {
                    return Ok(());
                };
                if !sizes::fit(&state.context, from, &message) {
                    return Ok(());
                }
                let span = span_of(&message);
                trace.adopt(&span);
                let _entered = span.enter();
                state.step(&myself, Event::Message { from, message })
            }
        }
    }
}

/// The span that a message's work belongs to; most messages are bookkeeping and get none.
fn span_of(message: &StepMessage) -> Span {
    match message {
        Message::Partial { step, block, .. } => {
            tracing::info_span!(span::REDUCE, step = step.0, block)
        }
        // The acknowledgement is what completes a block's report to the leader: it belongs to the step's trace too.
        Message::Replicate { step, block, .. } | Message::ReplicateAck { step, block, .. } => {
            tracing::info_span!(span::REPLICATE, step = step.0, block)
        }
        Message::Decide { step, .. } => tracing::info_span!(span::APPLY, step = step.0),
        Message::Pull { version, .. } => tracing::info_span!(span::PUBLISH, step = version.0),
        _ => Span::none(),
    }
}

impl ShardState {
    fn step(
        &mut self,
        myself: &ActorRef<ShardMessage>,
        event: Event<TrainingNumerics>,
    ) -> Result<(), ActorProcessingErr> {
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
                Effect::Load {
                    lineage,
                    version,
                    blocks,
                } => {
                    let reply = myself.clone();
                    let loaded = Box::new(move |loaded| {
                        let _ = reply.cast(match loaded {
                            Some(event) => ShardMessage::Event(event),
                            None => ShardMessage::Unloadable(version),
                        });
                    });
                    self.context.checkpointer(CheckpointerMessage::Load {
                        lineage,
                        version,
                        blocks,
                        loaded,
                    });
                }
                Effect::Store { version, blocks } => {
                    let reply = myself.clone();
                    let stored = Box::new(move |event| {
                        let _ = reply.cast(ShardMessage::Event(event));
                    });
                    self.context.checkpointer(CheckpointerMessage::Store {
                        writer: self.me,
                        version,
                        blocks,
                        stored,
                    });
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
}
