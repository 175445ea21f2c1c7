//! BLAKE3 of parameters and optimizer state: what runs are compared by.

use blake3::{Hash, Hasher};

use crate::state::BlockState;

/// Digests of one block, or of a whole run when combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateDigest {
    /// BLAKE3 of the master parameters, little-endian.
    pub parameters: Hash,
    /// BLAKE3 of the first moments, the second moments and the mean of the parameters, little-endian.
    pub optimizer: Hash,
}

impl StateDigest {
    /// Digests of one block.
    pub fn of(state: &BlockState) -> Self {
        let mut optimizer = Hasher::new();
        optimizer.update(state.first_moment.as_bytes());
        optimizer.update(state.second_moment.as_bytes());
        optimizer.update(state.average.as_bytes());
        Self {
            parameters: blake3::hash(state.parameters.as_bytes()),
            optimizer: optimizer.finalize(),
        }
    }
}

/// The digests of a run: BLAKE3 over the digests of its blocks, in block order.
pub fn combine_digests(blocks: impl IntoIterator<Item = StateDigest>) -> StateDigest {
    let (mut parameters, mut optimizer) = (Hasher::new(), Hasher::new());
    for block in blocks {
        parameters.update(block.parameters.as_bytes());
        optimizer.update(block.optimizer.as_bytes());
    }
    StateDigest {
        parameters: parameters.finalize(),
        optimizer: optimizer.finalize(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moments::MomentDtype;

    fn state(parameters: Vec<f32>) -> BlockState {
        BlockState::new(parameters, MomentDtype::Float32, false)
    }

    #[test]
    fn every_part_counts() {
        let state = state(vec![1.0, 2.0]);
        let digest = StateDigest::of(&state);
        assert_eq!(
            digest.parameters,
            blake3::hash(&[0, 0, 0x80, 0x3f, 0, 0, 0, 0x40])
        );
        assert_eq!(digest.optimizer, blake3::hash(&[0; 16]));
        let changed = |change: fn(&mut BlockState)| {
            let mut changed = state.clone();
            change(&mut changed);
            StateDigest::of(&changed)
        };
        assert_ne!(
            changed(|state| state.parameters.make_mut()[1] = 3.0).parameters,
            digest.parameters
        );
        let first = changed(|state| state.first_moment.make_mut()[1] = 3.0);
        let second = changed(|state| state.second_moment.make_mut()[1] = 3.0);
        assert_eq!(first.parameters, digest.parameters);
        let average = changed(|state| state.average = vec![3.0].into());
        for changed in [first, second, average] {
            assert_ne!(changed.optimizer, digest.optimizer);
        }
        assert_ne!(first.optimizer, second.optimizer);
    }

    #[test]
    fn order_counts_in_combinations() {
        let digests = [1.0, 2.0].map(|value| StateDigest::of(&state(vec![value])));
        let (forward, backward) = (
            combine_digests(digests),
            combine_digests([digests[1], digests[0]]),
        );
        assert_ne!(forward.parameters, backward.parameters);
        assert_eq!(forward.optimizer, backward.optimizer, "all moments are 0");
    }
}
