//! What can go wrong between this crate and libtorch.

use crate::Dtype;

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
pub enum TorchError {
    /// A device string that names no device.
    #[error("device `{given}` is not known; allowed: auto, cpu, cuda, cuda:N")]
    UnknownDevice {
        /// What was asked for.
        given: String,
    },
    /// A device that this machine or this process does not have.
    #[error("device `{given}` cannot be used: {reason}")]
    DeviceUnavailable {
        /// What was asked for.
        given: String,
        /// Why not.
        reason: String,
    },
    /// A thread count of 0.
    #[error("threads=`0` is not allowed; allowed: 1 or more")]
    NoThreads,
    /// Elements that lie outside the tensor.
    #[error(
        "elements {offset}..{end} lie outside the tensor; elements=`{elements}`",
        end = offset.saturating_add(*len)
    )]
    OutOfRange {
        /// First element of the range.
        offset: usize,
        /// Number of elements in the range.
        len: usize,
        /// Number of elements in the tensor.
        elements: usize,
    },
    /// A byte count that is no whole number of elements.
    #[error("{bytes} bytes are no whole number of {dtype} elements")]
    PartialElement {
        /// Number of bytes given.
        bytes: usize,
        /// Type of an element.
        dtype: Dtype,
    },
    /// A tensor that cannot be seen as a plain range of memory.
    #[error("the tensor is not contiguous or is neither float32 nor bfloat16")]
    NotPlain,
    /// What libtorch said.
    #[error("libtorch: {0}")]
    Libtorch(#[from] tch::TchError),
}
