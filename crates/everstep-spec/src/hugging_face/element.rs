//! Elements of exported and imported tensors.

use std::fmt;

use half::{bf16, f16};

/// Type of the elements of a tensor in a safetensors file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TensorType {
    /// IEEE single precision, which the master weights have.
    #[default]
    Float32,
    /// The upper half of a single.
    Bfloat16,
    /// IEEE half precision, up to 65,504.
    Float16,
}

impl TensorType {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Float32, Self::Bfloat16, Self::Float16];

    /// Its name in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::Bfloat16 => "bfloat16",
            Self::Float16 => "float16",
        }
    }

    /// Its name in a safetensors header.
    pub(super) fn code(self) -> &'static str {
        match self {
            Self::Float32 => "F32",
            Self::Bfloat16 => "BF16",
            Self::Float16 => "F16",
        }
    }

    pub(super) fn from_code(code: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.code() == code)
    }

    /// Size of an element in bytes.
    pub fn size(self) -> usize {
        match self {
            Self::Float32 => 4,
            Self::Bfloat16 | Self::Float16 => 2,
        }
    }

    /// Appends `values`, little-endian, rounded to nearest-even. A finite value that is infinite afterwards is given back.
    pub(super) fn encode(self, values: &[f32], bytes: &mut Vec<u8>) -> Result<(), f32> {
        match self {
            Self::Float32 => values
                .iter()
                .for_each(|value| bytes.extend(value.to_le_bytes())),
            Self::Bfloat16 => {
                for &value in values {
                    let rounded = bf16::from_f32(value);
                    fits(value, rounded.is_infinite())?;
                    bytes.extend(rounded.to_le_bytes());
                }
            }
            Self::Float16 => {
                for &value in values {
                    let rounded = f16::from_f32(value);
                    fits(value, rounded.is_infinite())?;
                    bytes.extend(rounded.to_le_bytes());
                }
            }
        }
        Ok(())
    }

    /// Appends what `bytes`, whole little-endian elements, hold; exact.
    pub(super) fn decode(self, bytes: &[u8], values: &mut Vec<f32>) {
        match self {
            Self::Float32 => values.extend(
                bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|&bytes| f32::from_le_bytes(bytes)),
            ),
            Self::Bfloat16 => values.extend(
                bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|&bytes| bf16::from_le_bytes(bytes).to_f32()),
            ),
            Self::Float16 => values.extend(
                bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|&bytes| f16::from_le_bytes(bytes).to_f32()),
            ),
        }
    }
}

fn fits(value: f32, is_infinite: bool) -> Result<(), f32> {
    match is_infinite && value.is_finite() {
        true => Err(value),
        false => Ok(()),
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn there_and_back(dtype: TensorType, values: &[f32]) -> Vec<f32> {
        let (mut bytes, mut back) = (Vec::new(), Vec::new());
        dtype.encode(values, &mut bytes).unwrap();
        assert_eq!(bytes.len(), dtype.size() * values.len());
        dtype.decode(&bytes, &mut back);
        back
    }

    #[test]
    fn values_are_rounded_to_nearest_even_and_come_back() {
        // 1 + 2^-8 lies half-way between two bfloat16 numbers, 1 + 2^-11 between two float16 numbers; the even one is 1.
        let values = [
            1.0,
            -0.0,
            1.0 + 0.5f32.powi(8),
            1.0 + 0.5f32.powi(11),
            1e-30,
        ];
        assert_eq!(there_and_back(TensorType::Float32, &values), values);
        assert_eq!(
            there_and_back(TensorType::Bfloat16, &values)[..4],
            [1.0, -0.0, 1.0, 1.0]
        );
        assert_eq!(
            there_and_back(TensorType::Float16, &values),
            [1.0, -0.0, 1.0 + 0.5f32.powi(8), 1.0, 0.0]
        );
    }

    #[test]
    fn what_a_type_cannot_hold_is_given_back() {
        let mut bytes = Vec::new();
        assert_eq!(
            TensorType::Float16.encode(&[1.0, 7e4], &mut bytes),
            Err(7e4)
        );
        assert_eq!(
            TensorType::Bfloat16.encode(&[f32::MAX], &mut bytes),
            Err(f32::MAX)
        );
        assert_eq!(TensorType::Float32.encode(&[f32::MAX], &mut bytes), Ok(()));
    }
}
