//! Two or more endpoints over real sockets on loopback.
#![allow(clippy::unwrap_used)]

mod frames;
mod killed;
mod refusals;
mod support;
