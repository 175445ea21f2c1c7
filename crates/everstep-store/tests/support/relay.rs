//! A TCP relay that hides `If-None-Match` from the server behind it: with it, a correct S3 server behaves like those
//! that ignore create-if-absent.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

const HIDDEN: &[u8] = b"if-none-match";
const SHOWN: &[u8] = b"x-hidden-from";

/// Starts a relay to a local port and returns its own; its threads end with the connections.
pub(crate) fn start(server_port: u16) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            let server = TcpStream::connect(("127.0.0.1", server_port)).unwrap();
            let (client_in, server_out) =
                (client.try_clone().unwrap(), server.try_clone().unwrap());
            std::thread::spawn(move || relay(client_in, server_out, true));
            std::thread::spawn(move || relay(server, client, false));
        }
    });
    port
}

fn relay(mut from: TcpStream, mut to: TcpStream, hide: bool) {
    let mut buffer = [0; 64 * 1024];
    let mut pending: Vec<u8> = Vec::new();
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        pending.extend_from_slice(&buffer[..count]);
        let mut keep = 0;
        if hide {
            while let Some(at) = pending
                .windows(HIDDEN.len())
                .position(|w| w.eq_ignore_ascii_case(HIDDEN))
            {
                pending[at..at + HIDDEN.len()].copy_from_slice(SHOWN);
            }
            // The header's name may be cut between two reads.
            let tail = |len: &usize| pending.ends_with(&HIDDEN[..*len]);
            keep = (1..HIDDEN.len()).rev().find(tail).unwrap_or(0);
        }
        let rest = pending.split_off(pending.len() - keep);
        if to.write_all(&pending).is_err() {
            break;
        }
        pending = rest;
    }
    let _ = to.shutdown(Shutdown::Write);
}
