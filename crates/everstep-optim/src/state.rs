//! One block's master parameters and optimizer state.

use everstep_protocol::policy::History;

use crate::buffer::{BufferError, FloatBuffer};
use crate::moments::MomentDtype;

/// One block's whole state, in `f32`. A clone is a snapshot: it shares memory until the next step is applied, and that
/// step copies only what is still held.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockState {
    /// Master parameters.
    pub parameters: FloatBuffer,
    /// Adam's running mean of gradients, in words of a [`MomentDtype`].
    pub first_moment: FloatBuffer,
    /// Adam's running mean of squared gradients, in the same.
    pub second_moment: FloatBuffer,
    /// Running mean of the parameters; empty in a run that keeps none.
    pub average: FloatBuffer,
    /// What the verdict on the next step needs to know of those before; the same in every block, and no part of its digests.
    pub history: History,
}

impl BlockState {
    /// The state before the first step: given parameters, moments 0. The mean of the parameters, if one is kept, begins with them.
    pub fn new(
        parameters: impl Into<FloatBuffer>,
        moments: MomentDtype,
        is_averaged: bool,
    ) -> Self {
        let parameters = parameters.into();
        let zeros = vec![0.0; moments.words(parameters.len())];
        let average = match is_averaged {
            true => parameters.clone(),
            false => Vec::new().into(),
        };
        Self {
            first_moment: zeros.clone().into(),
            second_moment: zeros.into(),
            average,
            parameters,
            history: History::default(),
        }
    }

    /// [`Self::parts`], taken apart.
    pub fn into_parts(self) -> [FloatBuffer; 4] {
        [
            self.parameters,
            self.first_moment,
            self.second_moment,
            self.average,
        ]
    }

    /// Its parts, in the order in which they travel and are stored.
    pub fn parts(&self) -> [&FloatBuffer; 4] {
        [
            &self.parameters,
            &self.first_moment,
            &self.second_moment,
            &self.average,
        ]
    }

    /// Checks how long each part is; for states that come from peers or disks.
    ///
    /// # Errors
    /// [`BufferError::Length`] for the first part that differs.
    pub(crate) fn check_lens(&self, expected: [usize; 4]) -> Result<(), BufferError> {
        for (part, expected) in self.parts().into_iter().zip(expected) {
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
