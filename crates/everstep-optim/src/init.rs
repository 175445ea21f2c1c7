//! Initial values: every element is a pure function of `(seed, tensor, element)`, so any block can be made alone.

use std::f64::consts::TAU;
use std::ops::Range;

use everstep_protocol::BlockId;
use everstep_protocol::random::{Purpose, Stream};

use crate::layout::{Init, Layout};

impl Layout {
    /// Initial values of a block, in order. They depend on the seed, the tensor's index and the element's index in it,
    /// never on the division in blocks. Panics if there is no such block.
    pub fn initial_values(&self, seed: u64, block: BlockId) -> Vec<f32> {
        let mut values = Vec::with_capacity(self.block(block).len);
        for segment in self.segments(block) {
            let len = values.len() + segment.parameter_range.len();
            match self.parameters()[segment.parameter].init {
                Init::Ones => values.resize(len, 1.0),
                Init::Zeros => values.resize(len, 0.0),
                Init::Normal { std } => normal(
                    seed,
                    segment.parameter,
                    segment.parameter_range,
                    std,
                    &mut values,
                ),
            }
        }
        values
    }
}

/// Appends the elements `range` of tensor `tensor`. Elements `2j` and `2j + 1` share one Box–Muller pair.
fn normal(seed: u64, tensor: usize, range: Range<usize>, std: f32, values: &mut Vec<f32>) {
    let std = f64::from(std);
    for pair in range.start / 2..range.end.div_ceil(2) {
        let (even, odd) = normal_pair(seed, tensor as u64, pair as u64);
        if range.contains(&(2 * pair)) {
            values.push((even * std) as f32);
        }
        if range.contains(&(2 * pair + 1)) {
            values.push((odd * std) as f32);
        }
    }
}

/// Two independent standard normal numbers (Box and Muller 1958).
fn normal_pair(seed: u64, tensor: u64, pair: u64) -> (f64, f64) {
    let mut stream = Stream::new(seed, Purpose::Init, &[tensor, pair]);
    // In (0, 1], so that the logarithm is finite.
    let radius = (-2.0 * libm::log(1.0 - stream.unit_f64())).sqrt();
    let angle = TAU * stream.unit_f64();
    (radius * libm::cos(angle), radius * libm::sin(angle))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{ParameterSpec, Update};

    fn layout(block_elements: usize) -> Layout {
        let spec = |name: &str, shape: &[usize], init, update| ParameterSpec {
            name: name.into(),
            shape: shape.into(),
            init,
            update,
            group: 0,
        };
        let parameters = vec![
            spec(
                "a",
                &[301, 333],
                Init::Normal { std: 0.02 },
                Update::Decayed,
            ),
            spec("b", &[7, 11], Init::Normal { std: 1.0 }, Update::Decayed),
            spec("scale", &[19], Init::Ones, Update::Plain),
            spec("bias", &[23], Init::Zeros, Update::Plain),
        ];
        Layout::new(parameters, block_elements).unwrap()
    }

    fn whole(layout: &Layout, seed: u64) -> Vec<f32> {
        (0..layout.num_blocks())
            .flat_map(|block| layout.initial_values(seed, block))
            .collect()
    }

    #[test]
    fn values_do_not_depend_on_the_division_in_blocks() {
        let expected = whole(&layout(usize::MAX), 3);
        assert_eq!(expected.len(), layout(1).num_elements());
        for block_elements in [1, 2, 3, 1000, 4097] {
            assert_eq!(
                whole(&layout(block_elements), 3),
                expected,
                "block_elements={block_elements}"
            );
        }
        assert_ne!(whole(&layout(1000), 4), expected);
    }

    #[test]
    fn normal_values_have_the_right_moments() {
        let values = whole(&layout(1000), 5);
        let n = 301 * 333;
        let normal: Vec<f64> = values[..n]
            .iter()
            .map(|&value| f64::from(value) / f64::from(0.02f32))
            .collect();
        let moment =
            |power: i32| normal.iter().map(|value| value.powi(power)).sum::<f64>() / n as f64;
        // Five standard errors of each moment of 100,233 standard normal numbers.
        let standard_error = |variance: f64| 5.0 * (variance / n as f64).sqrt();
        assert!(moment(1).abs() < standard_error(1.0), "{}", moment(1));
        assert!(
            (moment(2) - 1.0).abs() < standard_error(2.0),
            "{}",
            moment(2)
        );
        assert!(moment(3).abs() < standard_error(15.0), "{}", moment(3));
        assert!(
            (moment(4) - 3.0).abs() < standard_error(96.0),
            "{}",
            moment(4)
        );
        let neighbours = normal.windows(2).map(|pair| pair[0] * pair[1]).sum::<f64>() / n as f64;
        assert!(neighbours.abs() < standard_error(1.0), "{neighbours}");
        assert!(values[n + 77..n + 96].iter().all(|&value| value == 1.0));
        assert!(values[n + 96..].iter().all(|&value| value == 0.0));
    }

    #[test]
    fn bits_are_pinned() {
        let bits: Vec<u32> = layout(1000).initial_values(1, 0)[..4]
            .iter()
            .map(|value| value.to_bits())
            .collect();
        assert_eq!(bits, PINNED, "{bits:#x?}");
    }
    const PINNED: [u32; 4] = [0xbcdb_4561, 0x3b28_00f2, 0xbbb8_5b23, 0xbcbc_1bf6];
}
