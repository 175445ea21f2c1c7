//! What a worker computes: the model of a run on its device, slot by slot.
//!
//! - [`Libtorch`], [`build_model`]: from a run file to a model
//! - `pretraining`: next-token prediction, the worker's half
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod libtorch;
mod pretraining;

pub use libtorch::{Libtorch, build_model};
