//! Decoder architectures: what a slot computes with libtorch.
//!
//! A [`Model`] is a pure function of its parameters: [`Model::gradient`] gives the same bits for the same parameters,
//! batch and dropout seed, and nothing that a model remembers between calls matters.
//!
//! - [`config`], [`spec`]: what a model is and the layout of its parameter vector; no tensor involved
//! - [`Model`]: parameters in compute type, gradients of slots, evaluation
//! - [`generate`]: tokens from a prompt
//! - [`hugging_face`]: `config.json` out and in

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod attention;
mod batch;
mod blocks;
mod cache;
pub mod config;
mod decoder;
mod deepseek_v3;
mod error;
pub mod generate;
pub mod hugging_face;
mod layer;
mod layers;
mod model;
mod rotary;
pub mod sample;
pub mod spec;
mod weights;

pub use batch::{Batch, IGNORED_TARGET, MicroBatch};
pub use config::{
    Architecture, ConfigError, ExpertsConfig, LatentConfig, LinearConfig, Llama3Config, Mlp,
    ModelConfig, Norm, Positions, PredictionConfig, RopeScaling, YarnConfig,
};
pub use error::ModelError;
pub use generate::GenerateOptions;
pub use model::{Model, SlotGradient, dropout_seed};
pub use sample::Sampling;
pub use spec::parameters;
