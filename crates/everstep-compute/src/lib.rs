//! What a worker computes: the model of a run on its device, slot by slot.
//!
//! - [`LIBTORCH`], [`build_model`]: from a run file to a model
//! - [`Pretraining`]: next-token prediction, the worker's half
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod libtorch;
mod pretraining;

pub use libtorch::{LIBTORCH, Libtorch, build_model};
pub use pretraining::{Pretraining, RowsError, micro_batches};
