//! Real sockets on loopback.

use std::net::UdpSocket;
use std::path::Path;
use std::time::Duration;

use everstep_cluster::Topology;

use super::{LinkFault, Links, UdpProxies};

/// Two processes whose places test sockets take.
fn two(folder: &Path) -> Topology {
    let file = folder.join("t.toml");
    let text = r#"
[[node]]
name = "a"
[[node]]
name = "b"
[[process]]
name = "one"
node = "a"
roles = ["coordinator", "loader", "shard"]
[[process]]
name = "two"
node = "b"
roles = ["worker"]
"#;
    std::fs::write(&file, text).unwrap();
    Topology::read(&file).unwrap()
}

fn receive(socket: &UdpSocket) -> Option<Vec<u8>> {
    let mut buffer = [0; 2048];
    let bytes = socket.recv_from(&mut buffer).ok()?.0;
    Some(buffer[..bytes].to_vec())
}

#[test]
fn datagrams_pass_both_ways_and_cuts_are_one_way() {
    let folder = tempfile::tempdir().unwrap();
    let mut topology = two(folder.path());
    let proxies = UdpProxies::start(&mut topology, 1).unwrap();
    let listener = UdpSocket::bind(topology.address(0).unwrap()).unwrap();
    let dialler = UdpSocket::bind("127.0.0.1:0").unwrap();
    for socket in [&listener, &dialler] {
        // Bounds a failing test; what must arrive arrives at once.
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
    }
    let via = topology.dial_address(1, 0).unwrap();
    assert_ne!(via, topology.address(0).unwrap());
    dialler.send_to(b"there", via).unwrap();
    let mut buffer = [0; 16];
    let (bytes, proxy) = listener.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..bytes], b"there");
    listener.send_to(b"and back", proxy).unwrap();
    assert_eq!(receive(&dialler).unwrap(), b"and back");

    // The listener's process asks whether the dialler's port is held, and a stranger is not passed on.
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    stranger.connect(proxy).unwrap();
    for _ in 0..2 {
        stranger.send(b"").unwrap();
        stranger.send(b"who is there?").unwrap();
    }
    assert!(stranger.take_error().unwrap().is_none());

    // Only from two to one, by node: what is sent the other way still arrives, and was sent later.
    let from_two = Links::Between {
        from: "b".to_owned(),
        to: "a".to_owned(),
    };
    assert_eq!(proxies.set(&from_two, &LinkFault::cut()), 1);
    dialler.send_to(b"lost", via).unwrap();
    while proxies.counts(&from_two).cut < 1 {
        std::thread::yield_now();
    }
    listener.send_to(b"heard", proxy).unwrap();
    assert_eq!(receive(&dialler).unwrap(), b"heard");
    proxies.heal();
    dialler.send_to(b"again", via).unwrap();
    assert_eq!(receive(&listener).unwrap(), b"again");

    let around_one = Links::Border {
        inside: vec!["one".to_owned()],
        out: true,
        into: true,
    };
    let twice = LinkFault {
        duplicate: 1.0,
        ..LinkFault::default()
    };
    assert_eq!(proxies.set(&around_one, &twice), 2);
    dialler.send_to(b"twice", via).unwrap();
    assert_eq!(receive(&listener).unwrap(), b"twice");
    assert_eq!(receive(&listener).unwrap(), b"twice");
    let counts = proxies.counts(&Links::All);
    assert_eq!((counts.datagrams, counts.cut, counts.duplicated), (6, 1, 1));
}
