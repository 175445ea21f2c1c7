//! What the machine notes, as events of the run.

use std::time::{Instant, SystemTime};

use everstep_protocol::coordinator::Note;
use everstep_protocol::{Digest, Epoch, Member};

use super::CoordinatorState;
use crate::topology::{ActorAddress, ActorRole};

impl CoordinatorState {
    /// Tells of a worker or shard process that is gone before this leader had heard of its members: it was lost together with the leader
    /// before, say.
    pub(super) fn lost_before_it_joined(&self, process: u32) {
        let is_known = |member: &Member| {
            let address = ActorAddress {
                role: member.role.into(),
                index: member.index,
            };
            self.context.router.process_of(address) == Some(process)
        };
        if !self.machine.is_leading() || self.is_outdated() || self.members.iter().any(is_known) {
            return;
        }
        let topology = &self.context.run.topology;
        let homed = topology.actors().filter(|(_, home)| *home == process);
        let roles: Vec<String> = homed
            .filter(|(actor, _)| matches!(actor.role, ActorRole::Worker | ActorRole::Shard))
            .map(|(actor, _)| actor.role.name().to_owned())
            .collect();
        if roles.is_empty() {
            return;
        }
        let (process, node) = self.context.name_and_node(process);
        self.context.event(&everstep_telemetry::Event::ProcessLost {
            process,
            node,
            roles,
            step: Some(self.machine.step().0),
            epoch: Some(self.epoch.unwrap_or_default().0),
            reason: "its connection ended before it had joined this leader".to_owned(),
        });
    }

    /// Logs what the machine noted.
    pub(super) fn note(&mut self, note: Note) {
        use everstep_telemetry::Event as Log;
        let epoch = self.epoch.unwrap_or_default().0;
        let step = self.machine.step().0;
        tracing::info!(?note, "noted");
        match note {
            // What it cannot reach is not gone: it was away itself.
            Note::MemberLost { .. } if self.is_outdated() => {}
            Note::MemberLost { member } => {
                let (process, node) = self.whereabouts(member);
                let role = ActorRole::from(member.role).name();
                self.recoveries.lost(
                    Instant::now(),
                    role,
                    (process.clone(), node.clone()),
                    self.silent,
                );
                let roles = vec![role.to_owned()];
                let reason = format!("{member} is gone");
                self.context.event(&Log::ProcessLost {
                    process,
                    node,
                    roles,
                    step: Some(step),
                    epoch: Some(epoch),
                    reason,
                });
            }
            Note::Expelled { member } => {
                self.refusals.lost(&self.context, member, Epoch(epoch));
            }
            Note::Refused { from, epoch: stale } => {
                self.refusals
                    .leader(&self.context, from, stale, Epoch(epoch));
            }
            Note::SlotsReassigned {
                step,
                slots,
                from,
                lost,
            } => {
                if lost {
                    let (process, _) = self.whereabouts(from);
                    self.recoveries
                        .slots_reassigned(&process, slots.len() as u64);
                }
                let reason = if lost {
                    "its holder is gone"
                } else {
                    "its holder is slow"
                };
                for slot in slots {
                    self.context.event(&Log::SlotReassigned {
                        step: step.0,
                        epoch,
                        slot: u64::from(slot),
                        from: from.to_string(),
                        reason: reason.to_owned(),
                    });
                }
            }
            Note::ShardPromoted { member, blocks } => {
                let (process, node) = self.whereabouts(member);
                let view = self.machine.view().map_or(0, |view| view.number);
                self.context.event(&Log::ShardPromoted {
                    process,
                    node,
                    blocks,
                    step,
                    epoch,
                    view,
                });
            }
            Note::BackupSeeded { member, blocks } => {
                let (process, node) = self.whereabouts(member);
                self.context.event(&Log::BackupSeeded {
                    process,
                    node,
                    blocks,
                    step,
                    epoch,
                });
            }
            Note::Rollback { to, from, .. } => {
                let own = (
                    self.context.name().to_owned(),
                    self.context.node().to_owned(),
                );
                self.recoveries
                    .rolled_back(Instant::now(), own, from.0.saturating_sub(to.0));
                let reason = "no live replica holds every block".to_owned();
                self.context.event(&Log::Rollback {
                    from_step: from.0,
                    to_step: to.0,
                    epoch,
                    reason,
                });
            }
            Note::AuditMismatch {
                step,
                slot,
                testimonies,
            } => {
                let said = |(worker, digest): &(Member, Digest)| format!("{worker}: {digest}");
                self.context.event(&Log::AuditMismatch {
                    step: step.0,
                    epoch,
                    slot: u64::from(slot),
                    digests: testimonies.iter().map(said).collect(),
                });
            }
            Note::WorkerQuarantined {
                worker,
                step,
                slot,
                lied,
                truth,
                permanent,
            } => {
                let (process, node) = self.whereabouts(worker);
                if permanent {
                    self.record_quarantine(everstep_store::Quarantine {
                        worker: worker.index,
                        process: process.clone(),
                        node: node.clone(),
                        step: step.0,
                        slot: Some(slot),
                        lied: Some(lied.to_string()),
                        truth: truth.map(|truth| truth.to_string()),
                        time: everstep_telemetry::timestamp(SystemTime::now()),
                    });
                }
                tracing::error!(%worker, process, node, step = step.0, slot, "a device lied");
                self.context.event(&Log::WorkerQuarantined {
                    worker: worker.to_string(),
                    process,
                    node,
                    step: step.0,
                    epoch,
                    slot: u64::from(slot),
                    lied: lied.to_string(),
                    truth: truth.map(|truth| truth.to_string()),
                    permanent,
                });
            }
            Note::CheckpointAbandoned { version } => {
                let reason = "a snapshot was lost with its shard".to_owned();
                self.context.event(&Log::CheckpointAbandoned {
                    step: version.0,
                    epoch,
                    reason,
                });
            }
            Note::CheckpointSuperseded { version, by } => {
                let reason = format!(
                    "the store is away, or slower than checkpoints are due; the one of step {} takes its place",
                    by.0
                );
                self.context.event(&Log::CheckpointAbandoned {
                    step: version.0,
                    epoch,
                    reason,
                });
            }
            Note::DrainFinished {
                member, num_moved, ..
            } => self.moved(member, num_moved),
            Note::DrainHolds { version } => self.context.event(&Log::DrainHolds {
                step: version.0,
                epoch,
            }),
            Note::MemberLeft { .. }
            | Note::DrainStarted { .. }
            | Note::MemberJoined { .. }
            | Note::Degraded { .. }
            | Note::Resumed { .. }
            | Note::CheckpointCommitted { .. } => {}
        }
    }
}
