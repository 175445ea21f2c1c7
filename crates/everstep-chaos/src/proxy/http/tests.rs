//! The proxy between a real client socket and a small server that keeps what it is given.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;

use super::*;

/// A server that keeps one object and lists how often it was written. What it got of each request's body comes over the channel.
fn server() -> (SocketAddr, mpsc::Receiver<usize>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let (got, bodies) = mpsc::channel();
    std::thread::spawn(move || {
        let (mut object, mut writes) = (Vec::new(), 0);
        for mut client in listener.incoming().map_while(Result::ok) {
            let mut bytes = Vec::new();
            let mut buffer = [0; 4096];
            let (head, length) = loop {
                let count = client.read(&mut buffer).unwrap();
                bytes.extend_from_slice(&buffer[..count]);
                if let Some(len) = head_len(&bytes) {
                    let head = String::from_utf8(bytes[..len].to_vec()).unwrap();
                    let length = header(&head, "content-length").map_or(0, |n| n.parse().unwrap());
                    bytes.drain(..len);
                    break (head, length);
                }
            };
            while bytes.len() < length {
                match client.read(&mut buffer).unwrap() {
                    0 => break,
                    count => bytes.extend_from_slice(&buffer[..count]),
                }
            }
            let _ = got.send(bytes.len());
            let body = if head.starts_with("PUT") {
                if bytes.len() < length {
                    continue;
                }
                (object, writes) = (bytes, writes + 1);
                Vec::new()
            } else if head.contains("list-type=2") {
                format!("{writes} writes").into_bytes()
            } else {
                object.clone()
            };
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            let _ = client.write_all(&[head.into_bytes(), body].concat());
        }
    });
    (address, bodies)
}

/// Status and body; 0 if the connection ended without an answer.
fn call(proxy: &HttpProxy, method: &str, target: &str, body: &str) -> (u16, String) {
    let mut client = TcpStream::connect(proxy.address()).unwrap();
    let length = body.len();
    write!(
        client,
        "{method} {target} HTTP/1.1\r\nHost: store\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .unwrap();
    let mut answer = Vec::new();
    let _ = client.read_to_end(&mut answer);
    let text = String::from_utf8_lossy(body_of(&answer)).into_owned();
    (status_of(&answer).unwrap_or(0), text)
}

fn always(fault: HttpFault) -> [HttpRule; 1] {
    [HttpRule { fault, share: 1.0 }]
}

#[test]
fn each_fault_does_what_it_says_and_is_counted() {
    let (address, bodies) = server();
    let proxy = HttpProxy::start(address, 1).unwrap();
    let put = |text: &str| call(&proxy, "PUT", "/bucket/key", text);
    let get = || call(&proxy, "GET", "/bucket/key", "");
    let list = || call(&proxy, "GET", "/bucket?list-type=2&prefix=a", "");
    let ok = |text: &str| (200, text.to_owned());

    assert_eq!(put("first"), ok(""));
    assert_eq!(get(), ok("first"));
    assert_eq!(list(), ok("1 writes"));
    assert!(proxy.counts().is_empty());

    for status in [500, 503, 429, 403] {
        proxy.set(&always(HttpFault::Refuse { status }));
        assert_eq!(put("refused").0, status);
    }
    proxy.set(&always(HttpFault::LoseAnswer { hold_ms: 1 }));
    assert_eq!(put("second").0, 0);
    proxy.set(&always(HttpFault::CutUpload));
    assert_eq!(put("0123456789").0, 0);
    assert_eq!(get(), ok("second"), "half an upload is none");
    proxy.set(&always(HttpFault::StaleList));
    assert_eq!(list(), ok("1 writes"));
    proxy.set(&always(HttpFault::WrongBytes));
    assert_eq!(get(), ok("sec\u{7f}nd"));
    proxy.set(&always(HttpFault::Missing));
    assert_eq!(get().0, 404);
    assert_eq!(list(), ok("2 writes"), "a list is no object");
    proxy.set(&always(HttpFault::Slow { delay_ms: 1 }));
    assert_eq!(get(), ok("second"));
    proxy.set(&[]);
    assert_eq!(get(), ok("second"));

    let counts = proxy.counts();
    let names: Vec<&str> = counts.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "cut_upload",
            "lose_answer",
            "missing",
            "refuse_403",
            "refuse_429",
            "refuse_500",
            "refuse_503",
            "slow",
            "stale_list",
            "wrong_bytes"
        ]
    );
    assert!(counts.values().all(|count| *count == 1), "{counts:?}");
    let bodies: Vec<usize> = bodies.try_iter().collect();
    assert_eq!(
        bodies.iter().filter(|len| **len == 5).count(),
        2,
        "the half and the first"
    );
    assert!(!bodies.contains(&"refused".len()), "{bodies:?}");
}

#[test]
fn a_share_of_requests_suffers() {
    let (address, _bodies) = server();
    let hits = |seed| {
        let proxy = HttpProxy::start(address, seed).unwrap();
        proxy.set(&[HttpRule {
            fault: HttpFault::Refuse { status: 503 },
            share: 0.3,
        }]);
        let statuses = (0..100).map(|_| call(&proxy, "GET", "/bucket/key", "").0);
        statuses.collect::<Vec<u16>>()
    };
    let first = hits(7);
    let refused = first.iter().filter(|status| **status == 503).count();
    assert!((15..45).contains(&refused), "{refused}");
    assert_eq!(first, hits(7), "equal seeds draw alike");
    assert_ne!(first, hits(8));
}
