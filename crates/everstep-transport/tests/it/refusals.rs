//! Who is not let in, and what both sides are told.

use std::net::UdpSocket;
use std::sync::Arc;

use bytes::Bytes;
use everstep_transport::{
    ALPN, BindError, CloseReason, ConnectError, Endpoint, Hello, Identity, RefusalKind,
    TransportOptions,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use crate::support::{RUN, bind, certs, hello, localhost};

fn refused_by_peer(result: Result<everstep_transport::Connection, ConnectError>) -> RefusalKind {
    match result {
        Err(ConnectError::RefusedByPeer { refusal, .. }) => refusal.kind,
        other => panic!("{other:?}"),
    }
}

/// Checks that `listener` still takes a good peer, and nobody before it.
async fn still_listens(listener: &Endpoint, good: &Endpoint) {
    let addr = listener.local_addr().unwrap();
    let (dialled, accepted) = tokio::join!(
        good.connect(addr, &listener.hello().name),
        listener.accept()
    );
    let (dialled, accepted) = (dialled.unwrap(), accepted.unwrap());
    assert_eq!(accepted.peer(), good.hello());
    dialled.send(b"x", Bytes::new()).await.unwrap();
    accepted.recv().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_named() {
    let dir = certs(&["a"]);
    let taken = UdpSocket::bind(localhost(0)).unwrap();
    let addr = taken.local_addr().unwrap();
    let identity = Identity::load(dir.path(), "a").unwrap();
    let error =
        Endpoint::bind(addr, &identity, hello("a"), TransportOptions::default()).unwrap_err();
    assert!(matches!(error, BindError::Address { .. }));
    assert!(
        error
            .to_string()
            .starts_with(&format!("cannot listen on {addr}: Address already in use")),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_identity_and_the_options_must_fit() {
    let dir = certs(&["a"]);
    let identity = Identity::load(dir.path(), "a").unwrap();
    let bind = |hello, options| Endpoint::bind(localhost(0), &identity, hello, options);
    assert!(matches!(
        bind(hello("b"), TransportOptions::default()),
        Err(BindError::Name { .. })
    ));
    let options = TransportOptions {
        queue_frames: 0,
        ..TransportOptions::default()
    };
    assert!(matches!(
        bind(hello("a"), options),
        Err(BindError::Options(_))
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_is_known_at_once() {
    let dir = certs(&["a"]);
    let a = bind(dir.path(), hello("a"), TransportOptions::default());
    let free = UdpSocket::bind(localhost(0)).unwrap().local_addr().unwrap();
    let error = a.connect(free, "b").await.unwrap_err();
    assert!(matches!(error, ConnectError::NobodyThere { .. }), "{error}");
    assert!(error.is_transient());
}

#[tokio::test(flavor = "multi_thread")]
async fn another_cas_certificates_are_worth_nothing() {
    let (ours, theirs) = (certs(&["a", "b"]), certs(&["a"]));
    let b = bind(ours.path(), hello("b"), TransportOptions::default());
    let stranger = bind(theirs.path(), hello("a"), TransportOptions::default());
    let error = stranger
        .connect(b.local_addr().unwrap(), "b")
        .await
        .unwrap_err();
    assert!(matches!(error, ConnectError::Certificate { .. }), "{error}");
    assert!(!error.is_transient());
    // The stranger as listener is no better.
    let error = b
        .connect(stranger.local_addr().unwrap(), "a")
        .await
        .unwrap_err();
    assert!(matches!(error, ConnectError::Certificate { .. }), "{error}");
    still_listens(
        &b,
        &bind(ours.path(), hello("a"), TransportOptions::default()),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_trusts_us_but_shows_no_certificate_gets_nothing() {
    let dir = certs(&["a", "b"]);
    let b = bind(dir.path(), hello("b"), TransportOptions::default());
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(dir.path().join("ca.pem")).unwrap())
        .unwrap();
    let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(
        rustls::crypto::ring::default_provider(),
    ))
    .with_protocol_versions(&[&rustls::version::TLS13])
    .unwrap()
    .with_root_certificates(roots)
    .with_no_client_auth();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let tls = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let client = quinn::Endpoint::client(localhost(0)).unwrap();
    let connecting = client
        .connect_with(
            quinn::ClientConfig::new(Arc::new(tls)),
            b.local_addr().unwrap(),
            "b",
        )
        .unwrap();
    // TLS 1.3 lets the client finish before the server has judged it.
    let error = match connecting.await {
        Err(error) => error,
        Ok(connection) => connection.closed().await,
    };
    assert!(
        matches!(
            CloseReason::from(error.clone()),
            CloseReason::Certificate(_)
        ),
        "{error}"
    );
    still_listens(
        &b,
        &bind(dir.path(), hello("a"), TransportOptions::default()),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_certificate_for_another_name_is_refused() {
    let dir = certs(&["a", "b", "c"]);
    let a = bind(dir.path(), hello("a"), TransportOptions::default());
    let b = bind(dir.path(), hello("b"), TransportOptions::default());
    let error = a.connect(b.local_addr().unwrap(), "c").await.unwrap_err();
    assert!(matches!(error, ConnectError::Certificate { .. }), "{error}");
    still_listens(&b, &a).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_run_is_refused_and_told_why() {
    let dir = certs(&["a", "b"]);
    let a = bind(
        dir.path(),
        Hello {
            run_id: RUN + 1,
            ..hello("a")
        },
        TransportOptions::default(),
    );
    let b = bind(dir.path(), hello("b"), TransportOptions::default());
    let result = a.connect(b.local_addr().unwrap(), "b").await;
    let text = result.as_ref().unwrap_err().to_string();
    assert!(
        text.contains("run `00000000000000e6`, this process belongs to run `00000000000000e5`"),
        "{text}"
    );
    assert_eq!(refused_by_peer(result), RefusalKind::RunId);
    a.close().await;
    still_listens(
        &b,
        &bind(dir.path(), hello("a"), TransportOptions::default()),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_the_port_is_ignored() {
    let dir = certs(&["a", "b"]);
    let a = bind(dir.path(), hello("a"), TransportOptions::default());
    let b = bind(dir.path(), hello("b"), TransportOptions::default());
    let socket = UdpSocket::bind(localhost(0)).unwrap();
    socket.connect(b.local_addr().unwrap()).unwrap();
    for len in [0_usize, 1, 20, 21, 50, 1200, 1472, 9000, 60_000] {
        for first in [0x00_u8, 0x40, 0x7f, 0xc0, 0xff] {
            let mut datagram: Vec<u8> = (0..len).map(|at| (at * 131) as u8).collect();
            if let Some(byte) = datagram.first_mut() {
                *byte = first;
            }
            socket.send(&datagram).unwrap();
        }
    }
    still_listens(&b, &a).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_later_connection_takes_over_and_an_older_incarnation_does_not() {
    let dir = certs(&["a", "b"]);
    let b = bind(dir.path(), hello("b"), TransportOptions::default());
    let addr = b.local_addr().unwrap();
    let a = bind(
        dir.path(),
        Hello {
            incarnation: 5,
            ..hello("a")
        },
        TransportOptions::default(),
    );
    let (first, first_at_b) = tokio::join!(a.connect(addr, "b"), b.accept());
    let (second, second_at_b) = tokio::join!(a.connect(addr, "b"), b.accept());
    let (first, first_at_b) = (first.unwrap(), first_at_b.unwrap());
    assert_eq!(first.closed().await, CloseReason::Superseded);
    assert_eq!(first_at_b.closed().await, CloseReason::Superseded);

    let older = bind(
        dir.path(),
        Hello {
            incarnation: 4,
            ..hello("a")
        },
        TransportOptions::default(),
    );
    assert_eq!(
        refused_by_peer(older.connect(addr, "b").await),
        RefusalKind::Stale
    );
    let second_at_b = second_at_b.unwrap();
    assert_eq!(second_at_b.close_reason(), None);

    let newer = bind(
        dir.path(),
        Hello {
            incarnation: 6,
            ..hello("a")
        },
        TransportOptions::default(),
    );
    let (_third, _third_at_b) = tokio::join!(newer.connect(addr, "b"), b.accept());
    assert_eq!(second_at_b.closed().await, CloseReason::Restarted);
    drop(second);
}

#[tokio::test(flavor = "multi_thread")]
async fn when_both_dial_the_smaller_names_connection_stays() {
    let dir = certs(&["a", "b"]);
    let a = bind(dir.path(), hello("a"), TransportOptions::default());
    let b = bind(dir.path(), hello("b"), TransportOptions::default());
    let (a_addr, b_addr) = (a.local_addr().unwrap(), b.local_addr().unwrap());
    // b was first; a dials nevertheless and takes over on both sides.
    let (from_b, from_b_at_a) = tokio::join!(b.connect(a_addr, "a"), a.accept());
    let (from_a, from_a_at_b) = tokio::join!(a.connect(b_addr, "b"), b.accept());
    assert_eq!(from_b.unwrap().closed().await, CloseReason::Superseded);
    assert_eq!(from_b_at_a.unwrap().closed().await, CloseReason::Superseded);
    // Now b dials again and is sent away.
    assert_eq!(
        refused_by_peer(b.connect(a_addr, "a").await),
        RefusalKind::Duplicate
    );
    let (from_a, from_a_at_b) = (from_a.unwrap(), from_a_at_b.unwrap());
    from_a.send(b"still here", Bytes::new()).await.unwrap();
    assert_eq!(from_a_at_b.recv().await.unwrap().header, &b"still here"[..]);
}
