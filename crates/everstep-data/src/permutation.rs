//! A keyed permutation of `0..size` in constant memory.

use everstep_protocol::random::{Stream, mix};

/// More rounds than the four that make a Feistel network a pseudo-random permutation (Luby, Rackoff 1988), since
/// the halves may be as narrow as one bit.
const ROUNDS: usize = 8;

/// A bijection of `0..size`, chosen by a stream of random numbers: a balanced Feistel network over the next power
/// of four, walked until it lands inside (Black, Rogaway 2002). The expected walk is shorter than four steps.
#[derive(Clone, Debug)]
pub struct Permutation {
    size: u64,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    /// The permutation of `0..size` that the next draws of `stream` choose. `size` must not be 0 nor above 2^62.
    pub fn new(size: u64, stream: &mut Stream) -> Self {
        assert!(
            (1..=1 << 62).contains(&size),
            "a permutation of {size} things"
        );
        let bits = u64::BITS - (size - 1).leading_zeros();
        Self {
            size,
            half_bits: bits.div_ceil(2).max(1),
            keys: std::array::from_fn(|_| stream.next_u64()),
        }
    }

    /// The place that `index` (`0..size`) is sent to.
    pub fn apply(&self, index: u64) -> u64 {
        assert!(
            index < self.size,
            "index {index} of a permutation of {}",
            self.size
        );
        let mut value = index;
        // The walk follows a cycle that contains an index below `size`, so it ends.
        loop {
            value = self.feistel(value);
            if value < self.size {
                return value;
            }
        }
    }

    fn feistel(&self, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        (left << self.half_bits) | right
    }
}

#[cfg(test)]
mod tests {
    use everstep_protocol::random::Purpose;
    use proptest::prelude::*;

    use super::*;

    fn permutation(size: u64, seed: u64) -> Permutation {
        Permutation::new(size, &mut Stream::new(seed, Purpose::Order, &[0]))
    }

    proptest! {
        #[test]
        fn it_is_a_bijection(size in 1u64..3000, seed: u64) {
            let permutation = permutation(size, seed);
            let mut seen = vec![false; size as usize];
            for index in 0..size {
                let place = permutation.apply(index) as usize;
                prop_assert!(!std::mem::replace(&mut seen[place], true));
            }
        }
    }

    #[test]
    fn bits_are_pinned() {
        let permutation = permutation(1000, 1);
        let places: Vec<u64> = (0..6).map(|index| permutation.apply(index)).collect();
        assert_eq!(places, [167, 108, 777, 879, 202, 136]);
    }

    #[test]
    fn every_place_is_about_equally_likely() {
        let mut counts = [[0u32; 5]; 5];
        for seed in 0..5000 {
            let permutation = permutation(5, seed);
            for index in 0..5 {
                counts[index][permutation.apply(index as u64) as usize] += 1;
            }
        }
        assert!(
            counts
                .iter()
                .flatten()
                .all(|count| (880..1120).contains(count)),
            "{counts:?}"
        );
    }
}
