//! Why an endpoint could not be opened, or a peer not be reached.

use std::io;
use std::net::SocketAddr;

use crate::reason::{Refusal, RefusalKind};

/// Why an endpoint could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The address cannot be had.
    #[error("cannot listen on {addr}: {source}")]
    Address {
        /// The address asked for.
        addr: SocketAddr,
        /// What the system said, for example that the port is in use.
        source: io::Error,
    },
    /// An option has a value that cannot work.
    #[error("transport options: {0}")]
    Options(&'static str),
    /// The name in the hello and the name in the certificate differ.
    #[error("process `{hello}` cannot use the certificate of `{certificate}`")]
    Name {
        /// The name in the hello.
        hello: String,
        /// The name in the certificate.
        certificate: String,
    },
    /// TLS does not take the identity.
    #[error("certificate of `{name}`: {source}")]
    Identity {
        /// The process's name.
        name: String,
        /// What TLS said.
        source: rustls::Error,
    },
}

/// Why a peer could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody listens there.
    #[error("cannot connect to `{name}` at {addr}: no process listens there")]
    NobodyThere {
        /// The process dialled.
        name: String,
        /// Its address.
        addr: SocketAddr,
    },
    /// The peer did not answer in time.
    #[error("cannot connect to `{name}` at {addr}: no answer")]
    TimedOut {
        /// The process dialled.
        name: String,
        /// Its address.
        addr: SocketAddr,
    },
    /// One side did not accept the other's certificate.
    #[error("cannot connect to `{name}` at {addr}: certificate not accepted: {detail}")]
    Certificate {
        /// The process dialled.
        name: String,
        /// Its address.
        addr: SocketAddr,
        /// What TLS said.
        detail: String,
    },
    /// The peer did not accept our hello.
    #[error("cannot connect to `{name}` at {addr}: refused by the peer: {refusal}")]
    RefusedByPeer {
        /// The process dialled.
        name: String,
        /// Its address.
        addr: SocketAddr,
        /// Why.
        refusal: Refusal,
    },
    /// We did not accept the peer's hello.
    #[error("cannot connect to `{name}` at {addr}: refused here: {refusal}")]
    RefusedHere {
        /// The process dialled.
        name: String,
        /// Its address.
        addr: SocketAddr,
        /// Why.
        refusal: Refusal,
    },
    /// Anything else.
    #[error("cannot connect to `{name}` at {addr}: {detail}")]
    Failed {
        /// The process dialled.
        name: String,
        /// Its address.
        addr: SocketAddr,
        /// What happened.
        detail: String,
    },
}

impl ConnectError {
    /// Whether dialling again later may succeed without anybody changing a configuration.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::NobodyThere { .. } | Self::TimedOut { .. } | Self::Failed { .. } => true,
            Self::Certificate { .. } => false,
            Self::RefusedByPeer { refusal, .. } | Self::RefusedHere { refusal, .. } => {
                matches!(refusal.kind, RefusalKind::Duplicate | RefusalKind::Stale)
            }
        }
    }
}
