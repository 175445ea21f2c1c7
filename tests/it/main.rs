//! Real processes, real sockets, real signals: the `everstep` binary as its user starts it.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a test that cannot go on should say where"
)]

mod agent;
mod audit;
mod bad_input;
mod chaos;
mod checkpoints;
mod drain;
mod interchange;
mod kills;
mod leaders;
mod local_state;
mod machines;
mod network;
mod nodes;
mod notices;
mod policy;
mod power_loss;
mod programs;
mod resume;
mod s3;
mod store_faults;
mod support;
mod telemetry;
