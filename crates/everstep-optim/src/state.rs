//! One block's master parameters and optimizer state.

use everstep_protocol::policy::History;

use crate::buffer::{BufferError, FloatBuffer};

/// One block's whole state, in `f32`. A clone is a snapshot: it shares memory until the next step is applied, and that
/// step copies only what is still held.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockState {
    /// Master parameters.
    pub parameters: FloatBuffer,
    /// Adam's running mean of gradients.
    pub first_moment: FloatBuffer,
    /// Adam's running mean of squared gradients.
    pub second_moment: FloatBuffer,
    /// What the verdict on the next step needs to know of those before; the same in every block, and no part of its digests.
    pub history: History,
}

impl BlockState {
    /// The state before the first step: given parameters, moments 0.
    pub fn new(parameters: impl Into<FloatBuffer>) -> Self {
        let parameters = parameters.into();
        let zeros = vec![0.0; parameters.len()];
        Self {
            first_moment: zeros.clone().into(),
            second_moment: zeros.into(),
            parameters,
            history: History::default(),
        }
    }

    /// Checks that every part has `expected` elements; for states that come from peers or disks.
    ///
    /// # Errors
    /// [`BufferError::Length`] for the first part that differs.
    pub fn check_len(&self, expected: usize) -> Result<(), BufferError> {
        for part in [&self.parameters, &self.first_moment, &self.second_moment] {
            if part.len() != expected {
                return Err(BufferError::Length {
                    expected,
                    actual: part.len(),
                });
            }
        }
        Ok(())
    }
}
