//! A process's UDP socket: it listens and dials, and lets nobody in whom the cluster CA does not know.

mod error;
mod socket;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ServerConfig, TokioRuntime};
use rustls_pki_types::CertificateDer;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;

pub use self::error::{BindError, ConnectError};
use self::socket::{endpoint_config, socket};
use crate::connection::Connection;
use crate::hello::{Hello, HelloError, read_hello, write_hello};
use crate::identity::{Identity, certificate_names};
use crate::liveness::port_closed;
use crate::options::TransportOptions;
use crate::peers::{Dialled, Link, Peers};
use crate::reason::{CloseReason, Refusal, RefusalKind};

/// Accepted connections that wait for [`Endpoint::accept`]; more wait in QUIC.
const ACCEPTED_MAX: usize = 64;
/// Handshakes under way at once; connection attempts beyond wait in QUIC.
const HANDSHAKES_MAX: usize = 256;

/// A process's UDP socket. Clones share it; when the last clone is dropped it stops to listen, and its connections live on.
#[derive(Clone)]
pub struct Endpoint {
    shared: Arc<Shared>,
    accepted: Arc<Accepted>,
}

struct Accepted {
    connections: Mutex<mpsc::Receiver<Connection>>,
    /// Runs the handshakes; ends with the endpoint.
    _tasks: JoinSet<()>,
}

struct Shared {
    quinn: quinn::Endpoint,
    hello: Hello,
    options: TransportOptions,
    client: Arc<QuicClientConfig>,
    server: Arc<QuicServerConfig>,
    peers: Peers,
    window_bytes: u64,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint")
            .field("hello", &self.shared.hello)
            .finish_non_exhaustive()
    }
}

impl Endpoint {
    /// Opens the socket and starts to listen. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`BindError`], which names the address if that is the trouble.
    pub fn bind(
        addr: SocketAddr,
        identity: &Identity,
        hello: Hello,
        options: TransportOptions,
    ) -> Result<Self, BindError> {
        if let Some(problem) = options.problem() {
            return Err(BindError::Options(problem));
        }
        if hello.name != identity.name() {
            return Err(BindError::Name {
                hello: hello.name,
                certificate: identity.name().to_owned(),
            });
        }
        let bad_identity = |source| BindError::Identity {
            name: identity.name().to_owned(),
            source,
        };
        let client = Arc::new(identity.client_config().map_err(bad_identity)?);
        let server = Arc::new(identity.server_config().map_err(bad_identity)?);
        let bad_address = |source| BindError::Address { addr, source };
        let (socket, window_bytes) = socket(addr, &options).map_err(bad_address)?;
        let listener = server_config(&server, &options, addr, window_bytes);
        let quinn = quinn::Endpoint::new(
            endpoint_config(identity.reset_secret()),
            Some(listener),
            socket.into(),
            Arc::new(TokioRuntime),
        )
        .map_err(bad_address)?;
        let shared = Arc::new(Shared {
            quinn,
            hello,
            options,
            client,
            server,
            peers: Peers::default(),
            window_bytes,
        });
        let (queue, connections) = mpsc::channel(ACCEPTED_MAX);
        let mut tasks = JoinSet::new();
        tasks.spawn(accept_all(Arc::clone(&shared), queue));
        let accepted = Arc::new(Accepted {
            connections: Mutex::new(connections),
            _tasks: tasks,
        });
        Ok(Self { shared, accepted })
    }

