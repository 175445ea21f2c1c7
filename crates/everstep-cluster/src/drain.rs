//! A node that shall leave: who asks for it, and when a process of it may go.
//!
//! ```text
//! everstep drain, notice ─▶ agent ─▶ its processes ── Drain, until those lives are gone ──▶ coordinators
//! leader: moves what the members hold, then says Released to each actor ─▶ the process ends as drained; the leader's own goes last
//! ```
//!
//! Leaders forget, so the request is repeated: a new leader hears of it within [`REPEAT`].

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use crate::message::ClusterMessage;
use crate::process::{Ending, ProcessContext};
use crate::topology::{ActorAddress, ActorRole};

const REPEAT: Duration = Duration::from_millis(200);

impl ProcessContext {
    /// Tells the coordinators that the processes of a node shall leave, until those lives of them are gone.
    ///
    /// # Errors
    /// In words, that no process of the node is there.
    pub(crate) fn request_drain(
        self: &Arc<Self>,
        node: &str,
        seconds_left: Option<u64>,
    ) -> Result<(), String> {
        let lives = self.lives_of(node);
        if lives.is_empty() {
            return Err(format!("no process of node {node} is connected now"));
        }
        let deadline = seconds_left.map(|seconds| Instant::now() + Duration::from_secs(seconds));
        tracing::info!(node, ?lives, seconds_left, "shall leave");
        self.runtime.spawn(repeat(self.clone(), lives, deadline));
        Ok(())
    }

    /// Processes of a node and their lives, as far as they are connected.
    fn lives_of(&self, node: &str) -> Vec<(u32, u64)> {
        (0..)
            .zip(&self.run.topology.processes)
            .filter(|(_, process)| process.node == node)
            .filter_map(|(number, _)| Some((number, self.life_of(number)?)))
            .collect()
    }

    fn life_of(&self, process: u32) -> Option<u64> {
        if process == self.process {
            Some(self.incarnation)
        } else {
            self.router.life_of(process)
        }
    }

    /// Nothing refers to an actor of this process any more; with the last of them the process may go.
    pub(crate) fn released(&self, actor: ActorAddress) {
        let mut released = self.released.lock().unwrap_or_else(PoisonError::into_inner);
        released.insert(actor);
        let is_free = self
            .run
            .topology
            .actors()
            .filter(|(_, process)| *process == self.process)
            .all(|(actor, _)| released.contains(&actor));
        if is_free {
            tracing::info!("drained");
            self.end(Ending::Drained);
        }
    }
}

async fn repeat(
    context: Arc<ProcessContext>,
    mut lives: Vec<(u32, u64)>,
    deadline: Option<Instant>,
) {
    let own = context
        .run
        .topology
        .actors()
        .find(|(_, process)| *process == context.process);
    let Some((own, _)) = own else {
        return;
    };
    while !lives.is_empty() {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let message = ClusterMessage::Drain {
            processes: lives.clone(),
            seconds_left: left.map(|left| left.as_secs()),
        };
        for coordinator in context.router.actors(ActorRole::Coordinator) {
            context
                .router
                .send((own, context.incarnation), coordinator, message.clone());
        }
        tokio::time::sleep(REPEAT).await;
        lives.retain(|(process, life)| context.life_of(*process) == Some(*life));
    }
}
