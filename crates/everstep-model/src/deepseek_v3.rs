//! What DeepSeek-V3 has in the place of attention and MLP, and behind its last layer.

mod attention;
mod experts;
mod prediction;

pub(crate) use attention::LatentAttention;
pub(crate) use experts::{Experts, Routing};
pub(crate) use prediction::Prediction;
