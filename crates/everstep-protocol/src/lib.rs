//! Pure state machines of the training step: leases, canonical reduction, decisions, views, epochs.
//!
//! std only: no clock, no I/O, no threads. Every machine has `handle(now_ms, event) -> effects` and `next_deadline_ms()`.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod allegiance;
pub mod audit;
pub mod coordinator;
pub mod ids;
pub mod message;
pub mod policy;
pub mod random;
mod retry;
pub mod shard;
#[cfg(test)]
mod testing;
pub mod tree;
mod view;
pub mod worker;

pub use coordinator::Coordinator;
pub use ids::{BlockId, Epoch, Lineage, Member, Role, SlotRange, Step};
pub use message::{
    BlockStatus, Decision, Digest, EvaluationSums, GradientReport, Message, Numerics, Placement,
    Repair, Status, Task, Testimony, View, ViewId,
};
pub use shard::Shard;
pub use tree::TreeSum;
pub use worker::Worker;
