//! Death of a real process, and its return.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use everstep_transport::{CloseReason, Endpoint, Hello, Identity, TransportOptions};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{bind, certs, hello, localhost};

/// Makes this test binary a peer process: `<folder> <port> <incarnation>`.
const CHILD: &str = "EVERSTEP_TRANSPORT_TEST_CHILD";

/// A process that echoes frames; killed when dropped.
struct Peer {
    child: Child,
    addr: SocketAddr,
}

impl Peer {
    fn start(dir: &std::path::Path, port: u16, incarnation: u64) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "killed::child_process", "--nocapture"])
            .env(CHILD, format!("{} {port} {incarnation}", dir.display()))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let addr = lines
            .map(Result::unwrap)
            .find_map(|line| {
                line.split_once("listening on ")
                    .map(|(_, addr)| addr.trim().parse().unwrap())
            })
            .expect("the child prints its address");
        Self { child, addr }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Not a test by itself: the body of the peer process.
#[test]
fn child_process() {
    let Ok(arguments) = std::env::var(CHILD) else {
        return;
    };
    let [dir, port, incarnation] = arguments.split(' ').collect::<Vec<_>>().try_into().unwrap();
    let hello = Hello {
        incarnation: incarnation.parse().unwrap(),
        ..hello("peer")
    };
    let identity = Identity::load(dir.as_ref(), "peer").unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let addr = localhost(port.parse().unwrap());
        let endpoint = Endpoint::bind(addr, &identity, hello, TransportOptions::default()).unwrap();
        #[allow(clippy::print_stdout)]
        {
            println!("\nlistening on {}", endpoint.local_addr().unwrap());
        }
        while let Some(connection) = endpoint.accept().await {
            tokio::spawn(async move {
                while let Ok(frame) = connection.recv().await {
                    let _ = connection.send(&frame.header, frame.payload).await;
                }
            });
        }
    });
}

/// Options under which the idle time-out cannot be what notices a death.
fn patient() -> TransportOptions {
    TransportOptions {
        idle_timeout: Duration::from_secs(3600),
        ..TransportOptions::default()
    }
}

async fn echo(connection: &everstep_transport::Connection) {
    connection
        .send(b"echo", Bytes::from_static(b"payload"))
        .await
        .unwrap();
    assert_eq!(connection.recv().await.unwrap().payload, &b"payload"[..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_process_is_noticed_by_its_port_and_welcome_again() {
    let dir = certs(&["a", "peer"]);
    // A QUIC connection's idle time-out is the smaller one of both sides, and the child's is the default: it is the
    // reason below that shows what noticed the death.
    let a = bind(dir.path(), hello("a"), patient());
    let peer = Peer::start(dir.path(), 0, 1);
    let addr = peer.addr;
    let first = a.connect(addr, "peer").await.unwrap();
    echo(&first).await;
    peer.kill();
    let reason = first.closed().await;
    assert_eq!(reason, CloseReason::Gone);
    assert!(reason.is_loss());
    assert!(a.connect(addr, "peer").await.unwrap_err().is_transient());

    let peer = Peer::start(dir.path(), addr.port(), 2);
    assert_eq!(peer.addr, addr);
    let second = a.connect(addr, "peer").await.unwrap();
    assert_eq!(second.peer().incarnation, 2);
    echo(&second).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_returns_on_its_port_resets_its_predecessors_connections() {
    let dir = certs(&["a", "peer"]);
    // Probes too rare to see the gap between the two processes.
    let a = bind(
        dir.path(),
        hello("a"),
        TransportOptions {
            probe_interval: Duration::from_secs(3600),
            ..patient()
        },
    );
    let peer = Peer::start(dir.path(), 0, 1);
    let addr = peer.addr;
    let first = a.connect(addr, "peer").await.unwrap();
    echo(&first).await;
    peer.kill();
    let _peer = Peer::start(dir.path(), addr.port(), 2);
    let reason = first.closed().await;
    assert_eq!(reason, CloseReason::Restarted);
    assert!(reason.is_loss());
    echo(&a.connect(addr, "peer").await.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_process_is_noticed_by_its_silence() {
    let dir = certs(&["a", "peer"]);
    let a = bind(dir.path(), hello("a"), TransportOptions::default());
    let peer = Peer::start(dir.path(), 0, 1);
    let connection = a.connect(peer.addr, "peer").await.unwrap();
    echo(&connection).await;
    peer.signal(Signal::SIGSTOP);
    assert_eq!(connection.closed().await, CloseReason::TimedOut);
}
