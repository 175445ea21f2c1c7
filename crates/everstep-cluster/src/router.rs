//! Finds the way to an actor: a pointer within the process, a control session or a tensor stream to another one.
//!
//! Nothing is stored for peers that are away: the step protocol says again what was not answered.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Instant;

use bytes::Bytes;
use everstep_protocol::Member;
use everstep_telemetry::TraceContext;
use everstep_transport::Frame;
use tokio::sync::mpsc;

use crate::message::{ClusterMessage, Delivery, PeerEvent, StepMessage};
use crate::session::Sessions;
use crate::topology::{ActorAddress, ActorRole, Topology};
use crate::wire::{self, Encoded};

/// Where a local actor takes its messages.
pub(crate) type Inbox = Arc<dyn Fn(Delivery) + Send + Sync>;
/// Who wants to know of peers that come and go.
pub(crate) type PeerListener = Arc<dyn Fn(PeerEvent) + Send + Sync>;

/// A tensor frame on its way to a peer.
#[derive(Debug)]
pub(crate) struct TensorFrame {
    /// Archived header.
    pub(crate) header: Bytes,
    /// Raw little-endian values.
    pub(crate) payload: Bytes,
}

struct Peer {
    incarnation: u64,
    /// Tells its connections apart.
    link: u64,
    /// When something was heard of it last.
    heard: Mutex<Instant>,
    tensors: mpsc::UnboundedSender<TensorFrame>,
}

/// Routes messages of one process. Cheap to share.
pub(crate) struct Router {
    run_id: u64,
    me: u32,
    process_of: BTreeMap<ActorAddress, u32>,
    inboxes: RwLock<BTreeMap<ActorAddress, (u64, Inbox)>>,
    listeners: Mutex<Vec<PeerListener>>,
    peers: RwLock<BTreeMap<u32, Peer>>,
    sessions: Option<Sessions>,
    links: AtomicU64,
}

impl std::fmt::Debug for Router {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Router")
            .field("process", &self.me)
            .finish_non_exhaustive()
    }
}

impl Router {
    /// A router of process `me`; without sessions when the topology has but one process.
    pub(crate) fn new(
        run_id: u64,
        me: u32,
        topology: &Topology,
        sessions: Option<Sessions>,
    ) -> Arc<Self> {
        Arc::new(Self {
            run_id,
            me,
            process_of: topology.actors().collect(),
            inboxes: RwLock::default(),
            listeners: Mutex::default(),
            peers: RwLock::default(),
            sessions,
            links: AtomicU64::new(0),
        })
    }

    /// Where messages for a local actor go from now on: to this life of it.
    pub(crate) fn register(&self, address: ActorAddress, incarnation: u64, inbox: Inbox) {
        write(&self.inboxes).insert(address, (incarnation, inbox));
    }

    /// Tells `listener` of peers from now on, and of those that are here already.
    pub(crate) fn listen(&self, listener: PeerListener) {
        for (process, peer) in read(&self.peers).iter() {
            listener(PeerEvent::Up {
                process: *process,
                incarnation: peer.incarnation,
            });
        }
        lock(&self.listeners).push(listener);
    }

