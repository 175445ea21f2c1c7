//! Proxies that stand between processes, or between a process and its store, and misbehave on demand.

pub mod link;
pub mod udp;
