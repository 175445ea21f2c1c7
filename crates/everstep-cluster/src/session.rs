//! Control sessions: `ractor_cluster` over the control stream of each QUIC connection.
//!
//! Every process has one gateway actor, in a process group named after the process and its life; the cluster session makes
//! it known to the peers, where it stands as a remote actor. What is cast to it are our own envelopes (`wire`), so that ractor's
//! tags carry no meaning and nothing is decoded before it is validated.
//!
//! This module is the only one that uses ractor 0.16 (`ractor_remote`); see ARCHITECTURE.md, "Two ractors".

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::{Arc, OnceLock, Weak};

use bytes::Bytes;
use ractor_cluster::{BoxRead, BoxWrite, ClusterBidiStream, NodeServer, NodeServerMessage};
use ractor_remote::{Actor, ActorProcessingErr, ActorRef, pg};

use crate::router::Router;
use crate::wire;

const SCOPE: &str = "everstep";

/// The sessions of one process. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Sessions {
    node_server: ActorRef<NodeServerMessage>,
    gateway: ActorRef<Vec<u8>>,
    router: Arc<OnceLock<Weak<Router>>>,
}

impl std::fmt::Debug for Sessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sessions").finish_non_exhaustive()
    }
}

/// Why sessions could not be started.
#[derive(Debug, thiserror::Error)]
#[error("control sessions could not start: {0}")]
pub(crate) struct SessionError(String);

impl Sessions {
    /// Starts the node server and the gateway of this process.
    ///
    /// # Errors
    /// The actors could not be spawned.
    pub(crate) async fn start(
        process: u32,
        incarnation: u64,
        name: &str,
        cookie: String,
    ) -> Result<Self, SessionError> {
        let failed = |error: &dyn std::fmt::Display| SessionError(error.to_string());
        // The node server insists on a TCP listener of its own. It gets a loopback address and a free port; whoever connects there must
        // know the cookie, and nobody is told the port.
        let server = NodeServer::new(
            0,
            cookie,
            format!("{name}#{incarnation}"),
            "everstep".to_owned(),
            None,
            None,
        )
        .with_listen_addr(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let (node_server, _) = Actor::spawn(None, server, ())
            .await
            .map_err(|e| failed(&e))?;
        let router: Arc<OnceLock<Weak<Router>>> = Arc::default();
        let (gateway, _) = Actor::spawn(None, Gateway, router.clone())
            .await
            .map_err(|e| failed(&e))?;
        pg::join_scoped(
            SCOPE.to_owned(),
            group(process, incarnation),
            vec![gateway.get_cell()],
        );
        Ok(Self {
            node_server,
            gateway,
            router,
        })
    }

    /// Where received envelopes go. Set once.
    pub(crate) fn attach(&self, router: &Arc<Router>) {
        let _ = self.router.set(Arc::downgrade(router));
    }

    /// Runs a session on the control stream of a new connection.
    pub(crate) fn open(&self, peer: String, halves: (BoxRead, BoxWrite), is_server: bool) {
        let stream = Box::new(ControlStream { peer, halves });
        if self
            .node_server
            .cast(NodeServerMessage::ConnectionOpenedExternal { stream, is_server })
            .is_err()
        {
            tracing::error!(
                "the node server is gone; the connection stays without control session"
            );
        }
    }

    /// Casts an envelope to a peer's gateway. Dropped if its session is not ready: the step protocol says it again.
    pub(crate) fn send(&self, process: u32, incarnation: u64, envelope: Bytes) {
        for cell in pg::get_scoped_members(&SCOPE.to_owned(), &group(process, incarnation)) {
            let gateway: ActorRef<Vec<u8>> = cell.into();
            if gateway.cast(envelope.to_vec()).is_err() {
                tracing::debug!(process, "control message dropped: the session is closing");
            }
        }
    }

    /// Ends all sessions.
    pub(crate) fn stop(&self) {
        self.gateway.stop(None);
        self.node_server.stop(None);
    }
}

const SECRET_FILE: &str = "session.secret";

/// Makes the secret that sessions of one cluster share, unless it is there.
///
/// # Errors
/// The file cannot be written.
pub fn make_secret(tls: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let options = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(tls.join(SECRET_FILE));
    let mut file = match options {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Ok(()),
        other => other?,
    };
    let mut bytes = [0u8; 32];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    file.write_all(blake3::Hash::from_bytes(bytes).to_hex().as_bytes())
}

/// Reads the sessions' secret.
///
/// # Errors
/// Names the file.
pub(crate) fn read_secret(tls: &Path) -> Result<String, SessionError> {
    let file = tls.join(SECRET_FILE);
    std::fs::read_to_string(&file)
        .map_err(|error| SessionError(format!("{}: {error}", file.display())))
}

fn group(process: u32, incarnation: u64) -> String {
    format!("process-{process}#{incarnation}")
}

struct ControlStream {
    peer: String,
    halves: (BoxRead, BoxWrite),
}

impl ClusterBidiStream for ControlStream {
    fn split(self: Box<Self>) -> (BoxRead, BoxWrite) {
        self.halves
    }

    fn peer_label(&self) -> Option<String> {
        Some(self.peer.clone())
    }
}

struct Gateway;

impl Actor for Gateway {
    type Msg = Vec<u8>;
    type State = Arc<OnceLock<Weak<Router>>>;
    type Arguments = Arc<OnceLock<Weak<Router>>>;

    async fn pre_start(
        &self,
        _myself: ActorRef<Vec<u8>>,
        router: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(router)
    }

    async fn handle(
        &self,
        _myself: ActorRef<Vec<u8>>,
        envelope: Vec<u8>,
        router: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        let Some(router) = router.get().and_then(Weak::upgrade) else {
            return Ok(());
        };
        match wire::decode_control(&envelope) {
            Ok((envelope, message)) => router.receive(envelope, message),
            Err(error) => tracing::warn!(%error, "control message refused"),
        }
        Ok(())
    }
}
