//! What a run shows of itself: logs, traces, metrics, events and pictures.
//!
//! | file or sink | written by | for |
//! | --- | --- | --- |
//! | `logs/<process>.log` | [`init`] | reading |
//! | OTLP spans | [`init`], when `OTEL_EXPORTER_OTLP_ENDPOINT` is set | one trace per step, across processes |
//! | `events.jsonl` | [`EventLog`] | what happened: failures, recoveries, checkpoints |
//! | `metrics.jsonl` | [`MetricsLog`] | one object per committed step |
//! | `tensorboard/` | [`TensorBoard`] | curves |
//!
//! Nothing here may influence a number of the training: clocks are read only to be written down, and no call waits
//! for a network.
//!
//! **Invariant:** every record is handed to the kernel by one `write(2)` before the call returns, so a process that is
//! killed loses nothing that it has reported.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod context;
pub mod error;
pub mod events;
mod format;
pub mod goodput;
mod init;
mod jsonl;
pub mod metrics;
pub mod names;
mod otlp;
pub mod tensorboard;
pub mod testing;

pub use context::TraceContext;
pub use error::TelemetryError;
pub use events::{Event, EventLog, EventReader, EventRecord};
pub use goodput::{Goodput, SlotCounts};
pub use init::{Options, Telemetry, Terminal, init, log_path};
pub use jsonl::timestamp;
pub use metrics::{MetricsLog, StepMetrics};
pub use tensorboard::TensorBoard;
