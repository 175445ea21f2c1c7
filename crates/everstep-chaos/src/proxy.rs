//! Proxies that stand between processes, or between a process and its store, and misbehave on demand.

pub mod http;
pub mod link;
pub mod udp;
