//! The flat parameter vector and the leaves that share its memory.

use std::collections::BTreeMap;
use std::ops::Range;

use everstep_optim::{ParameterSpec, Update};
use everstep_torch::{Dtype, TorchError, bytes};
use tch::{Device, Tensor};

/// All parameters in one tensor, but for the biases of routers. Writing a range of it changes every leaf that lies there, with nothing to
/// rebuild.
#[derive(Debug)]
pub(crate) struct Weights {
    flat: Tensor,
    /// The end of the vector, in float32 whatever the compute type: a step of the balance would be lost in bfloat16.
    biases: Tensor,
    /// What autograd differentiates by, with the range that each takes of the vector; sorted.
    leaves: Vec<(Range<usize>, Tensor)>,
    /// Ranges that autograd knows nothing of.
    constants: Vec<Range<usize>>,
    places: BTreeMap<String, (usize, Vec<usize>)>,
    num_elements: usize,
    /// Whether matrix products round their factors to 8 bits.
    pub(crate) is_fp8: bool,
}

impl Weights {
    /// Zeros for `parameters` in their order.
    pub(crate) fn new(
        parameters: Vec<ParameterSpec>,
        device: Device,
        dtype: Dtype,
        is_fp8: bool,
    ) -> Self {
        let mut num_elements = 0;
        let mut places = BTreeMap::new();
        let mut num_biases = 0;
        for parameter in parameters {
            let elements = parameter.num_elements();
            places.insert(parameter.name, (num_elements, parameter.shape));
            num_elements += elements;
            if matches!(parameter.update, Update::Balance { .. }) {
                num_biases += elements;
            }
        }
        let zeros = |len: usize, dtype: Dtype| Tensor::zeros([len as i64], (dtype.kind(), device));
        Self {
            flat: zeros(num_elements - num_biases, dtype),
            biases: zeros(num_biases, Dtype::F32),
            leaves: Vec::new(),
            constants: Vec::new(),
            places,
            num_elements,
            is_fp8,
        }
    }

    /// The leaf that holds the named neighbours, joined along their first dimension.
    ///
    /// # Panics
    /// If there is no such parameter or they are no neighbours: the layout and the architecture would then disagree.
    pub(crate) fn leaf(&mut self, names: &[String]) -> Tensor {
        let (start, first) = self.places[&names[0]].clone();
        let mut end = start;
        let mut rows = 0;
        for name in names {
            let (offset, shape) = &self.places[name];
            assert_eq!(*offset, end, "`{name}` does not follow its neighbour");
            assert_eq!(
                shape[1..],
                first[1..],
                "`{name}` cannot be joined with its neighbour"
            );
            end += shape.iter().product::<usize>();
            rows += shape[0];
        }
        let mut shape = vec![rows as i64];
        shape.extend(first[1..].iter().map(|&len| len as i64));
        let leaf = self
            .flat
            .narrow(0, start as i64, (end - start) as i64)
            .view(shape.as_slice())
            .detach()
            .set_requires_grad(true);
        self.leaves.push((start..end, leaf.shallow_clone()));
        leaf
    }

    /// The named biases of a router, by which nothing is differentiated, and their range.
    ///
    /// # Panics
    /// If they are no such biases.
    pub(crate) fn biases(&mut self, name: &str) -> (Range<usize>, Tensor) {
        let (start, shape) = &self.places[name];
        let range = *start..start + shape.iter().product::<usize>();
        let start = range.start - self.flat.numel();
        let vector = self
            .biases
            .narrow(0, start as i64, range.len() as i64)
            .detach();
        self.constants.push(range.clone());
        (range, vector)
    }

    /// Writes parameters from element `offset` of the vector on, in their own type; they do not cross the biases' beginning.
    ///
    /// # Errors
    /// The bytes are no whole elements or do not fit.
    pub(crate) fn write_bytes(&mut self, offset: usize, bytes: &[u8]) -> Result<(), TorchError> {
        match offset.checked_sub(self.flat.numel()) {
            Some(offset) if self.biases.numel() > 0 => {
                bytes::write_bytes(&mut self.biases, offset, bytes)
            }
            _ => bytes::write_bytes(&mut self.flat, offset, bytes),
        }
    }

