//! Counter-based random numbers: every draw is a pure function of a key, never of what was drawn before elsewhere.
//!
//! The generator is SplitMix64 over a key that names the draw: `(seed, purpose, coordinates…)`. It is not meant
//! for cryptography. Its bits are part of the product: changing them changes every run.

/// What a stream of draws is for. Two purposes never share a stream, whatever their coordinates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Purpose {
    /// Initial weights; coordinates: index of the tensor, index of the pair of elements.
    Init = 1,
    /// Order of samples; coordinates: epoch over the data.
    Order = 2,
    /// Dropout masks; coordinates: step, slot, micro-batch.
    Dropout = 3,
    /// Sampling of generated tokens; coordinates: prompt, sample.
    Sampling = 4,
    /// Choice of held-out evaluation windows; coordinates: index of the evaluation.
    Evaluation = 5,
    /// Faults of a simulated or real chaos run; coordinates: index of the fault.
    Fault = 6,
    /// Choice of audited slots; coordinates: step, slot.
    Audit = 7,
    /// Rearranged documents; coordinates: epoch over the data, window.
    FillIn = 8,
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of `u64` with full avalanche.
pub const fn mix(value: u64) -> u64 {
    let z = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A stream of random numbers that belongs to one key.
#[derive(Clone, Debug)]
pub struct Stream {
    state: u64,
}

impl Stream {
    /// The stream named by `seed`, `purpose` and `coordinates`; equal names give equal streams on every machine.
    pub fn new(seed: u64, purpose: Purpose, coordinates: &[u64]) -> Self {
        let mut state = mix(seed.wrapping_add(GOLDEN));
        state = mix(state ^ (purpose as u64).wrapping_mul(GOLDEN));
        for coordinate in coordinates {
            state = mix(state.wrapping_add(GOLDEN) ^ mix(coordinate.wrapping_add(GOLDEN)));
        }
        Self { state }
    }

    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN);
        mix(self.state)
    }

    /// A number in `0..bound`, without modulo bias (Lemire 2019). `bound` must not be 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "a draw below 0 has no value");
        let threshold = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.next_u64()) * u128::from(bound);
            if product as u64 >= threshold {
                return (product >> 64) as u64;
            }
        }
    }

    /// A number in `[0, 1)` with 53 random bits.
    pub fn unit_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_pinned() {
        let mut stream = Stream::new(1, Purpose::Order, &[2, 3]);
        let drawn = [stream.next_u64(), stream.next_u64()];
        assert_eq!(drawn, [PINNED_0, PINNED_1], "{drawn:#x?}");
    }
    const PINNED_0: u64 = 0xed24_dcf6_6f47_d12b;
    const PINNED_1: u64 = 0x61f6_2f7c_133d_d319;

    #[test]
    fn coordinates_and_purposes_name_different_streams() {
        let first = |purpose, coordinates: &[u64]| Stream::new(7, purpose, coordinates).next_u64();
        let drawn = [
            first(Purpose::Init, &[]),
            first(Purpose::Order, &[]),
            first(Purpose::Order, &[0]),
            first(Purpose::Order, &[0, 0]),
            first(Purpose::Order, &[0, 1]),
            first(Purpose::Order, &[1, 0]),
        ];
        for (i, a) in drawn.iter().enumerate() {
            assert!(drawn[i + 1..].iter().all(|b| a != b));
        }
    }

    #[test]
    fn below_reaches_every_value_and_no_other() {
        let mut stream = Stream::new(0, Purpose::Fault, &[]);
        let mut seen = [0u32; 7];
        for _ in 0..7000 {
            seen[stream.below(7) as usize] += 1;
        }
        assert!(
            seen.iter().all(|&count| (800..1200).contains(&count)),
            "{seen:?}"
        );
    }
}
