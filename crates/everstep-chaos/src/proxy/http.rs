//! An HTTP/1.1 proxy in front of an object store's server, which answers as real ones do on bad days: errors in bursts, late, not at all
//! although the request was done, with an old list, with wrong bytes, or as if an object were not there.
//!
//! ```text
//!  client ── request ──▶ proxy ── the same request ──▶ server
//!         ◀─ answer ────       ◀─ answer ───────────
//!            ▲ refused before it is asked · cut in the middle of the body · held back · lost · changed
//! ```
//!
//! Every request has a connection of its own. Rules are set while it runs, and every fault that really happened is counted.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use everstep_protocol::random::mix;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// Longest head of a request or an answer.
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Longest body; a part of an upload is 8 MiB.
const BODY_BYTES_MAX: usize = 256 << 20;

/// What a request suffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HttpFault {
    /// Answered with this status, without asking the server: 500, 503, 429, or 403 for credentials that have expired.
    Refuse {
        /// The status.
        status: u16,
    },
    /// Answered only after this time.
    Slow {
        /// Extra time.
        delay_ms: u64,
    },
    /// Done by the server; the answer is lost, and the connection ends after this time.
    LoseAnswer {
        /// How long the client is left waiting, longer than its patience for a time-out.
        hold_ms: u64,
    },
    /// Half of an upload's body, or of one part's, reaches the server; then both connections end.
    CutUpload,
    /// A list is answered as it was the first time; that is a fault only once it is another one.
    StaleList,
    /// One bit of an object is another one.
    WrongBytes,
    /// An object that is there is not found.
    Missing,
}

impl HttpFault {
    /// Whether the request can suffer it.
    fn suits(self, request: &Request) -> bool {
        match self {
            Self::Refuse { .. } | Self::Slow { .. } | Self::LoseAnswer { .. } => true,
            Self::CutUpload => request.method == "PUT" && request.body.len() > 1,
            Self::StaleList => request.is_list(),
            Self::WrongBytes => request.method == "GET" && !request.is_list(),
            Self::Missing => {
                matches!(request.method.as_str(), "GET" | "HEAD") && !request.is_list()
            }
        }
    }
}

impl fmt::Display for HttpFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refuse { status } => write!(f, "refuse_{status}"),
            Self::Slow { .. } => f.write_str("slow"),
            Self::LoseAnswer { .. } => f.write_str("lose_answer"),
            Self::CutUpload => f.write_str("cut_upload"),
            Self::StaleList => f.write_str("stale_list"),
            Self::WrongBytes => f.write_str("wrong_bytes"),
            Self::Missing => f.write_str("missing"),
        }
    }
}

/// How often a fault happens to the requests that can suffer it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HttpRule {
    /// The fault.
    pub fault: HttpFault,
    /// Share of those requests, 0 to 1. Rules are drawn for in their order; the first that hits is the one.
    pub share: f64,
}

/// A proxy on a free loopback port. It ends when this is dropped.
#[derive(Debug)]
pub struct HttpProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    /// Runs the connections; dropped last.
    _runtime: tokio::runtime::Runtime,
}

#[derive(Debug)]
struct Shared {
    server: SocketAddr,
    seed: u64,
    draws: AtomicU64,
    requests: AtomicU64,
    rules: Mutex<Vec<HttpRule>>,
    counts: Mutex<BTreeMap<String, u64>>,
    /// The first answer to each list.
    lists: Mutex<HashMap<String, Vec<u8>>>,
}

