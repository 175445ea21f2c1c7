//! libtorch: CUDA loading, devices, threads, what a strict run must find again, tensors as bytes, operations that its Rust binding lacks.
//!
//! Everything here is about the library itself; architectures and losses live in `everstep-model`.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod bytes;
mod cuda;
mod device;
mod dtype;
mod error;
pub mod fp8;
mod head;
mod library;
mod platform;
mod recompute;
mod threads;

pub use cuda::{CudaLoad, load_cuda};
pub use device::{DeviceKind, select_device};
pub use dtype::Dtype;
pub use error::TorchError;
pub use head::{CrossEntropies, cross_entropies};
pub use platform::Platform;
pub use recompute::recomputed;
pub use threads::pin_threads;
