//! What travels between actors of different roles, within a process by pointer, between processes through `wire`.

use std::sync::Arc;
use std::time::Duration;

use everstep_data::TokenBatch;
use everstep_optim::TrainingNumerics;
use everstep_protocol::{Message, Step, Task};
use everstep_telemetry::TraceContext;

use crate::topology::ActorAddress;

/// A message of the step protocol.
pub(crate) type StepMessage = Message<TrainingNumerics>;

/// Everything that actors say to actors of other processes.
#[derive(Clone, Debug)]
pub(crate) enum ClusterMessage {
    /// The step protocol.
    Protocol(StepMessage),
    /// Leader to everybody: the run is given up, for good.
    Failed {
        /// Why, in one line.
        reason: String,
    },
    /// Worker to loader: wants the tokens of a task.
    BatchRequest {
        /// The step.
        step: Step,
        /// The task.
        task: Task,
    },
    /// Loader to worker: the tokens of a task.
    Batch {
        /// The step.
        step: Step,
        /// The task.
        task: Task,
        /// Its tokens.
        batch: Arc<TokenBatch>,
    },
    /// To the coordinators: these lives of processes shall leave.
    Drain {
        /// Processes and their lives.
        processes: Vec<(u32, u64)>,
        /// Seconds until they are taken away, if that is so.
        seconds_left: Option<u64>,
    },
    /// Leader to an actor of a leaving process: nothing refers to it any more.
    Released,
}

/// A message as it reaches an actor.
#[derive(Clone, Debug)]
pub(crate) struct Delivery {
    /// Who sent it.
    pub(crate) from: ActorAddress,
    /// Which life of the sender.
    pub(crate) from_incarnation: u64,
    /// What it says.
    pub(crate) message: ClusterMessage,
    /// The span it was sent in.
    pub(crate) trace: TraceContext,
}

/// A peer process as the transport sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PeerEvent {
    /// Connected.
    Up {
        /// The process.
        process: u32,
        /// Its life.
        incarnation: u64,
    },
    /// Its connection ended, or its agent saw it exit.
    Down {
        /// The process.
        process: u32,
        /// Its life.
        incarnation: u64,
        /// How long nothing had been heard of it.
        silent: Duration,
    },
}
