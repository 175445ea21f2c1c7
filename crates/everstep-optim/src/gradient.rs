//! What a slot, or a sum of slots, says about one block.

use crate::buffer::FloatBuffer;

/// Gradient of the summed token losses of a slot range, in one block.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradient {
    /// Gradient of the sum (not the mean) of the token losses, one value per element of the block.
    pub values: FloatBuffer,
    /// Sum of the token losses, in nats. The same in every block; it travels along so that it is summed along the same tree.
    pub loss_sum: f64,
    /// Number of target tokens. The same in every block.
    pub tokens: u64,
}

impl Gradient {
    /// A gradient from values made here (`Vec<f32>`) or received ([`FloatBuffer::from_bytes`]).
    pub fn new(values: impl Into<FloatBuffer>, loss_sum: f64, tokens: u64) -> Self {
        Self {
            values: values.into(),
            loss_sum,
            tokens,
        }
    }

    /// Bytes of the values as they travel.
    pub fn num_bytes(&self) -> usize {
        self.values.as_bytes().len()
    }
}
