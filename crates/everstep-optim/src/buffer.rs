//! Float vectors that are shared without copying, whether they were made here or arrived from a peer.

use std::fmt;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use thiserror::Error;

use crate::kernels;
use crate::parameters::ComputeDtype;

/// A shared vector of `f32`. Clones share memory; [`FloatBuffer::make_mut`] copies only what is still shared.
///
/// Holds either a vector of this process or the bytes of a received frame, little-endian, without copying either.
#[derive(Clone)]
pub struct FloatBuffer {
    memory: Memory,
}

#[derive(Clone)]
enum Memory {
    Local(Arc<Vec<f32>>),
    /// Whole, aligned elements: [`FloatBuffer::from_bytes`] lets nothing else in.
    Received(Bytes),
}

/// Why bytes are not the values that were asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BufferError {
    /// The bytes end inside an element.
    #[error("{num_bytes} bytes are not a whole number of elements of {element_bytes} bytes")]
    PartialElement {
        /// Bytes given.
        num_bytes: usize,
        /// Bytes of an element.
        element_bytes: usize,
    },
    /// The block has another size.
    #[error("{actual} elements given, the block has {expected}")]
    Length {
        /// Elements of the block.
        expected: usize,
        /// Elements given.
        actual: usize,
    },
    /// The block has another type.
    #[error("elements of {actual:?} given, the block has {expected:?}")]
    Dtype {
        /// Type of the block.
        expected: ComputeDtype,
        /// Type given.
        actual: ComputeDtype,
    },
}

impl FloatBuffer {
    /// The values in `bytes`, little-endian. Keeps `bytes` if it is aligned to four bytes, else copies.
    ///
    /// # Errors
    /// [`BufferError::PartialElement`] if the length is not a multiple of four.
    pub fn from_bytes(bytes: Bytes) -> Result<Self, BufferError> {
        let element_bytes = size_of::<f32>();
        if !bytes.len().is_multiple_of(element_bytes) {
            return Err(BufferError::PartialElement {
                num_bytes: bytes.len(),
                element_bytes,
            });
        }
        let memory = match bytemuck::try_cast_slice::<u8, f32>(&bytes) {
            Ok(_) => Memory::Received(bytes),
            Err(_) => Memory::Local(Arc::new(bytemuck::allocation::pod_collect_to_vec(&bytes))),
        };
        Ok(Self { memory })
    }

    /// The values.
    pub fn as_slice(&self) -> &[f32] {
        match &self.memory {
            Memory::Local(values) => values,
            Memory::Received(bytes) => bytemuck::cast_slice(bytes),
        }
    }

    /// The values as little-endian bytes.
    pub fn as_bytes(&self) -> &[u8] {
        match &self.memory {
            Memory::Local(values) => bytemuck::cast_slice(values),
            Memory::Received(bytes) => bytes,
        }
    }

    /// The values as little-endian bytes that share this buffer's memory, to be sent or stored.
    pub fn to_bytes(&self) -> Bytes {
        match &self.memory {
            Memory::Local(values) => Bytes::from_owner(LocalBytes(Arc::clone(values))),
            Memory::Received(bytes) => bytes.clone(),
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.as_slice().len()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values, to be changed: copied first if anybody shares them, or if they lie in a received frame.
    pub fn make_mut(&mut self) -> &mut [f32] {
        if let Memory::Received(bytes) = &self.memory {
            self.memory = Memory::Local(Arc::new(bytemuck::allocation::pod_collect_to_vec(bytes)));
        }
        match &mut self.memory {
            Memory::Local(values) => Arc::make_mut(values).as_mut_slice(),
            Memory::Received(_) => unreachable!("received memory was just copied"),
        }
    }

    /// The values as a vector; copies only what is shared or received.
    pub fn into_vec(self) -> Vec<f32> {
        match self.memory {
            Memory::Local(values) => Arc::unwrap_or_clone(values),
            Memory::Received(bytes) => bytemuck::allocation::pod_collect_to_vec(&bytes),
        }
    }

    /// The element-wise sum, in the memory of whichever side nobody else holds, else in new memory. Both sides must have
    /// the same length.
    pub(crate) fn add(self, right: Self) -> Self {
        match self.try_unique() {
            Ok(mut left) => {
                kernels::add_assign(left.as_mut_slice(), right.as_slice());
                left.share()
            }
            // Addition commutes to the bit (but for the payload of NaN, which no decision lets in).
            Err(left) => match right.try_unique() {
                Ok(mut right) => {
                    kernels::add_assign(right.as_mut_slice(), left.as_slice());
                    right.share()
                }
                Err(right) => kernels::add(left.as_slice(), right.as_slice()).into(),
            },
        }
    }

    fn try_unique(self) -> Result<UniqueBuffer, Self> {
        match self.memory {
            Memory::Local(mut values) => match Arc::get_mut(&mut values) {
                Some(_) => Ok(UniqueBuffer::Local(values)),
                None => Err(Self {
                    memory: Memory::Local(values),
                }),
            },
            Memory::Received(bytes) => match bytes.try_into_mut() {
                Ok(bytes) => Ok(UniqueBuffer::Received(bytes)),
                Err(bytes) => Err(Self {
                    memory: Memory::Received(bytes),
                }),
            },
        }
    }
}

/// A buffer that nobody else holds.
enum UniqueBuffer {
    Local(Arc<Vec<f32>>),
    Received(BytesMut),
}

impl UniqueBuffer {
    fn as_mut_slice(&mut self) -> &mut [f32] {
        match self {
            Self::Local(values) => Arc::get_mut(values).expect("nobody else holds it"),
            Self::Received(bytes) => bytemuck::cast_slice_mut(bytes),
        }
    }

    fn share(self) -> FloatBuffer {
        let memory = match self {
            Self::Local(values) => Memory::Local(values),
            Self::Received(bytes) => Memory::Received(bytes.freeze()),
        };
        FloatBuffer { memory }
    }
}

struct LocalBytes(Arc<Vec<f32>>);

impl AsRef<[u8]> for LocalBytes {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

impl From<Vec<f32>> for FloatBuffer {
    fn from(values: Vec<f32>) -> Self {
        Self::from(Arc::new(values))
    }
}

impl From<Arc<Vec<f32>>> for FloatBuffer {
    fn from(values: Arc<Vec<f32>>) -> Self {
        Self {
            memory: Memory::Local(values),
        }
    }
}

/// Equal bits, so that a NaN equals itself and the two zeros differ.
impl PartialEq for FloatBuffer {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

impl Eq for FloatBuffer {}

/// Prints the size, not the values: there may be millions.
impl fmt::Debug for FloatBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.memory {
            Memory::Local(_) => "local",
            Memory::Received(_) => "received",
        };
        write!(f, "FloatBuffer({kind}, {} elements)", self.len())
    }
}

#[cfg(test)]
mod tests;
