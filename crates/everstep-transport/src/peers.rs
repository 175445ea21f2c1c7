//! One connection per pair of processes: which one stays when there are two.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::hello::Hello;
use crate::reason::{CloseReason, Refusal, RefusalKind};

/// A connection and the reason for which this side ended it, if it did.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    pub(crate) quinn: quinn::Connection,
    verdict: Arc<OnceLock<CloseReason>>,
}

impl Link {
    pub(crate) fn new(quinn: quinn::Connection) -> Self {
        Self {
            quinn,
            verdict: Arc::default(),
        }
    }

    /// Closes the connection for a reason; the first reason stays.
    pub(crate) fn close(&self, reason: CloseReason) {
        if self.quinn.close_reason().is_none() {
            let (code, text) = reason.to_wire();
            let _ = self.verdict.set(reason);
            self.quinn.close(code, text.as_bytes());
        }
    }

    /// Why the connection ended, given what QUIC says.
    pub(crate) fn reason(&self, error: quinn::ConnectionError) -> CloseReason {
        match (&error, self.verdict.get()) {
            (quinn::ConnectionError::LocallyClosed, Some(reason)) => reason.clone(),
            _ => error.into(),
        }
    }
}

/// Who opened a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialled {
    ByUs,
    ByPeer,
}

#[derive(Debug)]
struct Entry {
    incarnation: u64,
    dialled: Dialled,
    link: Link,
}

/// The live connections of an endpoint, by the peer's name.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    entries: Mutex<BTreeMap<String, Entry>>,
}

impl Peers {
    /// Takes a new connection in, closing the one it replaces, or refuses it.
    ///
    /// A newer incarnation replaces an older one. Of two connections between the same two processes, the later one
    /// stays if the same side dialled both (it gave the first one up), and otherwise the one that the process with
    /// the smaller name dialled: both sides come to the same choice whichever they saw first.
    pub(crate) fn admit(
        &self,
        ours: &str,
        peer: &Hello,
        dialled: Dialled,
        link: &Link,
    ) -> Result<(), Refusal> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|_, entry| entry.link.quinn.close_reason().is_none());
        if let Some(old) = entries.get(&peer.name) {
            if peer.incarnation < old.incarnation {
                let text = format!(
                    "process `{}` is connected as incarnation `{}`, this is `{}`",
                    peer.name, old.incarnation, peer.incarnation
                );
                return Err(Refusal {
                    kind: RefusalKind::Stale,
                    text,
                });
            }
            let preferred = if ours < peer.name.as_str() {
                Dialled::ByUs
            } else {
                Dialled::ByPeer
            };
            if peer.incarnation > old.incarnation {
                old.link.close(CloseReason::Restarted);
            } else if dialled == old.dialled || dialled == preferred {
                old.link.close(CloseReason::Superseded);
            } else {
                let text = format!("process `{}` is connected already", peer.name);
                return Err(Refusal {
                    kind: RefusalKind::Duplicate,
                    text,
                });
            }
        }
        let entry = Entry {
            incarnation: peer.incarnation,
            dialled,
            link: link.clone(),
        };
        entries.insert(peer.name.clone(), entry);
        Ok(())
    }
}
