//! Certificates, endpoints and connections for the tests.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use everstep_transport::{ClusterCa, Connection, Endpoint, Hello, Identity, TransportOptions};
use tempfile::TempDir;

pub(crate) const RUN: u64 = 0xe5;

/// A folder with a CA and the certificates of `names`.
pub(crate) fn certs(names: &[&str]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let ca = ClusterCa::create(dir.path()).unwrap();
    for name in names {
        ca.issue(name, dir.path()).unwrap();
    }
    dir
}

pub(crate) fn hello(name: &str) -> Hello {
    Hello {
        run_id: RUN,
        process: 0,
        name: name.to_owned(),
        incarnation: 1,
    }
}

pub(crate) fn localhost(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

pub(crate) fn bind(dir: &Path, hello: Hello, options: TransportOptions) -> Endpoint {
    let identity = Identity::load(dir, &hello.name).unwrap();
    Endpoint::bind(localhost(0), &identity, hello, options).unwrap()
}

/// Endpoints `a` and `b` and a connection that `a` dialled, seen from both sides.
pub(crate) struct Pair {
    pub(crate) a: Endpoint,
    pub(crate) b: Endpoint,
    pub(crate) at_a: Connection,
    pub(crate) at_b: Connection,
}

pub(crate) async fn pair(options: TransportOptions) -> Pair {
    let dir = certs(&["a", "b"]);
    let a = bind(dir.path(), hello("a"), options.clone());
    let b = bind(dir.path(), hello("b"), options);
    let (at_a, at_b) = tokio::join!(a.connect(b.local_addr().unwrap(), "b"), b.accept());
    Pair {
        a,
        b,
        at_a: at_a.unwrap(),
        at_b: at_b.unwrap(),
    }
}