    /// All actors of a role.
    pub(crate) fn actors(&self, role: ActorRole) -> impl Iterator<Item = ActorAddress> + '_ {
        self.process_of
            .keys()
            .copied()
            .filter(move |address| address.role == role)
    }

    /// The process that an actor lives in.
    pub(crate) fn process_of(&self, address: ActorAddress) -> Option<u32> {
        self.process_of.get(&address).copied()
    }

    /// Sends to whatever life of `to` is there.
    pub(crate) fn send(
        &self,
        from: (ActorAddress, u64),
        to: ActorAddress,
        message: ClusterMessage,
    ) {
        self.route(from, to, None, message);
    }

    /// Sends to every coordinator of the topology.
    pub(crate) fn send_coordinators(&self, from: (ActorAddress, u64), message: &StepMessage) {
        for coordinator in self.actors(ActorRole::Coordinator) {
            self.send(from, coordinator, ClusterMessage::Protocol(message.clone()));
        }
    }

    /// Sends to one life of an actor; other lives do not get it.
    pub(crate) fn send_member(
        &self,
        from: (ActorAddress, u64),
        to: Member,
        message: ClusterMessage,
    ) {
        let address = ActorAddress {
            role: to.role.into(),
            index: to.index,
        };
        self.route(from, address, Some(to.incarnation), message);
    }

    fn route(
        &self,
        from: (ActorAddress, u64),
        to: ActorAddress,
        incarnation: Option<u64>,
        message: ClusterMessage,
    ) {
        let Some(process) = self.process_of(to) else {
            return;
        };
        // What every protocol trouble is found with: EVERSTEP_LOG=everstep_cluster=trace.
        tracing::trace!(from = ?from.0, ?to, ?incarnation, message = ?Named(&message), "send");
        let trace = TraceContext::current();
        if process == self.me {
            let delivery = Delivery {
                from: from.0,
                from_incarnation: from.1,
                message,
                trace,
            };
            self.deliver(to, incarnation, delivery);
            return;
        }
        let Some(sessions) = &self.sessions else {
            return;
        };
        let peer_incarnation = match read(&self.peers).get(&process) {
            Some(peer) => peer.incarnation,
            None => return,
        };
        let envelope = wire::Envelope {
            run_id: self.run_id,
            from: from.0,
            from_incarnation: from.1,
            to,
            to_incarnation: incarnation,
            trace,
        };
        match wire::encode(&envelope, message) {
            Encoded::Control(bytes) => sessions.send(process, peer_incarnation, bytes),
            Encoded::Tensor { header, payload } => {
                if let Some(peer) = read(&self.peers).get(&process) {
                    // A closed queue means that the peer just went; the protocol says it again.
                    let _ = peer.tensors.send(TensorFrame { header, payload });
                }
            }
        }
    }

    /// Hands a message to a local actor, if that life of it is here.
    pub(crate) fn deliver(&self, to: ActorAddress, incarnation: Option<u64>, delivery: Delivery) {
        let inbox = match read(&self.inboxes).get(&to) {
            Some((life, inbox)) if incarnation.is_none_or(|wanted| wanted == *life) => {
                inbox.clone()
            }
            _ => return,
        };
        inbox(delivery);
    }

    /// A tensor frame from another process.
    pub(crate) fn receive_frame(&self, peer: &str, frame: Frame) {
        match wire::decode_tensor(&frame.header, frame.payload) {
            Ok((envelope, message)) => self.receive(envelope, message),
            Err(error) => tracing::warn!(%error, peer, "tensor frame refused"),
        }
    }

    /// A decoded message from another process.
    pub(crate) fn receive(&self, envelope: wire::Envelope, message: ClusterMessage) {
        if envelope.run_id != self.run_id {
            tracing::warn!(from = ?envelope.from, "message of another run refused");
            return;
        }
        if let Some(process) = self.process_of(envelope.from)
            && let Some(peer) = read(&self.peers).get(&process)
        {
            *lock(&peer.heard) = Instant::now();
        }
        let delivery = Delivery {
            from: envelope.from,
            from_incarnation: envelope.from_incarnation,
            message,
            trace: envelope.trace,
        };
        self.deliver(envelope.to, envelope.to_incarnation, delivery);
    }

    /// A peer connected; its older life, if still here, is gone. Returns what tells this connection from others to the same life,
    /// and the frames to send over it.
    pub(crate) fn peer_up(
        &self,
        process: u32,
        incarnation: u64,
    ) -> (u64, mpsc::UnboundedReceiver<TensorFrame>) {
        let (tensors, queue) = mpsc::unbounded_channel();
        let link = self.links.fetch_add(1, Ordering::Relaxed);
        let peer = Peer {
            incarnation,
            link,
            heard: Mutex::new(Instant::now()),
            tensors,
        };
        let old = write(&self.peers).insert(process, peer);
        if let Some(old) = old.filter(|old| old.incarnation != incarnation) {
            self.tell_down(process, &old);
        }
        self.tell(PeerEvent::Up {
            process,
            incarnation,
        });
        (link, queue)
    }

    /// A life of a peer is over, as its agent saw.
    pub(crate) fn peer_down(&self, process: u32, incarnation: u64) {
        self.remove(process, |peer| peer.incarnation == incarnation);
    }

    /// A connection ended. If a newer one has taken its place, the peer is still there.
    pub(crate) fn link_down(&self, process: u32, link: u64) {
        self.remove(process, |peer| peer.link == link);
    }

    fn remove(&self, process: u32, is_it: impl Fn(&Peer) -> bool) {
        let gone = {
            let mut peers = write(&self.peers);
            if !peers.get(&process).is_some_and(is_it) {
                return;
            }
            peers.remove(&process)
        };
        if let Some(gone) = gone {
            self.tell_down(process, &gone);
        }
    }

    fn tell_down(&self, process: u32, peer: &Peer) {
        self.tell(PeerEvent::Down {
            process,
            incarnation: peer.incarnation,
            silent: lock(&peer.heard).elapsed(),
        });
    }

    /// Whether a peer is connected.
    pub(crate) fn is_up(&self, process: u32) -> bool {
        read(&self.peers).contains_key(&process)
    }

    /// Which life of a process is connected.
    pub(crate) fn life_of(&self, process: u32) -> Option<u64> {
        read(&self.peers).get(&process).map(|peer| peer.incarnation)
    }

    fn tell(&self, event: PeerEvent) {
        let listeners = lock(&self.listeners).clone();
        for listener in listeners {
            listener(event);
        }
    }
}

/// Shows a message without its tensors.
struct Named<'a>(&'a ClusterMessage);

impl std::fmt::Debug for Named<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        use everstep_protocol::Message;
        match self.0 {
            ClusterMessage::Batch { step, task, .. } => write!(f, "Batch {step:?} {task:?}"),
            ClusterMessage::Protocol(Message::Parameters { version, block, .. }) => {
                write!(f, "Parameters {version:?} {block}")
            }
            ClusterMessage::Protocol(Message::Partial {
                step, range, block, ..
            }) => write!(f, "Partial {step:?} {range:?} {block}"),
            ClusterMessage::Protocol(Message::Replicate { step, block, .. }) => {
                write!(f, "Replicate {step:?} {block}")
            }
            ClusterMessage::Protocol(Message::Seed { version, block, .. }) => {
                write!(f, "Seed {version:?} {block}")
            }
            other => write!(f, "{other:?}"),
        }
    }
}

/// Names the life of an actor that a message is from.
pub(crate) fn member_of(from: ActorAddress, incarnation: u64) -> Option<Member> {
    Some(Member {
        role: from.role.protocol()?,
        index: from.index,
        incarnation,
    })
}

// A panic while one of these locks is held cannot leave the maps half-changed, so poisoning carries no information here.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}
fn write<T>(lock: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}
