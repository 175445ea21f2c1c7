//! A user-space UDP proxy between the processes of a run: one socket per directed link, faults per direction, set while it runs.
//!
//! ```text
//!            via                                    upstream
//!  dialler ─────▶ socket of the link ── forward ──▶ socket of the dialler's port ─────▶ listener
//!          ◀───── socket of the link ◀── back ───── socket of the dialler's port ◀─────
//! ```
//!
//! A process that is started again dials from another port, which gets an upstream socket of its own.

use std::collections::{BinaryHeap, HashMap};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use everstep_cluster::{Route, Topology};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;

use super::link::{Direction, Line, LinkCounts, LinkFault};

const DATAGRAM_BYTES_MAX: usize = 65_536;
/// A dialler's port that was silent this long is forgotten.
const FORGET: Duration = Duration::from_secs(30);

/// The proxies of a run. They end when this is dropped.
#[derive(Debug)]
pub struct UdpProxies {
    origin: Instant,
    links: Vec<Arc<Link>>,
    /// Runs the links; dropped last.
    _runtime: tokio::runtime::Runtime,
}

#[derive(Debug)]
struct Link {
    from: End,
    to: End,
    via: SocketAddr,
    target: SocketAddr,
    /// Ports of processes, which must stay free while a process is away.
    reserved: Arc<[u16]>,
    forward: Mutex<Direction>,
    back: Mutex<Direction>,
}

/// A process at the end of a link.
#[derive(Debug)]
struct End {
    process: String,
    node: String,
}

impl End {
    /// Whether `name` is the process, or its node.
    fn is(&self, name: &str) -> bool {
        self.process == name || self.node == name
    }
}

/// Directions of links.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Links {
    /// Every direction of every link.
    All,
    /// What is sent from one process or node to another.
    Between {
        /// Who sends.
        from: String,
        /// Who receives.
        to: String,
    },
    /// What crosses the border of a group of processes or nodes.
    Border {
        /// The group.
        inside: Vec<String>,
        /// What it sends.
        out: bool,
        /// What it receives.
        into: bool,
    },
}

impl Links {
    fn has(&self, sender: &End, receiver: &End) -> bool {
        match self {
            Self::All => true,
            Self::Between { from, to } => sender.is(from) && receiver.is(to),
            Self::Border { inside, out, into } => {
                let is_inside = |end: &End| inside.iter().any(|name| end.is(name));
                match (is_inside(sender), is_inside(receiver)) {
                    (true, false) => *out,
                    (false, true) => *into,
                    _ => false,
                }
            }
        }
    }
}

