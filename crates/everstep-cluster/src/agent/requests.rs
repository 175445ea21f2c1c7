//! What is asked of the agent: by its processes, by users and tools, by the machine's provider.

use std::time::Duration;

use everstep_telemetry::Event;
use tokio::sync::oneshot;

use super::Agent;
use super::server::Said;
use crate::control::{Notice, ProcessMessage, Reply, Request};
use crate::life::Body;
use crate::status::ProcessState;

/// Kept of the time that a notice gives: the agent and its processes must be gone before it is up.
const MARGIN: Duration = Duration::from_secs(2);

/// The machine will be taken away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreemptionNotice {
    /// Who says so: `sigterm`, `slurm`, `aws`, `gcp` or `azure`.
    pub source: String,
    /// In how many seconds, if that is known.
    pub seconds_left: Option<u64>,
}

/// What an agent is told from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentSignal {
    /// End the open step, commit it, and stop; the run goes on another time.
    Leave,
    /// Stop everything now; the run goes on from the last checkpoint another time.
    Stop,
    /// Leave the cluster in good order, and be gone in time.
    Preempted(PreemptionNotice),
}

/// A request that a process answers.
#[derive(Debug)]
pub(super) struct Asked {
    /// The process's connection.
    link: u64,
    /// Whoever waits for it; none if the agent itself asked.
    reply: Option<oneshot::Sender<Reply>>,
    /// The own node that is leaving if the answer is yes.
    leaves: Option<String>,
}

fn refused(message: String) -> Reply {
    Reply::Refused { message }
}

impl Agent {
    pub(super) fn said(&mut self, said: Said) {
        match said {
            Said::Hello {
                process,
                incarnation,
                pid,
                link,
            } => {
                let known = self.slots.iter().position(|slot| slot.process == process);
                // One that an agent started and did not live to write down.
                if let (Some(slot), Some(body)) = (known, Body::of(pid))
                    && self.slots[slot].alive.is_none()
                    && self.slots[slot].state == ProcessState::Restarting
                {
                    self.adopt(slot, body);
                }
                let slot = known.map(|slot| &mut self.slots[slot]);
                let alive = slot.and_then(|slot| {
                    let alive = slot.alive.as_mut().filter(|alive| alive.body.pid == pid)?;
                    slot.has_joined = true;
                    Some(alive)
                });
                let Some(alive) = alive else {
                    tracing::warn!(process, pid, incarnation, "is not wanted and told to end");
                    link.send(Notice::Stop);
                    return;
                };
                alive.has_joined = true;
                alive.watch.linked();
                alive.link = Some(link);
            }
            Said::Message { link, message } => self.message(link, message),
            Said::Gone { link } => {
                self.asked.retain(|_, asked| asked.link != link);
                for alive in self.slots.iter_mut().filter_map(|slot| slot.alive.as_mut()) {
                    alive.link.take_if(|own| own.id == link);
                }
            }
            Said::Request {
                node,
                request:
                    Request::Drain {
                        node: leaves,
                        seconds_left,
                    },
                reply,
            } => {
                tracing::info!(node, leaves, "drain is asked for");
                self.drain(&leaves, seconds_left, Some(reply));
            }
            Said::Request {
                node,
                request: Request::Inject { process, fault },
                reply,
            } => {
                let own: Vec<String> = (0..self.slots.len())
                    .filter(|slot| self.node(*slot) == node)
                    .map(|slot| self.name(slot))
                    .collect();
                let Some(slot) = (0..self.slots.len())
                    .find(|slot| self.name(*slot) == process && own.contains(&process))
                else {
                    let message = format!(
                        "there is no process {process} on node {node}; its processes are: {}",
                        own.join(", ")
                    );
                    let _ = reply.send(refused(message));
                    return;
                };
                self.ask(slot, Some(reply), None, |id| Notice::Inject { id, fault });
            }
        }
    }

