//! What the leader does for processes that shall leave, beside what its machine does for their members.

use std::time::Instant;

use everstep_protocol::Member;
use everstep_protocol::coordinator::Event;
use everstep_telemetry::Event as Log;
use ractor::{ActorProcessingErr, ActorRef};

use super::{CoordinatorMessage, CoordinatorState};
use crate::message::ClusterMessage;
use crate::process::{ProcessContext, process_life};
use crate::topology::{ActorAddress, ActorRole};

/// A process that shall leave.
pub(super) struct Leaving {
    /// Which life of it.
    life: u64,
    since: Instant,
    /// Replicas of its shards that others hold in their place.
    num_moved: u64,
    /// Its other actors were told that they may go.
    is_released: bool,
}

impl CoordinatorState {
    /// Lives of processes shall leave.
    pub(super) fn drain(
        &mut self,
        myself: &ActorRef<CoordinatorMessage>,
        processes: Vec<(u32, u64)>,
        seconds_left: Option<u64>,
    ) -> Result<(), ActorProcessingErr> {
        if !self.machine.is_leading() {
            return Ok(());
        }
        let own = (self.context.process, self.context.incarnation);
        for (process, life) in processes {
            let is_there =
                (process, life) == own || self.context.router.life_of(process) == Some(life);
            if !is_there {
                continue;
            }
            if self
                .leaving
                .get(&process)
                .is_none_or(|known| known.life != life)
            {
                let (process_name, node) = self.context.name_and_node(process);
                self.context.event(&Log::DrainStarted {
                    process: process_name,
                    node,
                    step: self.machine.step().0,
                    epoch: self.epoch.unwrap_or_default().0,
                    seconds_left,
                });
                self.leaving.insert(
                    process,
                    Leaving {
                        life,
                        since: Instant::now(),
                        num_moved: 0,
                        is_released: false,
                    },
                );
            }
            let members = self.members_of(process, life);
            if !members.is_empty() {
                self.step(
                    myself,
                    Event::Drain {
                        members,
                        seconds_left,
                    },
                )?;
            }
        }
        Ok(())
    }

    /// Members of one life of a process that this coordinator has heard.
    pub(super) fn members_of(&self, process: u32, life: u64) -> Vec<Member> {
        let in_process = |member: &&Member| {
            self.context.router.process_of(address_of(**member)) == Some(process)
                && process_life(member.incarnation) == life
        };
        self.members.iter().filter(in_process).copied().collect()
    }

    /// A member that holds nothing any more may go.
    pub(super) fn release(&self, member: Member) {
        self.context.router.send_member(
            (self.address, self.me.incarnation),
            member,
            ClusterMessage::Released,
        );
    }

    pub(super) fn moved(&mut self, member: Member, num_moved: u32) {
        let process = self.context.router.process_of(address_of(member));
        if let Some(leaving) = process.and_then(|process| self.leaving.get_mut(&process)) {
            leaving.num_moved += u64::from(num_moved);
        }
    }

    /// When no member has anything left to hand over, loaders and standbys may go, and last the leader itself.
    pub(super) fn tend_leaving(&mut self) {
        if self.leaving.is_empty() {
            return;
        }
        if !self.machine.is_leading() {
            self.leaving.clear();
            return;
        }
        let is_busy = |(process, leaving): (&u32, &Leaving)| {
            let members = self.members_of(*process, leaving.life);
            let mut draining = self.machine.draining();
            draining.any(|(member, is_released)| members.contains(&member) && !is_released)
        };
        if self.leaving.iter().any(is_busy) {
            return;
        }
        let own = self.context.process;
        for (process, leaving) in &mut self.leaving {
            if *process != own && !leaving.is_released {
                leaving.is_released = true;
                for actor in helpers_of(&self.context, *process) {
                    let from = (self.address, self.me.incarnation);
                    self.context
                        .router
                        .send(from, actor, ClusterMessage::Released);
                }
            }
        }
        if self.leaving.keys().all(|process| *process == own) {
            self.left(own);
            for actor in helpers_of(&self.context, own) {
                self.context.released(actor);
            }
        }
    }

    /// A process is gone.
    pub(super) fn gone(&mut self, process: u32, life: u64) {
        if self
            .leaving
            .get(&process)
            .is_some_and(|leaving| leaving.life == life)
        {
            self.left(process);
        }
    }

    fn left(&mut self, process: u32) {
        let Some(leaving) = self.leaving.remove(&process) else {
            return;
        };
        let (name, node) = self.context.name_and_node(process);
        self.context.event(&Log::DrainFinished {
            process: name,
            node,
            step: self.machine.step().0,
            epoch: self.epoch.unwrap_or_default().0,
            seconds: leaving.since.elapsed().as_secs_f64(),
            blocks_moved: leaving.num_moved,
        });
    }
}

/// Actors of a process that hold nothing which others would have to take.
fn helpers_of(context: &ProcessContext, process: u32) -> Vec<ActorAddress> {
    let holds = |actor: ActorAddress| matches!(actor.role, ActorRole::Worker | ActorRole::Shard);
    let actors = context.run.topology.actors();
    actors
        .filter(|(actor, home)| *home == process && !holds(*actor))
        .map(|(actor, _)| actor)
        .collect()
}

fn address_of(member: Member) -> ActorAddress {
    ActorAddress {
        role: member.role.into(),
        index: member.index,
    }
}