    /// The address that the socket has, with the port that the system chose if 0 was asked for.
    ///
    /// # Errors
    /// What the system says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.shared.quinn.local_addr()
    }

    /// What this process says of itself.
    pub fn hello(&self) -> &Hello {
        &self.shared.hello
    }

    /// Dials the process `name`, whose certificate must be for that name.
    ///
    /// There is one connection per pair of processes: a connection to the same process that exists already is replaced
    /// (its [`closed`](Connection::closed) says [`CloseReason::Superseded`]). If both sides dial at the same time, both
    /// keep the connection that the process with the smaller name dialled, and the other dialler gets
    /// [`RefusalKind::Duplicate`] or sees its connection superseded; it then finds the right one in
    /// [`accept`](Self::accept). Do not dial the same process twice at the same time.
    ///
    /// Cancel-safe: a call that is dropped leaves no connection behind.
    ///
    /// # Errors
    /// [`ConnectError`], which names the process and its address; [`ConnectError::is_transient`] says whether to try again.
    pub async fn connect(&self, addr: SocketAddr, name: &str) -> Result<Connection, ConnectError> {
        let shared = &self.shared;
        let result = tokio::select! {
            result = tokio::time::timeout(shared.options.handshake_timeout, shared.dial(addr, name)) => result,
            () = port_closed(addr, shared.options.probe_interval) => {
                return Err(ConnectError::NobodyThere { name: name.to_owned(), addr });
            }
        };
        let name = name.to_owned();
        match result {
            Err(_elapsed) => Err(ConnectError::TimedOut { name, addr }),
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(Failure::Here(refusal))) => Err(ConnectError::RefusedHere {
                name,
                addr,
                refusal,
            }),
            Ok(Err(Failure::Other(detail))) => Err(ConnectError::Failed { name, addr, detail }),
            Ok(Err(Failure::Connection(error))) => Err(match CloseReason::from(error) {
                CloseReason::TimedOut => ConnectError::TimedOut { name, addr },
                CloseReason::Refused(refusal) => ConnectError::RefusedByPeer {
                    name,
                    addr,
                    refusal,
                },
                CloseReason::Certificate(detail) => {
                    ConnectError::Certificate { name, addr, detail }
                }
                reason => ConnectError::Failed {
                    name,
                    addr,
                    detail: reason.to_string(),
                },
            }),
        }
    }

    /// The next peer that has dialled us and whose certificate and hello are good; others are logged and sent away.
    /// `None` after [`close`](Self::close).
    ///
    /// Cancel-safe. Slow or hostile peers do not hold others up.
    pub async fn accept(&self) -> Option<Connection> {
        self.accepted.connections.lock().await.recv().await
    }

    /// Closes all connections and waits until the peers have been told (or cannot be).
    pub async fn close(&self) {
        self.shared.quinn.close(CloseReason::Local.to_wire().0, b"");
        self.shared.quinn.wait_idle().await;
    }
}

/// Why a handshake did not end in a connection.
enum Failure {
    Connection(quinn::ConnectionError),
    Here(Refusal),
    Other(String),
}

impl From<HelloError> for Failure {
    fn from(error: HelloError) -> Self {
        match error {
            HelloError::Refused(refusal) => Self::Here(refusal),
            HelloError::Early => Self::Other(error.to_string()),
            HelloError::Connection(error) => Self::Connection(error),
        }
    }
}

impl From<quinn::ConnectionError> for Failure {
    fn from(error: quinn::ConnectionError) -> Self {
        Self::Connection(error)
    }
}

/// Closes a connection whose handshake is given up, because the table of peers would keep it open.
struct CloseUnlessKept(Option<Link>);

impl CloseUnlessKept {
    fn link(&self) -> &Link {
        self.0
            .as_ref()
            .expect("only `keep` empties the guard, and it is the last call")
    }

    fn keep(&mut self) -> Link {
        self.0.take().expect("`keep` is called once")
    }
}

impl Drop for CloseUnlessKept {
    fn drop(&mut self) {
        if let Some(link) = &self.0 {
            link.close(CloseReason::Local);
        }
    }
}

impl Shared {
    async fn dial(&self, addr: SocketAddr, name: &str) -> Result<Connection, Failure> {
        let mut config = quinn::ClientConfig::new(
            Arc::clone(&self.client) as Arc<dyn quinn::crypto::ClientConfig>
        );
        config.transport_config(self.options.quic(addr, self.window_bytes));
        let connecting = self
            .quinn
            .connect_with(config, addr, name)
            .map_err(|error| Failure::Other(error.to_string()))?;
        let guard = CloseUnlessKept(Some(Link::new(connecting.await?)));
        let link = guard.link();
        let result = async {
            let (mut write, mut read) = link.quinn.open_bi().await?;
            write_hello(&mut write, &self.hello).await?;
            let peer = read_hello(&mut read).await?;
            if peer.name != name {
                return Err(Failure::Here(wrong_name(&peer.name, name)));
            }
            self.check(&peer, Dialled::ByUs, link)?;
            Ok((peer, read, write))
        };
        let result = result.await;
        self.finish(guard, result)
    }

