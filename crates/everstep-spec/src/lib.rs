//! What a model is, without a tensor: whoever holds parameters needs this, and only who computes needs libtorch.
//!
//! - [`config`]: architectures and their options
//! - [`spec`]: the layout of the parameter vector
//! - [`hugging_face`]: folders with `config.json` and weights, out and in

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod config;
pub mod hugging_face;
pub mod spec;

pub use config::{
    Architecture, ConfigError, ExpertsConfig, LatentConfig, LinearConfig, Llama3Config, Mlp,
    ModelConfig, Norm, Positions, PredictionConfig, RopeScaling, YarnConfig,
};
pub use spec::parameters;
