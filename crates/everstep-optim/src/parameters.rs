//! Parameters as workers read them: in compute dtype, as bytes that are shared and sent without copying.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::buffer::{BufferError, FloatBuffer};
use crate::kernels;
use crate::moments::{Bfloat16, Moment};

/// Type that workers compute in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ComputeDtype {
    /// IEEE single precision.
    #[default]
    #[serde(rename = "float32", alias = "f32")]
    Float32,
    /// The upper half of single precision, rounded to nearest, ties to even.
    #[serde(rename = "bfloat16", alias = "bf16")]
    Bfloat16,
}

impl ComputeDtype {
    /// Bytes of an element.
    pub fn element_bytes(self) -> usize {
        match self {
            Self::Float32 => 4,
            Self::Bfloat16 => 2,
        }
    }
}

/// One block of parameters in compute dtype. Clones share memory.
#[derive(Clone, PartialEq, Eq)]
pub struct Parameters {
    memory: Memory,
}

#[derive(Clone, PartialEq, Eq)]
enum Memory {
    Float32(FloatBuffer),
    /// Little-endian, whole elements.
    Bfloat16(Bytes),
}

impl Parameters {
    /// Converts master parameters; `Float32` shares their memory.
    pub fn from_master(master: &FloatBuffer, dtype: ComputeDtype) -> Self {
        let memory = match dtype {
            ComputeDtype::Float32 => Memory::Float32(master.clone()),
            ComputeDtype::Bfloat16 => Memory::Bfloat16(Bytes::from_owner(Bfloat16Bytes(
                kernels::to_bfloat16(master.as_slice()),
            ))),
        };
        Self { memory }
    }

    /// Received parameters: little-endian elements of `dtype`. Keeps `bytes` (a misaligned `Float32` block is copied).
    ///
    /// # Errors
    /// [`BufferError::PartialElement`] if the bytes end inside an element.
    pub fn from_bytes(dtype: ComputeDtype, bytes: Bytes) -> Result<Self, BufferError> {
        let (num_bytes, element_bytes) = (bytes.len(), dtype.element_bytes());
        let memory = match dtype {
            ComputeDtype::Float32 => Memory::Float32(FloatBuffer::from_bytes(bytes)?),
            ComputeDtype::Bfloat16 if !num_bytes.is_multiple_of(element_bytes) => {
                return Err(BufferError::PartialElement {
                    num_bytes,
                    element_bytes,
                });
            }
            ComputeDtype::Bfloat16 => Memory::Bfloat16(bytes),
        };
        Ok(Self { memory })
    }

    /// Type of the elements.
    pub fn dtype(&self) -> ComputeDtype {
        match self.memory {
            Memory::Float32(_) => ComputeDtype::Float32,
            Memory::Bfloat16(_) => ComputeDtype::Bfloat16,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.as_bytes().len() / self.dtype().element_bytes()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.as_bytes().is_empty()
    }

    /// The elements as little-endian bytes.
    pub fn as_bytes(&self) -> &[u8] {
        match &self.memory {
            Memory::Float32(values) => values.as_bytes(),
            Memory::Bfloat16(bytes) => bytes,
        }
    }

    /// The elements as little-endian bytes that share this block's memory, to be sent.
    pub fn to_bytes(&self) -> Bytes {
        match &self.memory {
            Memory::Float32(values) => values.to_bytes(),
            Memory::Bfloat16(bytes) => bytes.clone(),
        }
    }

    /// The elements widened to `f32`; no copy if they are.
    pub fn to_float32(&self) -> Cow<'_, [f32]> {
        match &self.memory {
            Memory::Float32(values) => Cow::Borrowed(values.as_slice()),
            Memory::Bfloat16(bytes) => Cow::Owned(
                bytes
                    .chunks_exact(2)
                    .map(|pair| Bfloat16::from_le_bytes([pair[0], pair[1]]).load())
                    .collect(),
            ),
        }
    }

