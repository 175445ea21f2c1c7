//! The shard: primary or backup of blocks. Reduces along the canonical tree, replicates, applies, publishes.
//!
//! One block of one shard:
//!
//! ```text
//!  view: primary or backup, new line ─▶ loading ──Loaded──┐
//!  view: joining ─▶ seeding (buffers the log) ──Seed──────┤
//!                     ▲                                   ▼
//!                     └── a gap in the log ◀──── at version t, open ◀───────────────┐
//!                                                         │ tree complete           │
//!                                                         │ or Replicate(t)         │
//!                                                         ▼                         │
//!                                         at version t, reduced(t) held             │
//!                     primary: Replicate to followers, Reduced to the leader when   │
//!                     every backup acknowledged; others: ReplicateAck               │
//!                                                         │ Decide(t)               │
//!                                                         ▼                         │
//!                                         applied: snapshot if asked, pulls answered, t + 1
//! ```
//!
//! A view of another line of state empties the shard. A view that no longer lists a block leaves it dormant until the step
//! that it was in is decided, so that an acknowledged partial sum is never forgotten while it counts.

mod block;
mod checkpoint;
mod machine;
mod steps;
mod views;

pub use machine::Shard;

use crate::ids::{BlockId, Epoch, Lineage, Member, Step};
use crate::message::{Message, Numerics};

/// What a shard knows of the run.
#[derive(Clone, Debug)]
pub struct ShardConfig {
    /// This shard's life.
    pub me: Member,
    /// Slots per step (`V`).
    pub num_slots: u32,
    /// Blocks of the layout.
    pub num_blocks: u32,
    /// Unanswered messages are said again after this long.
    pub resend_ms: u64,
}

/// What happens to a shard.
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
    /// A block that `Load` asked for.
    Loaded {
        /// The line of state it was asked for.
        lineage: Lineage,
        /// Its version.
        version: Step,
        /// The block.
        block: BlockId,
        /// Its state.
        state: N::State,
    },
    /// Blocks of a snapshot are in the store.
    Stored {
        /// The checkpoint's version.
        version: Step,
        /// The blocks.
        blocks: Vec<BlockId>,
        /// What the manifest will say of the object.
        object: Vec<u8>,
    },
    /// A snapshot was given up for a newer one, since the store is slower than checkpoints are due.
    StoreAbandoned {
        /// The checkpoint's version.
        version: Step,
        /// The blocks.
        blocks: Vec<BlockId>,
    },
    /// Time passed.
    Tick,
}

/// What a shard wants done.
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
    /// Load blocks from a checkpoint (version 0: make initial weights), then say `Loaded` for each.
    Load {
        /// The line of state.
        lineage: Lineage,
        /// The checkpoint's version.
        version: Step,
        /// The blocks.
        blocks: Vec<BlockId>,
    },
    /// Store a snapshot of blocks beside training, then say `Stored`.
    Store {
        /// The version.
        version: Step,
        /// The blocks with their states (copies).
        blocks: Vec<(BlockId, N::State)>,
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
