//! What really happened in a disturbed run. Times are seconds since the run was started.

use serde::Serialize;

use crate::process::{Identity, Usage};
use crate::proxy::link::LinkCounts;

/// A step's commit, as `metrics.jsonl` tells it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Commit {
    /// When.
    pub at: f64,
    /// Steps committed.
    pub step: u64,
}

/// One life of a process.
#[derive(Debug, Clone, Serialize)]
pub struct Life {
    /// Name of the process; `agent NODE` for an agent.
    pub process: String,
    /// Node.
    pub node: String,
    /// Roles.
    pub roles: Vec<String>,
    /// Pid and start.
    pub identity: Identity,
    /// When it was first seen.
    pub from: f64,
    /// When it was seen to be gone.
    pub to: Option<f64>,
    /// What it used, over time.
    #[serde(skip)]
    pub usage: Vec<(f64, Usage)>,
}

/// Somebody whom a fault struck.
#[derive(Debug, Clone, Serialize)]
pub struct Victim {
    /// Name of the process.
    pub process: String,
    /// Its node.
    pub node: String,
    /// Pid and start of the life that was struck.
    pub identity: Identity,
    /// When.
    pub at: f64,
    /// Whether it ran right before.
    pub was_alive: bool,
    /// Whether the fault was seen to have its effect: dead after a kill, stopped after a pause, accepted after an injection.
    pub took_effect: bool,
    /// When another life of the process was seen.
    pub replaced_at: Option<f64>,
}

/// A fault that was carried out, or that could not be.
#[derive(Debug, Clone, Serialize)]
pub struct FaultRecord {
    /// Kind and target.
    pub label: String,
    /// Kind.
    pub kind: String,
    /// Where it stands in the scenario.
    pub place: String,
    /// When it struck.
    pub at: f64,
    /// When it was over: the pause ended, the store came back. None for kills, or if it lasted to the end.
    pub until: Option<f64>,
    /// Steps committed when it struck.
    pub step: u64,
    /// Whom it struck; nobody, if it struck the store.
    pub victims: Vec<Victim>,
    /// Whether all of it really happened.
    pub happened: bool,
    /// What the proxies did to the datagrams of its links, for a network fault that is over.
    pub network: Option<LinkCounts>,
    /// How many requests to the store suffered, for a fault of requests that is over.
    pub requests: Option<u64>,
    /// The object that was damaged, by its key inside the run.
    pub object: Option<String>,
    /// What else there is to know, such as why it did not happen.
    pub note: Option<String>,
}

impl FaultRecord {
    /// Whether all its killed victims have another life.
    #[must_use]
    pub fn is_replaced(&self) -> bool {
        self.victims
            .iter()
            .all(|victim| victim.replaced_at.is_some())
    }
}
