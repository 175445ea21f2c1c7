//! Decoder architectures: what a slot computes with libtorch.
//!
//! A [`Model`] is a pure function of its parameters: [`Model::gradient`] gives the same bits for the same parameters,
//! batch and dropout seed, and nothing that a model remembers between calls matters.
//!
//! - [`Model`]: parameters in compute type, gradients of slots, evaluation
//! - [`generate`]: tokens from a prompt

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod attention;
mod batch;
mod blocks;
mod cache;
mod decoder;
mod deepseek_v3;
mod error;
pub mod generate;
mod layer;
mod layers;
mod model;
mod rotary;
pub mod sample;
mod weights;

pub use batch::{Batch, IGNORED_TARGET, MicroBatch};
pub use error::ModelError;
pub use generate::GenerateOptions;
pub use model::{Model, SlotGradient, dropout_seed};
pub use sample::Sampling;
