//! The worker's side: pulls parameters, computes leased tasks in order, pushes partial sums, holds them until the commit.
//!
//! ```text
//!            Lease(t)                 all blocks at t             queue empty
//!   idle ───────────────▶ pulling ───────────────────▶ computing ─────────────▶ delivering
//!    ▲                                                    │  ▲                    │
//!    │                                  a range complete: │  │ Lease(t) again      │ all blocks acknowledged:
//!    │                                 Partial to every   ▼  │                     ▼ Delivered to the leader
//!    │                                 block's primary ── held ◀───────────────── held
//!    └───────────── Decide(t), Lease of a later step, or a view of another line ────┘
//! ```
//!
//! The device is never asked for two things at once, and never mixes versions under a computation: parameters that arrive
//! meanwhile wait. A new view sends held ranges to primaries that have not acknowledged them.

mod held;
mod machine;
mod parameters;
mod tasks;

pub use machine::Worker;

use crate::audit::AuditPlan;
use crate::ids::{BlockId, Epoch, Member, Step};
use crate::message::{EvaluationSums, Message, Numerics, Task};

/// What a worker knows of the run.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// This worker's life.
    pub me: Member,
    /// Slots per step (`V`).
    pub num_slots: u32,
    /// Blocks of the layout.
    pub num_blocks: u32,
    /// Unanswered messages are said again after this long.
    pub resend_ms: u64,
    /// Which slots are computed twice: their digests are told.
    pub audit: AuditPlan,
}

/// What happens to a worker.
#[derive(Debug)]
pub enum Event<N: Numerics> {
    /// The process started: say hello to the coordinators.
    Started,
    /// A member said something.
    Message {
        /// Who.
        from: Member,
        /// What.
        message: Message<N>,
    },
    /// The device finished a slot: its gradient, by block.
    Computed {
        /// The step.
        step: Step,
        /// The slot.
        slot: u32,
        /// The gradient of each block.
        gradients: Vec<N::Gradient>,
    },
    /// The device finished a validation chunk.
    Evaluated {
        /// Version of the parameters.
        step: Step,
        /// The chunk.
        chunk: u32,
        /// What it gave.
        sums: EvaluationSums,
    },
    /// Time passed.
    Tick,
}

/// What a worker wants done.
#[derive(Debug)]
pub enum Effect<N: Numerics> {
    /// Say something to a member.
    Send {
        /// To whom.
        to: Member,
        /// What.
        message: Message<N>,
    },
    /// Say it to every coordinator of the topology.
    SendCoordinators {
        /// What.
        message: Message<N>,
    },
    /// Tasks of the step were leased: their batches will be needed (a hint; parameters may not be here yet).
    Prefetch {
        /// The step.
        step: Step,
        /// The tasks.
        tasks: Vec<Task>,
    },
    /// Put a block of parameters on the device, never while it computes. Versions grow, except after a rollback.
    LoadParameters {
        /// The version.
        version: Step,
        /// The block.
        block: BlockId,
        /// The values.
        parameters: N::Parameters,
    },
    /// Compute a task: all blocks of `step` are on the device. One at a time; the next is asked for when this one is done.
    Compute {
        /// The step.
        step: Step,
        /// The task.
        task: Task,
    },
    /// This member was expelled: the actor must end; its supervisor starts a new life.
    Restart,
    /// A leader that is deposed spoke as if it led: nothing came of it.
    Refused {
        /// Who.
        from: Member,
        /// The epoch that it believes to lead.
        epoch: Epoch,
    },
    /// The run is over.
    Finished,
}

#[cfg(test)]
mod tests;
