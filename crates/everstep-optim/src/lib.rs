//! Parameter layout and blocks, canonical sums, AdamW and schedules on plain memory; no torch.
//!
//! Everything here gives the same bits on every machine: additions have a fixed order, nothing is contracted to fused
//! multiply-add, and transcendental functions come from `libm` (pure Rust) instead of the system's library.
//!
//! Start at [`TrainingNumerics`]: it is the arithmetic that the state machines of `everstep-protocol` run on.

#![cfg_attr(test, allow(clippy::unwrap_used))]

// Buffers are read and written as the little-endian bytes that travel and are stored.
#[cfg(target_endian = "big")]
compile_error!("everstep-optim supports little-endian targets only");

mod buffer;
mod config;
mod digest;
mod gradient;
mod init;
mod kernels;
mod layout;
mod matrix;
mod moments;
mod muon;
mod numerics;
mod parameters;
mod schedule;
mod state;

pub use buffer::{BufferError, FloatBuffer};
pub use config::{ConfigError, GroupConfig, OptimizerConfig};
pub use digest::{StateDigest, combine_digests};
pub use gradient::Gradient;
pub use layout::{Block, Init, Layout, LayoutError, ParameterSpec, Segment, Update};
pub use moments::MomentDtype;
pub use muon::MuonConfig;
pub use numerics::TrainingNumerics;
pub use parameters::{ComputeDtype, Parameters};
pub use schedule::Schedule;
pub use state::BlockState;