impl UdpProxies {
    /// Starts a proxy for every pair of processes, and leads `topology`'s routes over them. Ports that are not chosen yet are chosen
    /// now.
    ///
    /// # Errors
    /// A port cannot be had, a host has no address, or the runtime cannot start.
    pub fn start(topology: &mut Topology, seed: u64) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("udp-proxy")
            .enable_all()
            .build()?;
        let num_processes = topology.processes.len();
        let pairs = (0..num_processes).flat_map(|from| (0..from).map(move |to| (from, to)));
        let sockets = pairs
            .map(|pair| {
                let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
                socket.set_nonblocking(true)?;
                Ok((pair, socket))
            })
            .collect::<io::Result<Vec<_>>>()?;
        // Chosen while the proxies hold theirs: a process binds its port only later.
        topology.resolve_ports(|_| true).map_err(io::Error::other)?;
        let reserved: Arc<[u16]> = topology.processes.iter().map(|p| p.port).collect();
        let origin = Instant::now();
        let mut links = Vec::new();
        topology.routes.clear();
        for ((from, to), socket) in sockets {
            let target = topology.address(to as u32).ok_or_else(|| {
                let host = &topology.processes[to].host;
                io::Error::other(format!("host {host} has no address"))
            })?;
            let end = |process: usize| End {
                process: topology.processes[process].name.clone(),
                node: topology.processes[process].node.clone(),
            };
            let number = 2 * links.len() as u64;
            let link = Arc::new(Link {
                from: end(from),
                to: end(to),
                via: socket.local_addr()?,
                target,
                reserved: reserved.clone(),
                forward: Mutex::new(Direction::new(seed, number)),
                back: Mutex::new(Direction::new(seed, number + 1)),
            });
            topology.routes.push(Route {
                from: link.from.process.clone(),
                to: link.to.process.clone(),
                via: link.via,
            });
            let socket = {
                let _entered = runtime.enter();
                UdpSocket::from_std(socket)?
            };
            runtime.spawn(serve(link.clone(), Arc::new(socket), origin));
            links.push(link);
        }
        Ok(Self {
            origin,
            links,
            _runtime: runtime,
        })
    }

    /// Datagrams on `links` suffer `fault` from now on. Says how many directions that are.
    ///
    /// At the border of a group a rate is that of one line out of the group and one into it, as of a machine with one network card; elsewhere
    /// each direction has the rate for itself.
    pub fn set(&self, links: &Links, fault: &LinkFault) -> usize {
        let now = self.origin.elapsed();
        let (out, into) = (Line::default(), Line::default());
        let mut num_directions = 0;
        for (sender, receiver, direction) in self.directions() {
            if !links.has(sender, receiver) {
                continue;
            }
            let line = match links {
                Links::Border { inside, .. } if inside.iter().any(|name| sender.is(name)) => {
                    out.clone()
                }
                Links::Border { .. } => into.clone(),
                Links::All | Links::Between { .. } => Line::default(),
            };
            lock(direction).set_on(now, fault.clone(), line);
            num_directions += 1;
        }
        num_directions
    }

    /// All links are good again.
    pub fn heal(&self) {
        self.set(&Links::All, &LinkFault::default());
    }

    /// What was done so far on `links`.
    #[must_use]
    pub fn counts(&self, links: &Links) -> LinkCounts {
        let mut all = LinkCounts::default();
        for (sender, receiver, direction) in self.directions() {
            if links.has(sender, receiver) {
                all.add(&lock(direction).counts());
            }
        }
        all
    }

    fn directions(&self) -> impl Iterator<Item = (&End, &End, &Mutex<Direction>)> {
        self.links.iter().flat_map(|link| {
            [
                (&link.from, &link.to, &link.forward),
                (&link.to, &link.from, &link.back),
            ]
        })
    }
}

// A panic inside `Direction` cannot leave it unusable, so poisoning carries no information.
fn lock(direction: &Mutex<Direction>) -> MutexGuard<'_, Direction> {
    direction.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A dialler's port, as the link sees it.
struct Dialler {
    forward: mpsc::UnboundedSender<Due>,
    heard: Instant,
    back: tokio::task::JoinHandle<()>,
}

impl Drop for Dialler {
    fn drop(&mut self) {
        self.back.abort();
    }
}