    /// Checks that there are `expected` elements of this type; for parameters that come from peers.
    ///
    /// # Errors
    /// [`BufferError::Length`] or [`BufferError::Dtype`] if not.
    pub(crate) fn check(&self, expected: usize, dtype: ComputeDtype) -> Result<(), BufferError> {
        match self.len() {
            actual if actual != expected => Err(BufferError::Length { expected, actual }),
            _ if self.dtype() != dtype => Err(BufferError::Dtype {
                expected: dtype,
                actual: self.dtype(),
            }),
            _ => Ok(()),
        }
    }
}

/// Prints type and size, not the values.
impl fmt::Debug for Parameters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Parameters({:?}, {} elements)", self.dtype(), self.len())
    }
}

struct Bfloat16Bytes(Vec<u16>);

impl AsRef<[u8]> for Bfloat16Bytes {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn float32_shares_the_master_memory() {
        let master = FloatBuffer::from(vec![1.0, -2.5]);
        let parameters = Parameters::from_master(&master, ComputeDtype::Float32);
        assert_eq!(parameters.as_bytes().as_ptr(), master.as_bytes().as_ptr());
        assert_eq!(parameters.to_float32().as_ref(), [1.0, -2.5]);
        assert_eq!((parameters.len(), parameters.is_empty()), (2, false));
    }

    #[test]
    fn bfloat16_rounds_to_nearest_even() {
        let cases: [(u32, u16); 11] = [
            (0x3f80_0000, 0x3f80), // 1
            (0x3f80_8000, 0x3f80), // a tie goes to the even neighbour below,
            (0x3f81_8000, 0x3f82), // or above
            (0x3f80_8001, 0x3f81),
            (0x3f80_7fff, 0x3f80),
            (0x8000_0000, 0x8000), // -0
            (0x7f7f_ffff, 0x7f80), // the largest float overflows
            (0xff80_0000, 0xff80), // -infinity
            (0x7f80_0001, 0x7fc0), // every NaN is the quiet one: its payload is not reproducible
            (0xffff_ffff, 0x7fc0),
            (0x0000_8001, 0x0001), // subnormal
        ];
        // Many, so that the vectorised loop and its tail are both used.
        let master: Vec<f32> = cases
            .iter()
            .cycle()
            .take(123)
            .map(|case| f32::from_bits(case.0))
            .collect();
        let expected: Vec<u8> = cases
            .iter()
            .cycle()
            .take(123)
            .flat_map(|case| case.1.to_le_bytes())
            .collect();
        let parameters = Parameters::from_master(&master.into(), ComputeDtype::Bfloat16);
        assert_eq!(parameters.as_bytes(), expected);
        assert_eq!(parameters.len(), 123);
        let received =
            Parameters::from_bytes(ComputeDtype::Bfloat16, parameters.to_bytes()).unwrap();
        assert_eq!(received, parameters);
        assert_eq!(received.to_float32()[3].to_bits(), 0x3f81_0000);
    }

    #[test]
    fn wrong_sizes_are_refused() {
        let odd = Bytes::from_static(&[0; 5]);
        for dtype in [ComputeDtype::Float32, ComputeDtype::Bfloat16] {
            assert!(Parameters::from_bytes(dtype, odd.clone()).is_err());
        }
        let parameters =
            Parameters::from_bytes(ComputeDtype::Bfloat16, Bytes::from_static(&[0; 6])).unwrap();
        let [narrow, wide] = [ComputeDtype::Bfloat16, ComputeDtype::Float32];
        assert_eq!(parameters.check(3, narrow), Ok(()));
        assert_eq!(
            parameters.check(4, narrow),
            Err(BufferError::Length {
                expected: 4,
                actual: 3
            })
        );
        assert_eq!(
            parameters.check(3, wide),
            Err(BufferError::Dtype {
                expected: wide,
                actual: narrow
            })
        );
    }
}