impl HttpProxy {
    /// Starts a proxy in front of `server`. Equal seeds draw alike, request by request.
    ///
    /// # Errors
    /// No port can be had, or the runtime cannot start.
    pub fn start(server: SocketAddr, seed: u64) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("http-proxy")
            .enable_all()
            .build()?;
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            server,
            seed,
            draws: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            rules: Mutex::new(Vec::new()),
            counts: Mutex::new(BTreeMap::new()),
            lists: Mutex::new(HashMap::new()),
        });
        let own = shared.clone();
        runtime.spawn(async move {
            // A client that goes away, or speaks something else, is no concern of the others.
            while let Ok((client, _)) = listener.accept().await {
                let shared = own.clone();
                tokio::spawn(async move { drop(serve(&shared, client).await) });
            }
        });
        Ok(Self {
            address,
            shared,
            _runtime: runtime,
        })
    }

    /// Where clients connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Requests suffer these from now on; none ends all faults.
    pub fn set(&self, rules: &[HttpRule]) {
        *lock(&self.shared.rules) = rules.to_vec();
    }

    /// Faults that really happened, by name.
    pub fn counts(&self) -> BTreeMap<String, u64> {
        lock(&self.shared.counts).clone()
    }

    /// Faults that really happened, of all kinds.
    pub fn num_faults(&self) -> u64 {
        lock(&self.shared.counts).values().sum()
    }

    /// Requests so far.
    pub fn num_requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }
}

impl Shared {
    /// The fault that this request suffers, if any.
    fn draw(&self, request: &Request) -> Option<HttpFault> {
        let rules = lock(&self.rules).clone();
        let hit = rules.iter().find(|rule| {
            if !rule.fault.suits(request) {
                return false;
            }
            let number = self.draws.fetch_add(1, Ordering::Relaxed);
            let draw = mix(self.seed ^ mix(number)) >> 11;
            (draw as f64) < rule.share * (1_u64 << 53) as f64
        });
        hit.map(|rule| rule.fault)
    }

    fn count(&self, fault: HttpFault) {
        *lock(&self.counts).entry(fault.to_string()).or_insert(0) += 1;
    }
}

/// A request as it came.
#[derive(Debug)]
struct Request {
    head: Vec<u8>,
    body: Vec<u8>,
    method: String,
    target: String,
}

impl Request {
    /// A list of objects: of a bucket, with a query that says so.
    fn is_list(&self) -> bool {
        self.method == "GET" && self.target.contains("list-type=")
    }
}

async fn serve(shared: &Shared, mut client: TcpStream) -> io::Result<()> {
    let Some(request) = read_request(&mut client).await? else {
        return Ok(());
    };
    shared.requests.fetch_add(1, Ordering::Relaxed);
    let fault = shared.draw(&request);
    match fault {
        Some(fault @ HttpFault::Refuse { status }) => {
            shared.count(fault);
            return answer(&mut client, &refusal(status, &request)).await;
        }
        Some(HttpFault::CutUpload) => {
            let mut server = TcpStream::connect(shared.server).await?;
            server.write_all(&forwarded(&request.head)).await?;
            let half = &request.body[..request.body.len() / 2];
            server.write_all(half).await?;
            shared.count(HttpFault::CutUpload);
            return Ok(());
        }
        _ => {}
    }
    let mut response = ask(shared.server, &request).await?;
    let is_found = status_of(&response) == Some(200) || status_of(&response) == Some(206);
    if request.is_list() && is_found {
        let mut lists = lock(&shared.lists);
        let known = lists
            .entry(request.target.clone())
            .or_insert_with(|| response.clone());
        if fault == Some(HttpFault::StaleList) && body_of(known) != body_of(&response) {
            response.clone_from(known);
            shared.count(HttpFault::StaleList);
        }
    }
    match fault {
        Some(fault @ HttpFault::Slow { delay_ms }) => {
            shared.count(fault);
            tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        }
        Some(fault @ HttpFault::LoseAnswer { hold_ms }) => {
            shared.count(fault);
            tokio::time::sleep(Duration::from_millis(hold_ms)).await;
            return Ok(());
        }
        Some(HttpFault::Missing) if is_found => {
            shared.count(HttpFault::Missing);
            response = refusal(404, &request);
        }
        Some(HttpFault::WrongBytes) if is_found => {
            let body = head_len(&response).unwrap_or(response.len());
            let middle = body + (response.len() - body) / 2;
            if let Some(byte) = response.get_mut(middle) {
                *byte ^= 0x10;
                shared.count(HttpFault::WrongBytes);
            }
        }
        _ => {}
    }
    answer(&mut client, &response).await
}