/// A datagram on its way.
struct Due {
    at: Instant,
    /// Keeps datagrams that are due at the same time in order.
    number: u64,
    datagram: Arc<[u8]>,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    /// The one that is due first is the greatest, as a heap wants it.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

/// Passes datagrams of a link on until the runtime ends.
async fn serve(link: Arc<Link>, socket: Arc<UdpSocket>, origin: Instant) {
    let mut diallers: HashMap<SocketAddr, Dialler> = HashMap::new();
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    let mut number = 0;
    loop {
        // An error is the answer to an earlier datagram whose receiver is gone.
        let Ok((bytes, from)) = socket.recv_from(&mut buffer).await else {
            continue;
        };
        if bytes == 0 {
            // Somebody asks whether this port is held.
            continue;
        }
        if !diallers.contains_key(&from) {
            diallers.retain(|_, dialler| dialler.heard.elapsed() < FORGET);
            let Ok(dialler) = answer(&link, &socket, from, origin).await else {
                continue;
            };
            diallers.insert(from, dialler);
        }
        if let Some(dialler) = diallers.get_mut(&from) {
            dialler.heard = Instant::now();
            send(
                &link.forward,
                origin,
                &mut buffer[..bytes],
                &mut number,
                &dialler.forward,
            );
        }
    }
}

/// Opens the upstream socket of a new dialler's port and passes on what comes back.
///
/// The socket is not connected: the listener's process asks from another port whether somebody still holds this one, and the system would
/// answer that nobody does.
async fn answer(
    link: &Arc<Link>,
    socket: &Arc<UdpSocket>,
    from: SocketAddr,
    origin: Instant,
) -> io::Result<Dialler> {
    let any: SocketAddr = if link.target.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (std::net::Ipv6Addr::UNSPECIFIED, 0).into()
    };
    // Those that were refused are held until another port is found.
    let mut refused = Vec::new();
    let upstream = loop {
        let socket = UdpSocket::bind(any).await?;
        if !link.reserved.contains(&socket.local_addr()?.port()) {
            break Arc::new(socket);
        }
        refused.push(socket);
    };
    drop(refused);
    let target = link.target;
    let (forward, queue) = mpsc::unbounded_channel();
    let out = upstream.clone();
    tokio::spawn(deliver(queue, move |datagram| {
        let out = out.clone();
        // A datagram that the system does not take is lost, as datagrams may be.
        async move { drop(out.send_to(&datagram, target).await) }
    }));
    let (link, listen, socket) = (link.clone(), upstream, socket.clone());
    let back = tokio::spawn(async move {
        let (back, queue) = mpsc::unbounded_channel();
        let delivery = deliver(queue, move |datagram| {
            let socket = socket.clone();
            async move { drop(socket.send_to(&datagram, from).await) }
        });
        let receiving = async {
            let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
            let mut number = 0;
            loop {
                match listen.recv_from(&mut buffer).await {
                    // An empty one asks whether this port is held.
                    Ok((0, _)) => {}
                    Ok((bytes, from)) if from == target => {
                        send(&link.back, origin, &mut buffer[..bytes], &mut number, &back);
                    }
                    // A stranger.
                    Ok(_) => {}
                    // Nobody listens there now; the next life may.
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        };
        tokio::select! {
            () = delivery => {}
            () = receiving => {}
        }
    });
    Ok(Dialler {
        forward,
        heard: Instant::now(),
        back,
    })
}

/// Lets a direction do what it does to a datagram, and queues what is left.
fn send(
    direction: &Mutex<Direction>,
    origin: Instant,
    datagram: &mut [u8],
    number: &mut u64,
    queue: &mpsc::UnboundedSender<Due>,
) {
    let times = lock(direction).pass(origin.elapsed(), datagram);
    if times.is_empty() {
        return;
    }
    let datagram: Arc<[u8]> = Arc::from(&*datagram);
    for at in times {
        *number += 1;
        // Fails only when the link is going away.
        let _ = queue.send(Due {
            at: origin + at,
            number: *number,
            datagram: datagram.clone(),
        });
    }
}

/// Delivers datagrams when they are due, until their sender is gone.
async fn deliver<F: Future<Output = ()>>(
    mut queue: mpsc::UnboundedReceiver<Due>,
    send: impl Fn(Arc<[u8]>) -> F,
) {
    let mut waiting: BinaryHeap<Due> = BinaryHeap::new();
    loop {
        let next = waiting.peek().map(|due| due.at);
        let due = async {
            match next {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            received = queue.recv() => match received {
                Some(due) if due.at <= Instant::now() && next.is_none_or(|next| due.at < next) => send(due.datagram).await,
                Some(due) => waiting.push(due),
                None => return,
            },
            () = due => {
                if let Some(due) = waiting.pop() {
                    send(due.datagram).await;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