    fn message(&mut self, link: u64, message: ProcessMessage) {
        match message {
            ProcessMessage::Pulse { devices } => {
                let mut alive = self.slots.iter_mut().filter_map(|slot| slot.alive.as_mut());
                let own = alive.find(|alive| alive.link.as_ref().is_some_and(|own| own.id == link));
                if let Some(alive) = own {
                    alive.watch.pulse(&devices);
                }
            }
            ProcessMessage::Answer { id, reply } => {
                let Some(asked) = self.asked.remove(&id) else {
                    return;
                };
                match (&reply, asked.leaves) {
                    (Reply::Done, Some(node)) => {
                        self.leaving.insert(node);
                    }
                    (Reply::Refused { message }, _) => tracing::warn!(message, "refused"),
                    _ => {}
                }
                if let Some(waits) = asked.reply {
                    let _ = waits.send(reply);
                }
            }
            ProcessMessage::Hello { .. } => tracing::warn!("a second hello"),
        }
    }

    /// Has the processes of this agent tell the coordinators that a node, own or not, is to be drained; false if they cannot.
    fn drain(
        &mut self,
        node: &str,
        seconds_left: Option<u64>,
        reply: Option<oneshot::Sender<Reply>>,
    ) -> bool {
        let nodes = self.options.topology.nodes();
        let complaint = if nodes.iter().any(|known| known == node) {
            None
        } else {
            let nodes = nodes.join(", ");
            Some(format!("there is no node {node}; nodes are: {nodes}"))
        };
        let is_linked = |slot: &usize| {
            let alive = self.slots[*slot].alive.as_ref();
            alive.is_some_and(|alive| alive.link.is_some() && alive.hung_ms.is_none())
        };
        let linked: Vec<usize> = (0..self.slots.len()).filter(is_linked).collect();
        let complaint = complaint.or_else(|| {
            let nobody = "no process is there that could tell the coordinators; try again";
            linked.is_empty().then(|| nobody.to_owned())
        });
        if let Some(message) = complaint {
            tracing::warn!(message, "drain");
            if let Some(reply) = reply {
                let _ = reply.send(refused(message));
            }
            return false;
        }
        let own = self.options.nodes.iter().any(|own| own == node);
        let mut leaves = own.then(|| node.to_owned());
        let mut reply = reply;
        // All are told: those that are left go on saying it when one is gone. The first one's answer counts.
        for slot in linked {
            let node = node.to_owned();
            self.ask(slot, reply.take(), leaves.take(), |id| Notice::Drain {
                id,
                node,
                seconds_left,
            });
        }
        true
    }

    /// Has everything of this agent drained; false if nobody is there to do it.
    pub(super) fn leave(&mut self) -> bool {
        let nodes = self.options.nodes.clone();
        nodes.iter().all(|node| self.drain(node, None, None))
    }

    fn ask(
        &mut self,
        slot: usize,
        reply: Option<oneshot::Sender<Reply>>,
        leaves: Option<String>,
        notice: impl FnOnce(u64) -> Notice,
    ) {
        let id = self.next_id;
        self.next_id += 1;
        let alive = self.slots[slot].alive.as_ref();
        let link = alive.and_then(|alive| alive.link.as_ref());
        match link {
            Some(link) if link.send(notice(id)) => {
                let link = link.id;
                self.asked.insert(
                    id,
                    Asked {
                        link,
                        reply,
                        leaves,
                    },
                );
            }
            _ => {
                let message = format!("process {} does not answer now", self.name(slot));
                if let Some(reply) = reply {
                    let _ = reply.send(refused(message));
                }
            }
        }
    }

    /// The machine is going away: its nodes are drained, and what is left is stopped in time.
    pub(super) fn preempted(&mut self, notice: &PreemptionNotice) {
        if let Some(seconds) = notice.seconds_left {
            let left = Duration::from_secs(seconds).saturating_sub(MARGIN);
            let deadline = tokio::time::Instant::now() + left;
            // A second notice may only shorten the time.
            self.deadline = Some(self.deadline.map_or(deadline, |known| known.min(deadline)));
        }
        for node in self.options.nodes.clone() {
            self.log(&Event::PreemptionNotice {
                source: notice.source.clone(),
                node: node.clone(),
                seconds_left: notice.seconds_left,
            });
            self.drain(&node, notice.seconds_left, None);
        }
    }
}