async fn answer(client: &mut TcpStream, response: &[u8]) -> io::Result<()> {
    client.write_all(response).await?;
    client.shutdown().await
}

/// Passes the request on and takes the whole answer.
async fn ask(server: SocketAddr, request: &Request) -> io::Result<Vec<u8>> {
    let mut server = TcpStream::connect(server).await?;
    server.write_all(&forwarded(&request.head)).await?;
    server.write_all(&request.body).await?;
    let mut response = Vec::new();
    // The server was told to end the connection with its answer.
    server.read_to_end(&mut response).await?;
    Ok(match head_len(&response) {
        Some(len) => {
            let body = response.split_off(len);
            [forwarded(&response), body].concat()
        }
        None => response,
    })
}

async fn read_request(client: &mut TcpStream) -> io::Result<Option<Request>> {
    let mut bytes = Vec::new();
    let head_len = loop {
        if let Some(len) = head_len(&bytes) {
            break len;
        }
        if bytes.len() > HEAD_BYTES_MAX || client.read_buf(&mut bytes).await? == 0 {
            return Ok(None);
        }
    };
    let body_start = bytes.split_off(head_len);
    let head = String::from_utf8_lossy(&bytes).into_owned();
    let mut words = head.split(' ').map(str::to_owned);
    let (Some(method), Some(target)) = (words.next(), words.next()) else {
        return Ok(None);
    };
    let length = header(&head, "content-length").and_then(|value| value.parse().ok());
    let length: usize = length.unwrap_or(0);
    if length > BODY_BYTES_MAX || header(&head, "transfer-encoding").is_some() {
        answer(
            client,
            b"HTTP/1.1 501 Not Implemented\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        )
        .await?;
        return Ok(None);
    }
    if header(&head, "expect").is_some() {
        client.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
    }
    let mut body = body_start;
    while body.len() < length {
        if client.read_buf(&mut body).await? == 0 {
            return Ok(None);
        }
    }
    body.truncate(length);
    Ok(Some(Request {
        head: bytes,
        body,
        method,
        target,
    }))
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.trim().eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

/// Bytes up to the end of the empty line.
fn head_len(bytes: &[u8]) -> Option<usize> {
    let end = b"\r\n\r\n";
    let at = bytes.windows(end.len()).position(|window| window == end)?;
    Some(at + end.len())
}

fn body_of(response: &[u8]) -> &[u8] {
    &response[head_len(response).unwrap_or(response.len())..]
}

fn status_of(response: &[u8]) -> Option<u16> {
    let line = response.split(|byte| *byte == b'\r').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    words.nth(1)?.parse().ok()
}

/// The head, for a connection of one request.
fn forwarded(head: &[u8]) -> Vec<u8> {
    let text = String::from_utf8_lossy(head);
    let is_hop = |line: &&str| {
        let name = line.split(':').next().unwrap_or_default().trim();
        !["connection", "keep-alive", "expect"]
            .iter()
            .any(|hop| name.eq_ignore_ascii_case(hop))
    };
    let mut lines: Vec<&str> = text.trim_end().split("\r\n").filter(is_hop).collect();
    lines.push("Connection: close\r\n\r\n");
    lines.join("\r\n").into_bytes()
}

/// An answer that the server was not asked for, in the words of S3.
fn refusal(status: u16, request: &Request) -> Vec<u8> {
    let (reason, code) = match status {
        403 => ("Forbidden", "ExpiredToken"),
        404 => ("Not Found", "NoSuchKey"),
        429 => ("Too Many Requests", "TooManyRequests"),
        503 => ("Service Unavailable", "SlowDown"),
        _ => ("Internal Server Error", "InternalError"),
    };
    let body = match request.method.as_str() {
        "HEAD" => String::new(),
        _ => format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code></Error>"),
    };
    let length = body.len();
    format!(
        "HTTP/1.1 {status} {reason}\r\nContent-Type: application/xml\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
    .into_bytes()
}

// A panic while one of these locks is held cannot leave a map half-changed, so poisoning carries no information.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
