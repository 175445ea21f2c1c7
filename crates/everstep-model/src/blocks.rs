//! The gradient of a slot as it comes out of libtorch, tensor by tensor, in the blocks in which it travels.
//!
//! Each value is written once, to where it stays: a vector of all of them would be as large as the model, made anew for each slot.

use std::ops::Range;

use everstep_torch::{TorchError, bytes};
use tch::Tensor;

/// Blocks of the flattened vector that are being filled.
#[derive(Debug)]
pub(crate) struct Blocks<'a> {
    ends: &'a [usize],
    pub(crate) values: Vec<Vec<f32>>,
}

impl<'a> Blocks<'a> {
    /// Empty ones that end at `ends`.
    pub(crate) fn new(ends: &'a [usize]) -> Self {
        let starts = std::iter::once(&0).chain(ends);
        let capacities = ends.iter().zip(starts).map(|(end, start)| end - start);
        Self {
            ends,
            values: capacities.map(Vec::with_capacity).collect(),
        }
    }

    /// Takes over a tensor that takes `range` of the vector and follows what is there.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn append(
        &mut self,
        range: &Range<usize>,
        tensor: &Tensor,
    ) -> Result<(), TorchError> {
        self.each(range, tensor, |block, _, piece| {
            bytes::append_f32(piece, block)
        })
    }

    /// Adds a tensor that takes `range` of the vector to what is there.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn add(&mut self, range: &Range<usize>, tensor: &Tensor) -> Result<(), TorchError> {
        self.each(range, tensor, |block, place, piece| {
            bytes::add_f32(piece, &mut block[place])
        })
    }

    /// Each block that has a part of `range`, with where the part is in the block, and that piece of the tensor.
    fn each(
        &mut self,
        range: &Range<usize>,
        tensor: &Tensor,
        mut call: impl FnMut(&mut Vec<f32>, Range<usize>, &Tensor) -> Result<(), TorchError>,
    ) -> Result<(), TorchError> {
        // Copies what does not lie row by row: once, not for each piece.
        let flat = tensor.detach().reshape([-1]);
        let mut at = range.start;
        let mut index = self.ends.partition_point(|&end| end <= at);
        while at < range.end {
            let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
            let to = range.end.min(self.ends[index]);
            let place = at - start..to - start;
            let piece = flat.narrow(0, (at - range.start) as i64, place.len() as i64);
            call(&mut self.values[index], place, &piece)?;
            (at, index) = (to, index + 1);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn tensors_are_cut_where_blocks_end() {
        let tensor = |from: i64, len: i64| {
            Tensor::arange_start(from, from + len, (Kind::Float, Device::Cpu))
        };
        let ends = [2, 7, 10];
        let mut blocks = Blocks::new(&ends);
        // Transposed, so that its elements do not lie in their order.
        let turned = Tensor::from_slice(&[0f32, 3.0, 1.0, 4.0, 2.0, 5.0])
            .view([3, 2])
            .tr();
        blocks.append(&(0..6), &turned).unwrap();
        blocks.append(&(6..10), &tensor(6, 4)).unwrap();
        let expected: Vec<Vec<f32>> = [0..2u8, 2..7, 7..10]
            .map(|range| range.map(f32::from).collect())
            .to_vec();
        assert_eq!(blocks.values, expected);
        blocks.add(&(0..6), &turned).unwrap();
        blocks.add(&(6..10), &tensor(6, 4)).unwrap();
        let doubled = |block: &Vec<f32>| block.iter().map(|value| 2.0 * value).collect::<Vec<_>>();
        assert_eq!(
            blocks.values,
            expected.iter().map(doubled).collect::<Vec<_>>()
        );
    }
}