    /// Writes parameters from element `offset` of the vector on, rounding to their own type.
    ///
    /// # Errors
    /// They do not fit.
    pub(crate) fn write_f32(&mut self, offset: usize, values: &[f32]) -> Result<(), TorchError> {
        let num_flat = self.flat.numel();
        let (flat, biases) = values.split_at(num_flat.saturating_sub(offset).min(values.len()));
        if !flat.is_empty() {
            bytes::write_f32(&mut self.flat, offset, flat)?;
        }
        if !biases.is_empty() {
            let offset = (offset + flat.len()) - num_flat;
            bytes::write_f32(&mut self.biases, offset, biases)?;
        }
        Ok(())
    }

    /// Call it when all leaves and constants are taken.
    ///
    /// # Panics
    /// If a parameter belongs to none or to two.
    pub(crate) fn finish(&mut self) {
        self.leaves.sort_by_key(|(range, _)| range.start);
        let leaves = self.leaves.iter().map(|(range, _)| range);
        let mut ranges: Vec<&Range<usize>> = leaves.chain(&self.constants).collect();
        ranges.sort_by_key(|range| range.start);
        let mut end = 0;
        for range in ranges {
            assert_eq!(range.start, end, "the leaves have a gap or overlap");
            end = range.end;
        }
        assert_eq!(
            end, self.num_elements,
            "the leaves do not cover the parameters"
        );
        self.places.clear();
    }

    /// The leaves and their ranges, in the vector's order.
    pub(crate) fn leaves(&self) -> &[(Range<usize>, Tensor)] {
        &self.leaves
    }

    pub(crate) fn num_elements(&self) -> usize {
        self.num_elements
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use everstep_optim::{Init, Update};

    #[test]
    fn neighbours_become_one_leaf_that_sees_what_is_written() {
        let parameter = |name: &str, shape: &[usize]| ParameterSpec {
            name: name.into(),
            shape: shape.to_vec(),
            init: Init::Zeros,
            update: Update::Decayed,
            group: 0,
        };
        let parameters = vec![
            parameter("a", &[2, 3]),
            parameter("b", &[1, 3]),
            parameter("c", &[2]),
        ];
        let mut weights = Weights::new(parameters, Device::Cpu, Dtype::F32, false);
        let c = weights.leaf(&["c".into()]);
        let ab = weights.leaf(&["a".into(), "b".into()]);
        weights.finish();
        assert_eq!((ab.size(), c.size()), (vec![3, 3], vec![2]));
        assert_eq!(weights.leaves()[0].0, 0..9);
        weights.write_f32(8, &[5.0, 6.0]).unwrap();
        assert_eq!((ab.double_value(&[2, 2]), c.double_value(&[0])), (5.0, 6.0));
        assert!(ab.requires_grad() && ab.is_leaf());
        assert!(weights.write_f32(10, &[5.0, 6.0]).is_err());
    }

    #[test]
    fn biases_keep_float32() {
        let parameter = |name: &str, update| ParameterSpec {
            name: name.into(),
            shape: vec![2],
            init: Init::Zeros,
            update,
            group: 0,
        };
        let rate = 0.001;
        let parameters = vec![
            parameter("w", Update::Decayed),
            parameter("b", Update::Balance { rate }),
        ];
        let mut weights = Weights::new(parameters, Device::Cpu, Dtype::Bf16, false);
        let w = weights.leaf(&["w".into()]);
        let (range, b) = weights.biases("b");
        weights.finish();
        assert_eq!(range, 2..4);
        weights.write_f32(1, &[1.001, 1.001, 1.002]).unwrap();
        let both = [w.double_value(&[1]), b.double_value(&[0])];
        assert_eq!(both, [1.0, f64::from(1.001f32)]);
        weights.write_bytes(3, &0.3f32.to_le_bytes()).unwrap();
        weights.write_bytes(0, &[0x80, 0x3f]).unwrap();
        let both = [w.double_value(&[0]), b.double_value(&[1])];
        assert_eq!(both, [1.0, f64::from(0.3f32)]);
        assert!(weights.write_bytes(4, &[0; 4]).is_err());
    }
}