    async fn answer(&self, incoming: quinn::Incoming) -> Result<Connection, Failure> {
        let config = server_config(
            &self.server,
            &self.options,
            incoming.remote_address(),
            self.window_bytes,
        );
        let guard = CloseUnlessKept(Some(Link::new(
            incoming.accept_with(Arc::new(config))?.await?,
        )));
        let link = guard.link();
        let result = async {
            let (mut write, mut read) = link.quinn.accept_bi().await?;
            let peer = read_hello(&mut read).await?;
            let identity = link
                .quinn
                .peer_identity()
                .and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
            let certified = identity
                .as_ref()
                .and_then(|chain| chain.first())
                .is_some_and(|certificate| certificate_names(certificate, &peer.name));
            if !certified {
                return Err(Failure::Here(wrong_name(
                    &peer.name,
                    "the one in its certificate",
                )));
            }
            self.check(&peer, Dialled::ByPeer, link)?;
            write_hello(&mut write, &self.hello).await?;
            Ok((peer, read, write))
        };
        let result = result.await;
        self.finish(guard, result)
    }

    fn check(&self, peer: &Hello, dialled: Dialled, link: &Link) -> Result<(), Failure> {
        peer.check_run(&self.hello).map_err(Failure::Here)?;
        if peer.name == self.hello.name {
            return Err(Failure::Here(wrong_name(
                &peer.name,
                "another than this process's",
            )));
        }
        self.peers
            .admit(&self.hello.name, peer, dialled, link)
            .map_err(Failure::Here)
    }

    fn finish(
        &self,
        mut guard: CloseUnlessKept,
        result: Result<(Hello, quinn::RecvStream, quinn::SendStream), Failure>,
    ) -> Result<Connection, Failure> {
        match result {
            Ok((peer, read, write)) => Ok(Connection::start(
                guard.keep(),
                peer,
                &self.options,
                (read, write),
            )),
            Err(failure) => {
                // The peer is told why, so that both sides can log it.
                if let Failure::Here(refusal) = &failure {
                    guard.link().close(CloseReason::Refused(refusal.clone()));
                }
                Err(failure)
            }
        }
    }
}

async fn accept_all(shared: Arc<Shared>, queue: mpsc::Sender<Connection>) {
    let mut handshakes = JoinSet::new();
    loop {
        while handshakes.len() >= HANDSHAKES_MAX {
            handshakes.join_next().await;
        }
        let Some(incoming) = shared.quinn.accept().await else {
            break;
        };
        let (shared, queue) = (Arc::clone(&shared), queue.clone());
        handshakes.spawn(async move {
            let addr = incoming.remote_address();
            match tokio::time::timeout(shared.options.handshake_timeout, shared.answer(incoming)).await {
                // Fails only when the endpoint is gone, and the connection closes with it.
                Ok(Ok(connection)) => drop(queue.send(connection).await),
                Ok(Err(Failure::Here(refusal))) => tracing::warn!(%addr, %refusal, "refused a peer"),
                Ok(Err(Failure::Connection(error))) => {
                    tracing::warn!(%addr, error = %CloseReason::from(error), "a peer failed to connect");
                }
                Ok(Err(Failure::Other(error))) => tracing::warn!(%addr, %error, "a peer failed to connect"),
                Err(_elapsed) => tracing::warn!(%addr, "a peer took too long to say hello"),
            }
        });
        while handshakes.try_join_next().is_some() {}
    }
}

fn wrong_name(said: &str, expected: &str) -> Refusal {
    Refusal {
        kind: RefusalKind::Name,
        text: format!("process name `{said}`, expected {expected}"),
    }
}

fn server_config(
    server: &Arc<QuicServerConfig>,
    options: &TransportOptions,
    peer: SocketAddr,
    window_bytes: u64,
) -> ServerConfig {
    let mut config =
        ServerConfig::with_crypto(Arc::clone(server) as Arc<dyn quinn::crypto::ServerConfig>);
    config
        .transport_config(options.quic(peer, window_bytes))
        .migration(false);
    config
}
