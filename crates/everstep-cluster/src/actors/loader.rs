//! The loader actor: serves the tokens of a task, a pure function of the dataset, the seed and the task.

use std::sync::Arc;

use everstep_protocol::Message;
use everstep_telemetry::names::span;
use ractor::{Actor, ActorProcessingErr, ActorRef};

use super::ActorArguments;
use crate::message::{ClusterMessage, Delivery};
use crate::process::ProcessContext;
use crate::topology::{ActorAddress, ActorRole};

/// Serves batches.
pub(crate) struct Loader;

pub(crate) struct LoaderState {
    context: Arc<ProcessContext>,
    address: ActorAddress,
    incarnation: u64,
}

/// What the loader is told.
#[derive(Debug)]
pub(crate) struct LoaderMessage(Delivery);

impl Actor for Loader {
    type Msg = LoaderMessage;
    type State = LoaderState;
    type Arguments = ActorArguments;

    async fn pre_start(
        &self,
        myself: ActorRef<LoaderMessage>,
        arguments: ActorArguments,
    ) -> Result<LoaderState, ActorProcessingErr> {
        let ActorArguments { context, address } = arguments;
        let incarnation = context.next_life();
        context.router.register(
            address,
            incarnation,
            Arc::new(move |delivery| {
                let _ = myself.cast(LoaderMessage(delivery));
            }),
        );
        tracing::info!(loader = address.index, "loader started");
        Ok(LoaderState {
            context,
            address,
            incarnation,
        })
    }

    async fn handle(
        &self,
        _myself: ActorRef<LoaderMessage>,
        message: LoaderMessage,
        state: &mut LoaderState,
    ) -> Result<(), ActorProcessingErr> {
        state.context.panic_if_asked(ActorRole::Loader);
        let Delivery {
            from,
            message,
            trace,
            ..
        } = message.0;
        let (step, task) = match message {
            ClusterMessage::BatchRequest { step, task } => (step, task),
            ClusterMessage::Protocol(Message::Finish { .. }) => {
                state.context.finish();
                return Ok(());
            }
            ClusterMessage::Released => {
                state.context.released(state.address);
                return Ok(());
            }
            ClusterMessage::Failed { reason } => {
                state.context.fail(reason);
                return Ok(());
            }
            _ => return Ok(()),
        };
        let span = tracing::info_span!(span::BATCH, step = step.0);
        trace.adopt(&span);
        let _entered = span.enter();
        let batch = Arc::new(state.context.run.batch(step, task)?);
        let reply = ClusterMessage::Batch { step, task, batch };
        state
            .context
            .router
            .send((state.address, state.incarnation), from, reply);
        Ok(())
    }
}
