//! What DeepSeek-V3 has in the place of attention and MLP.

mod attention;
mod experts;

pub(crate) use attention::LatentAttention;
pub(crate) use experts::{Experts, Routing};
