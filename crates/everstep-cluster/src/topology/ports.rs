//! Free ports for processes that asked for none.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::ops::Range;

/// Ports that services are rarely at home on.
const LOWEST: u16 = 20_000;
/// How many are tried.
const TRIES: u16 = 1_000;

/// A socket on a port that nobody gets by chance: a process that dies finds its port free when it comes back, although others on this machine
/// open connections all the time.
///
/// # Errors
/// No port is free.
pub fn free_port(ip: IpAddr) -> io::Result<UdpSocket> {
    let ports = never_given_out();
    let length = ports.end.saturating_sub(ports.start);
    if length > 0 {
        let start = (RandomState::new().build_hasher().finish() % u64::from(length)) as u16;
        for offset in 0..TRIES.min(length) {
            let place = (u32::from(start) + u32::from(offset)) % u32::from(length);
            if let Ok(socket) = UdpSocket::bind(SocketAddr::new(ip, ports.start + place as u16)) {
                return Ok(socket);
            }
        }
    }
    UdpSocket::bind(SocketAddr::new(ip, 0))
}

/// Ports below those which the system gives to sockets that ask for any.
fn never_given_out() -> Range<u16> {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range");
    let lowest = range.ok().and_then(|range| {
        let first = range.split_whitespace().next()?;
        first.parse().ok()
    });
    LOWEST..lowest.unwrap_or(LOWEST)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn ports_differ_and_are_none_that_the_system_gives_out() {
        let sockets: Vec<UdpSocket> = (0..20)
            .map(|_| free_port(Ipv4Addr::LOCALHOST.into()).unwrap())
            .collect();
        let mut ports: Vec<u16> = sockets
            .iter()
            .map(|socket| socket.local_addr().unwrap().port())
            .collect();
        let safe = never_given_out();
        assert!(safe.is_empty() || ports.iter().all(|port| safe.contains(port)));
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 20);
    }
}
