//! The actors: thin shells that feed the protocol's machines and carry out their effects.

mod checkpointer;
mod coordinator;
mod device;
mod loader;
mod recovery;
mod refusals;
mod shard;
mod sizes;
mod worker;

pub(crate) use checkpointer::{Checkpointer, CheckpointerMessage};
pub(crate) use coordinator::CoordinatorActor;
pub(crate) use loader::Loader;
pub(crate) use shard::ShardActor;
pub(crate) use worker::WorkerActor;

use std::sync::Arc;

use crate::process::ProcessContext;
use crate::topology::ActorAddress;

/// What every actor of a process is started with.
#[derive(Clone, Debug)]
pub(crate) struct ActorArguments {
    /// The process.
    pub(crate) context: Arc<ProcessContext>,
    /// Which actor it is.
    pub(crate) address: ActorAddress,
}
