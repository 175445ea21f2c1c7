//! A process's UDP socket: it listens and dials, and lets nobody in whom the cluster CA does not know.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::crypto::{CryptoError, HmacKey};
use quinn::{EndpointConfig, ServerConfig, TokioRuntime};
use quinn_proto::HashedConnectionIdGenerator;
use rustls_pki_types::CertificateDer;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;

use crate::connection::Connection;
use crate::hello::{Hello, HelloError, read_hello, write_hello};
use crate::identity::{Identity, certificate_names};
use crate::liveness::port_closed;
use crate::options::TransportOptions;
use crate::peers::{Dialled, Link, Peers};
use crate::reason::{CloseReason, Refusal, RefusalKind};

/// Largest UDP payload there is.
const UDP_PAYLOAD_BYTES_MAX: u16 = 65_527;
/// Accepted connections that wait for [`Endpoint::accept`]; more wait in QUIC.
const ACCEPTED_MAX: usize = 64;
/// Handshakes under way at once; connection attempts beyond wait in QUIC.
const HANDSHAKES_MAX: usize = 256;

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

/// Stateless resets and connection ids come from a secret that outlives the process: when it restarts on the same port,
/// packets for its predecessor are answered with a reset that the peer believes.
fn endpoint_config(secret: [u8; 32]) -> EndpointConfig {
    let mut config = EndpointConfig::new(Arc::new(ResetKey(secret)));
    let [c0, c1, c2, c3, c4, c5, c6, c7, ..] =
        blake3::derive_key("everstep-transport 1 connection ids", &secret);
    let cid_key = u64::from_le_bytes([c0, c1, c2, c3, c4, c5, c6, c7]);
    config
        .cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(cid_key)))
        .max_udp_payload_size(UDP_PAYLOAD_BYTES_MAX)
        .expect("the constant is within QUIC's bounds");
    config
}

struct ResetKey([u8; 32]);

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        signature_out.copy_from_slice(blake3::keyed_hash(&self.0, data).as_bytes());
    }

    fn signature_len(&self) -> usize {
        blake3::OUT_LEN
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        let expected = blake3::keyed_hash(&self.0, data);
        // Comparing with a `Hash` takes constant time.
        match <[u8; blake3::OUT_LEN]>::try_from(signature) {
            Ok(signature) if expected == signature => Ok(()),
            _ => Err(CryptoError),
        }
    }
}

/// Binds the socket, asks for large buffers, and says how many bytes may be in flight on loopback.
fn socket(addr: SocketAddr, options: &TransportOptions) -> io::Result<(Socket, u64)> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    socket.bind(&addr.into())?;
    socket.set_recv_buffer_size(options.socket_buffer_bytes)?;
    socket.set_send_buffer_size(options.socket_buffer_bytes)?;
    // The kernel counts its own overhead, too: what fits is about half of what it says.
    let granted = socket.recv_buffer_size()? as u64;
    Ok((socket, options.loopback_window_bytes.min(granted / 2)))
}
