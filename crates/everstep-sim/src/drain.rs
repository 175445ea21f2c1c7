//! Processes that are told to leave: they say so to every leader until they are released.

use everstep_protocol::coordinator::Event as CoordinatorEvent;
use everstep_protocol::{Member, Role};

use crate::outcome::Recovery;
use crate::world::{Happening, Local, World};

impl World<'_> {
    /// Whether a process may be told to leave: coordinators are left to their shell.
    pub(crate) fn may_drain(&self, host: usize) -> bool {
        let state = &self.hosts[host];
        state.is_up
            && state.drains.is_none()
            && state
                .actors
                .iter()
                .all(|actor| self.actors[*actor].member.role != Role::Coordinator)
    }

    /// Processes that shall leave say so to the leader until they are released.
    pub(crate) fn announce_drains(&mut self, coordinator: usize) {
        let members: Vec<Member> = self
            .hosts
            .iter()
            .filter(|host| host.is_up && host.drains.is_some())
            .flat_map(|host| &host.actors)
            .filter(|actor| self.actors[**actor].machine.is_some())
            .map(|actor| self.actors[*actor].member)
            .collect();
        if members.is_empty() {
            return;
        }
        // Every third one is in a hurry.
        let seconds_left = (self.seed.is_multiple_of(3)).then_some(1);
        let incarnation = self.actors[coordinator].member.incarnation;
        let now_ms = self.now_ms;
        self.schedule(
            now_ms,
            Happening::Local {
                actor: coordinator,
                incarnation,
                event: Local::Coordinator(CoordinatorEvent::Drain {
                    members,
                    seconds_left,
                }),
            },
        );
    }

    /// A leader says that a member may go; its process goes with the last of them, and another life comes later.
    pub(crate) fn release(&mut self, member: Member) {
        let Some(actor) = self.actor_of(member) else {
            return;
        };
        let host = self.actors[actor].host;
        if self.actors[actor].member != member || !self.hosts[host].is_up {
            return;
        }
        let actors = self.hosts[host].actors.clone();
        let Some(released) = &mut self.hosts[host].drains else {
            return;
        };
        released.insert(actor);
        if actors.iter().all(|actor| released.contains(actor)) && !self.hosts[host].is_frozen {
            self.count(Recovery::Drained);
            self.say(|| format!("process {host} leaves"));
            self.crash(host, None);
        }
    }
}
