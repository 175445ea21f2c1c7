//! Noticing at once that a process on this machine is gone.
//!
//! QUIC hears nothing of a killed peer until its idle time-out: quinn's socket is unconnected, and the kernel reports
//! "port unreachable" on connected sockets only. So a second, connected socket sends empty datagrams, which quinn's
//! receive loop skips without parsing, and asks the kernel for the answer. On loopback the answer is there when the
//! system call returns. Across machines such answers can be forged or filtered, so nobody is declared dead by them.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use tokio::time::MissedTickBehavior;

/// Resolves when no process holds `addr` any more; never for an address outside this machine's loopback.
///
/// Cancel-safe: it holds no state but a socket.
pub(crate) async fn port_closed(addr: SocketAddr, interval: Duration) {
    if !addr.ip().to_canonical().is_loopback() {
        return std::future::pending().await;
    }
    let socket = match probe_socket(addr) {
        Ok(socket) => socket,
        Err(error) => {
            tracing::warn!(%addr, %error, "no liveness probe for this peer; its death is noticed by the idle time-out");
            return std::future::pending().await;
        }
    };
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if refused(&socket) {
            return;
        }
    }
}

fn probe_socket(addr: SocketAddr) -> io::Result<UdpSocket> {
    // A dual-stack endpoint sees its IPv4 peers as mapped addresses.
    let addr = SocketAddr::new(addr.ip().to_canonical(), addr.port());
    let socket = match addr {
        SocketAddr::V4(_) => UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?,
        SocketAddr::V6(_) => UdpSocket::bind((Ipv6Addr::LOCALHOST, 0))?,
    };
    socket.set_nonblocking(true)?;
    socket.connect(addr)?;
    Ok(socket)
}

/// Sends one empty datagram and asks what became of it; other errors than a refusal say nothing about the peer.
fn refused(socket: &UdpSocket) -> bool {
    let error = match socket.send(&[]) {
        Err(error) => Some(error),
        Ok(_) => socket.take_error().unwrap_or_default(),
    };
    error.is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_port_is_seen_by_the_first_probe_after_it_closed() {
        let peer = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let probe = probe_socket(peer.local_addr().unwrap()).unwrap();
        assert!(!refused(&probe));
        assert!(!refused(&probe));
        drop(peer);
        assert!(refused(&probe));
    }
}
