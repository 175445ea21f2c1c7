//! Parameter layout and blocks, canonical sums, AdamW and schedules on plain memory; no torch.

mod layout;

pub use layout::{Block, Init, Layout, ParameterSpec};
