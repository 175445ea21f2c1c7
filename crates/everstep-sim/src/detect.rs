//! Deaths, freezes and cuts, how coordinators notice them (or think they do), and healing.

use everstep_protocol::coordinator::Event as CoordinatorEvent;
use everstep_protocol::{Member, Role};

use crate::world::{Happening, Local, World};

/// Why a member is given up.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reason {
    Dead,
    Frozen,
    Cut,
    Whim,
}

impl World<'_> {
    /// Every coordinator's transport gives the member up, each at its own time.
    pub(crate) fn suspect(&mut self, member: Member, reason: Reason, low_ms: u64, high_ms: u64) {
        for coordinator in 0..self.plan.topology.num_coordinators as usize {
            let at_ms = self.after(low_ms, high_ms);
            self.schedule(
                at_ms,
                Happening::Detect {
                    coordinator,
                    member,
                    reason,
                },
            );
        }
    }

    /// A process dies; what it had not said is lost, and it comes back empty.
    pub(crate) fn crash(&mut self, host: usize, down_ms: Option<u64>) {
        if !self.hosts[host].is_up {
            return;
        }
        self.hosts[host].is_up = false;
        self.hosts[host].is_frozen = false;
        self.hosts[host].drains = None;
        self.hosts[host].frozen_until_ms = 0;
        self.hosts[host].deferred.clear();
        for actor in self.hosts[host].actors.clone() {
            let member = self.actors[actor].member;
            self.stop(actor);
            self.say(|| format!("{member} dies"));
            if member.role != Role::Coordinator {
                self.suspect(member, Reason::Dead, 5, 200);
            }
        }
        let at_ms = match down_ms {
            Some(down_ms) => self.now_ms + down_ms,
            None => self.after(20, 700),
        };
        self.schedule(at_ms, Happening::StartHost(host));
    }

    pub(crate) fn freeze(&mut self, host: usize, for_ms: u64) {
        let until_ms = self.now_ms + for_ms;
        let state = &mut self.hosts[host];
        state.frozen_until_ms = state.frozen_until_ms.max(until_ms);
        self.schedule(until_ms, Happening::Thaw(host));
        if self.hosts[host].is_frozen {
            return;
        }
        self.hosts[host].is_frozen = true;
        for actor in self.hosts[host].actors.clone() {
            let member = self.actors[actor].member;
            self.say(|| format!("{member} freezes"));
            if member.role != Role::Coordinator {
                self.suspect(member, Reason::Frozen, 100, 300);
            }
        }
    }

    pub(crate) fn thaw(&mut self, host: usize) {
        let state = &mut self.hosts[host];
        if !state.is_frozen || (self.is_chaos && self.now_ms < state.frozen_until_ms) {
            return;
        }
        state.is_frozen = false;
        state.frozen_until_ms = 0;
        self.observe_waking(host);
        self.say(|| format!("process {host} goes on"));
        for happening in std::mem::take(&mut self.hosts[host].deferred) {
            let now_ms = self.now_ms;
            self.schedule(now_ms, happening);
        }
    }

    pub(crate) fn cut(&mut self, pairs: Vec<(usize, usize)>, for_ms: u64) -> bool {
        if pairs.is_empty() {
            return false;
        }
        self.say(|| format!("cut {pairs:?}"));
        // A coordinator that hears nothing from a member any more gives it up.
        for (from, to) in &pairs {
            for coordinator in self.hosts[*to].actors.clone() {
                if self.actors[coordinator].member.role != Role::Coordinator {
                    continue;
                }
                for actor in self.hosts[*from].actors.clone() {
                    let member = self.actors[actor].member;
                    if member.role != Role::Coordinator {
                        let at_ms = self.after(100, 300);
                        self.schedule(
                            at_ms,
                            Happening::Detect {
                                coordinator,
                                member,
                                reason: Reason::Cut,
                            },
                        );
                    }
                }
            }
        }
        let number = self.network.sever(pairs);
        let at_ms = self.now_ms + for_ms;
        self.schedule(at_ms, Happening::Mend(number));
        true
    }

    pub(crate) fn detect(&mut self, coordinator: usize, member: Member, reason: Reason) {
        let Some(actor) = self.actor_of(member) else {
            return;
        };
        let host = self.actors[actor].host;
        let same_life = self.actors[actor].member == member;
        let holds = match reason {
            Reason::Dead | Reason::Whim => true,
            Reason::Frozen => same_life && self.hosts[host].is_frozen,
            Reason::Cut => self.network.is_cut(host, self.actors[coordinator].host),
        };
        if !holds || self.actors[coordinator].machine.is_none() {
            return;
        }
        let incarnation = self.actors[coordinator].member.incarnation;
        self.say(|| format!("coordinator-{coordinator} gives up {member}: {reason:?}"));
        let now_ms = self.now_ms;
        self.schedule(
            now_ms,
            Happening::Local {
                actor: coordinator,
                incarnation,
                event: Local::Coordinator(CoordinatorEvent::Lost { member }),
            },
        );
    }

    /// The weather clears and everybody comes back. From here on the run must finish.
    pub(crate) fn heal(&mut self) {
        if !self.is_chaos {
            return;
        }
        self.say(|| "everything heals".to_owned());
        self.is_chaos = false;
        self.start_clock();
        self.weather.clear();
        self.network.mend_all();
        for host in 0..self.hosts.len() {
            self.thaw(host);
        }
        for actor in &mut self.actors {
            actor.torn = false;
        }
    }
}
