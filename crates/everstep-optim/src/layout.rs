//! The flattened parameter vector and its blocks.
//!
//! All parameters of a model, in canonical order, form one vector. Blocks are ranges of it that never cross an
//! optimizer group. Whatever touches state is done per block in a fixed order, so neither the number nor the
//! placement of shards can change a bit.

use serde::{Deserialize, Serialize};

/// How a parameter starts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Init {
    /// Normally distributed around 0.
    Normal {
        /// Standard deviation.
        std: f32,
    },
    /// All ones (norm scales).
    Ones,
    /// All zeros (biases).
    Zeros,
}

/// One tensor of a model, as the shards see it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ParameterSpec {
    /// Name in Hugging Face's convention.
    pub name: String,
    /// Shape, row-major.
    pub shape: Vec<usize>,
    /// Initial values.
    pub init: Init,
    /// Whether weight decay applies (matrices yes; norms and biases no).
    pub decay: bool,
}

impl ParameterSpec {
    /// Number of elements.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A maximal run of one block: a range of the flattened vector inside one optimizer group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// First element in the flattened vector.
    pub offset: usize,
    /// Number of elements.
    pub len: usize,
    /// Whether weight decay applies to all of it.
    pub decay: bool,
}

/// All parameters of a model and their division in blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    parameters: Vec<ParameterSpec>,
    offsets: Vec<usize>,
    blocks: Vec<Block>,
    num_elements: usize,
}
