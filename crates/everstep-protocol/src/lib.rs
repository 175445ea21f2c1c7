//! Pure state machines of the training step: leases, canonical reduction, decisions, views, epochs.
//!
//! std only: no clock, no I/O, no threads.

pub mod random;
