//! Peers that have a good certificate and bad manners.

use std::net::Ipv4Addr;

use super::*;
use crate::{ClusterCa, ConnectError, Endpoint, Identity, RefusalKind};

fn endpoint(dir: &std::path::Path, name: &str) -> Endpoint {
    let identity = Identity::load(dir, name).unwrap();
    let hello = Hello {
        run_id: 1,
        process: 0,
        name: name.to_owned(),
        incarnation: 1,
    };
    Endpoint::bind(
        (Ipv4Addr::LOCALHOST, 0).into(),
        &identity,
        hello,
        TransportOptions::default(),
    )
    .unwrap()
}

fn certs() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let ca = ClusterCa::create(dir.path()).unwrap();
    ca.issue("a", dir.path()).unwrap();
    ca.issue("b", dir.path()).unwrap();
    dir
}

async fn pair() -> (Connection, Connection, [Endpoint; 2]) {
    let dir = certs();
    let (a, b) = (endpoint(dir.path(), "a"), endpoint(dir.path(), "b"));
    let (at_a, at_b) = tokio::join!(a.connect(b.local_addr().unwrap(), "b"), b.accept());
    (at_a.unwrap(), at_b.unwrap(), [a, b])
}

/// Writes raw bytes on a stream of their own and says what both sides then think.
async fn ends_with(bytes: &[u8]) -> (CloseReason, CloseReason) {
    let (at_a, at_b, _endpoints) = pair().await;
    let mut stream = at_a.inner.link.quinn.open_uni().await.unwrap();
    stream.write_all(bytes).await.unwrap();
    stream.finish().unwrap();
    assert!(matches!(at_b.recv().await, Err(RecvError::Closed(_))));
    (at_a.closed().await, at_b.closed().await)
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_frames_close_the_connection_and_both_sides_know_why() {
    let good = {
        let payload = [Bytes::from_static(b"payload")];
        [&encode_frame(b"header", &payload)[..], b"payload"].concat()
    };
    let changed = |at: usize, bytes: &[u8]| {
        let mut frame = good.clone();
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        frame
    };
    let cases = [
        (
            changed(8, &65_537_u32.to_le_bytes()),
            FrameError::HeaderTooLong(65_537),
        ),
        (
            changed(16, &u64::MAX.to_le_bytes()),
            FrameError::PayloadTooLong {
                payload_bytes: u64::MAX,
                payload_bytes_max: 256 << 20,
            },
        ),
        (changed(0, b"GET "), FrameError::Magic(*b"GET ")),
        (
            good[..30].to_vec(),
            FrameError::Truncated {
                got_bytes: 30,
                expected_bytes: 37,
            },
        ),
        (
            good[..7].to_vec(),
            FrameError::Truncated {
                got_bytes: 7,
                expected_bytes: 24,
            },
        ),
        (
            Vec::new(),
            FrameError::Truncated {
                got_bytes: 0,
                expected_bytes: 24,
            },
        ),
        ([&good[..], b"!"].concat(), FrameError::Trailing),
    ];
    for (bytes, error) in cases {
        let (sender, receiver) = ends_with(&bytes).await;
        assert_eq!(sender, CloseReason::BadFrameSent(error.to_string()));
        assert_eq!(receiver, CloseReason::BadFrame(error));
    }
    let (_, receiver) = ends_with(&changed(36, b"?")).await;
    assert!(
        matches!(receiver, CloseReason::BadFrame(FrameError::Checksum { .. })),
        "{receiver}"
    );
}

/// Dials `a` with b's certificate, says `hello` byte by byte as given, and says how `a` ends it.
async fn says(hello: &[u8]) -> CloseReason {
    let dir = certs();
    let a = endpoint(dir.path(), "a");
    let identity = Identity::load(dir.path(), "b").unwrap();
    let client = quinn::Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(identity.client_config().unwrap()));
    let raw = client
        .connect_with(config, a.local_addr().unwrap(), "a")
        .unwrap()
        .await
        .unwrap();
    let (mut write, _read) = raw.open_bi().await.unwrap();
    write.write_all(hello).await.unwrap();
    raw.closed().await.into()
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_hellos_are_refused_by_kind() {
    let hello = |name: &str, run_id| {
        Hello {
            run_id,
            process: 0,
            name: name.to_owned(),
            incarnation: 1,
        }
        .encode()
    };
    let mut version = hello("b", 1);
    version[4] = 2;
    let mut rubbish = hello("b", 1);
    rubbish[32..40].fill(0xfe);
    let mut long = hello("b", 1);
    long[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    let cases = [
        (version, RefusalKind::WireVersion),
        (rubbish, RefusalKind::Malformed),
        (long, RefusalKind::Malformed),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), RefusalKind::Malformed),
        (hello("c", 1), RefusalKind::Name),
        (hello("a", 1), RefusalKind::Name),
        (hello("b", 2), RefusalKind::RunId),
    ];
    for (bytes, kind) in cases {
        match says(&bytes).await {
            CloseReason::Refused(refusal) => assert_eq!(refusal.kind, kind, "{refusal}"),
            other => panic!("{kind:?}: {other}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listener_that_says_nothing_does_not_hold_the_dialler_for_ever() {
    let dir = certs();
    let identity = Identity::load(dir.path(), "b").unwrap();
    let config = quinn::ServerConfig::with_crypto(Arc::new(identity.server_config().unwrap()));
    let silent = quinn::Endpoint::server(config, (Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let addr = silent.local_addr().unwrap();
    let accepting = tokio::spawn(async move {
        let connection = silent.accept().await.unwrap().await.unwrap();
        connection.closed().await
    });
    let identity = Identity::load(dir.path(), "a").unwrap();
    let hello = Hello {
        run_id: 1,
        process: 0,
        name: "a".to_owned(),
        incarnation: 1,
    };
    let options = TransportOptions {
        handshake_timeout: Duration::from_millis(300),
        ..TransportOptions::default()
    };
    let a = Endpoint::bind((Ipv4Addr::LOCALHOST, 0).into(), &identity, hello, options).unwrap();
    assert!(matches!(
        a.connect(addr, "b").await,
        Err(ConnectError::TimedOut { .. })
    ));
    assert!(matches!(
        CloseReason::from(accepting.await.unwrap()),
        CloseReason::Peer
    ));
}
