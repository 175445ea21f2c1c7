//! The bytes between processes: one QUIC connection per pair, mutually authenticated by a cluster CA.
//!
//! A connection carries one bidirectional *control stream* (whatever byte protocol the caller puts on it) and any
//! number of *frames*: an opaque header, an opaque payload and a checksum, each on a unidirectional stream of its
//! own. The control stream has priority, so a link that is full of tensors is never taken for a dead peer. Between processes of one machine,
//! frames may go through shared memory instead (`lane.rs`).
//!
//! ```text
//! ClusterCa ── issues ──▶ Identity ── bind ──▶ Endpoint ── connect / accept ──▶ Connection
//!                                                                                ├─ control()       once
//!                                                                                ├─ send() / recv() frames
//!                                                                                └─ closed()        why it ended
//! Unix socket ── LaneSender / LaneReceiver ── frames within a machine
//! ```
//!
//! **Invariant:** this crate knows neither the actors nor the messages; it depends on no other crate of the workspace.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod certs;
mod congestion;
mod connection;
mod endpoint;
mod frame;
mod hello;
mod identity;
mod lane;
mod liveness;
mod options;
mod peers;
mod reason;

pub use certs::{CertError, ClusterCa};
pub use connection::{BoxRead, BoxWrite, Connection, Payload, RecvError, SendError};
pub use endpoint::{BindError, ConnectError, Endpoint};
pub use frame::{Frame, FrameDecoder, FrameError, FrameLimits, HEADER_BYTES_MAX, encode_frame};
pub use hello::{Hello, HelloError, WIRE_VERSION};
pub use identity::Identity;
pub use lane::{LaneHello, LaneReceiver, LaneSender};
pub use options::TransportOptions;
pub use reason::{CloseReason, Refusal, RefusalKind};

/// The TLS application protocol of Everstep; a peer that offers another is refused in the TLS handshake.
pub const ALPN: &[u8] = b"everstep/1";
