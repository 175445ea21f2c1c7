//! From text files to token batches: sources, tokenizers, packed token shards and the deterministic order.
//!
//! ```text
//! DataConfig ── prepare ──▶ tokenizer.json, train-*.tokens, validation-*.tokens, dataset.json
//!                                      │
//!                           Dataset::open, order(seed, …) ── batch(order, t, v) ──▶ TokenBatch
//! ```
//!
//! Two rules carry the rest of the product. What a folder holds is a pure function of the configuration and of the
//! bytes of the source files: neither the number of threads nor the order in which files are read matters. Which
//! tokens slot `v` of step `t` sees is a pure function of `(dataset, seed, t, v)`: any process can compute it.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod batch;
mod config;
mod dataset;
mod error;
mod fill_in;
mod folder;
mod manifest;
mod mapped;
mod order;
mod permutation;
mod prepare;
mod shard;
mod source;
mod tokenizer;
mod tokenizer_build;
mod validation;

pub use batch::{IGNORED, TokenBatch};
pub use config::{DataConfig, TokenizerConfig, TokenizerKind};
pub use dataset::Dataset;
pub use error::{DataError, ErrorKind};
pub use fill_in::FillIn;
pub use manifest::{
    DatasetManifest, ShardManifest, SourceManifest, SplitManifest, TokenizerManifest,
};
pub use order::{Sample, SampleOrder};
pub use permutation::Permutation;
pub use prepare::{open_or_prepare, prepare};
pub use shard::Split;
pub use tokenizer::Tokenizer;
pub use validation::ValidationWindows;
