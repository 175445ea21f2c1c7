//! Strikes, detection of deaths true and false, and healing.

use everstep_protocol::coordinator::Event as CoordinatorEvent;
use everstep_protocol::{Member, Role};

use crate::process::Machine;
use crate::scenario::Fault;
use crate::world::{Happening, Local, Reason, World};

impl World<'_> {
    fn pick(&mut self, candidates: &[usize]) -> Option<usize> {
        if candidates.is_empty() {
            return None;
        }
        Some(candidates[self.random.below(candidates.len() as u64) as usize])
    }

    /// Hosts that run an actor of this role and are up.
    fn hosts_of(&self, role: Role) -> Vec<usize> {
        (0..self.hosts.len())
            .filter(|host| {
                self.hosts[*host].is_up
                    && self.hosts[*host].actors.iter().any(|actor| {
                        self.actors[*actor].member.role == role
                            && self.actors[*actor].machine.is_some()
                    })
            })
            .collect()
    }

    /// Hosts of the replicas of a random block, in the view of some leader.
    fn hosts_of_a_block(&mut self) -> Vec<usize> {
        let block = self.random.below(u64::from(self.scenario.num_blocks)) as usize;
        let view = self.actors.iter().find_map(|actor| match &actor.machine {
            Some(Machine::Coordinator(machine)) if machine.is_leading() => machine.view(),
            _ => None,
        });
        let mut hosts: Vec<usize> = view
            .and_then(|view| view.placements.get(block))
            .into_iter()
            .flat_map(|placement| placement.replicas())
            .filter_map(|member| self.actor_of(member))
            .map(|actor| self.actors[actor].host)
            .filter(|host| self.hosts[*host].is_up)
            .collect();
        hosts.sort_unstable();
        hosts.dedup();
        hosts
    }

    pub(crate) fn strike(&mut self, fault: Fault) {
        if !self.is_chaos || self.is_finished {
            return;
        }
        let up: Vec<usize> = (0..self.hosts.len())
            .filter(|host| self.hosts[*host].is_up)
            .collect();
        let struck = match fault {
            Fault::CrashWorker | Fault::CrashShard | Fault::CrashCoordinator => {
                let role = match fault {
                    Fault::CrashWorker => Role::Worker,
                    Fault::CrashShard => Role::Shard,
                    _ => Role::Coordinator,
                };
                let hosts = self.hosts_of(role);
                self.pick(&hosts).map(|host| self.crash(host)).is_some()
            }
            Fault::CrashAllShards => {
                let hosts = self.hosts_of(Role::Shard);
                let any = !hosts.is_empty();
                for host in hosts {
                    self.crash(host);
                }
                any
            }
            Fault::CrashBlock => {
                let hosts = self.hosts_of_a_block();
                let any = !hosts.is_empty();
                for host in hosts {
                    self.crash(host);
                }
                any
            }
            Fault::CrashAll => {
                let any = !up.is_empty();
                for host in up {
                    self.crash(host);
                }
                any
            }
            Fault::CrashMidway => {
                let actors: Vec<usize> = (0..self.actors.len())
                    .filter(|actor| self.actors[*actor].machine.is_some())
                    .collect();
                // Counted when it happens.
                if let Some(actor) = self.pick(&actors) {
                    self.actors[actor].torn = true;
                }
                false
            }
            Fault::Freeze => self.pick(&up).map(|host| self.freeze(host)).is_some(),
            Fault::Partition => {
                let side: Vec<bool> = (0..self.hosts.len())
                    .map(|_| self.random.below(2) == 0)
                    .collect();
                let pairs: Vec<(usize, usize)> = (0..side.len())
                    .flat_map(|from| (0..side.len()).map(move |to| (from, to)))
                    .filter(|(from, to)| side[*from] != side[*to])
                    .collect();
                self.cut(pairs)
            }
            Fault::OneWayCut => match (self.pick(&up), self.pick(&up)) {
                (Some(from), Some(to)) if from != to => self.cut(vec![(from, to)]),
                _ => false,
            },
            Fault::FalseSuspicion => {
                let members: Vec<usize> = (0..self.actors.len())
                    .filter(|actor| {
                        self.actors[*actor].machine.is_some()
                            && self.actors[*actor].member.role != Role::Coordinator
                    })
                    .collect();
                match self.pick(&members) {
                    Some(actor) => {
                        let member = self.actors[actor].member;
                        self.suspect(member, Reason::Whim, 0, 30);
                        true
                    }
                    None => false,
                }
            }
            _ => false,
        };
        if struck {
            self.count_fault(fault);
            self.say(|| format!("strike {fault}"));
        }
    }

    /// The protocol has just recovered from something, or is about to: a good moment for the next fault.
    pub(crate) fn shake(&mut self) {
        const AFTERSHOCKS_MAX: u64 = 8;
        let count = self
            .outcome
            .faults
            .get(&Fault::Aftershock)
            .copied()
            .unwrap_or(0);
        if !self.is_chaos
            || !self.scenario.faults.contains(&Fault::Aftershock)
            || count >= AFTERSHOCKS_MAX
            || self.random.below(3) == 0
        {
            return;
        }
        self.count_fault(Fault::Aftershock);
        let kinds = [
            Fault::CrashShard,
            Fault::CrashShard,
            Fault::CrashWorker,
            Fault::CrashCoordinator,
            Fault::FalseSuspicion,
            Fault::Freeze,
        ];
        let fault = kinds[self.random.below(kinds.len() as u64) as usize];
        let at_ms = self.after(0, 40);
        self.schedule(at_ms, Happening::Strike(fault));
    }

    /// Every coordinator's transport gives the member up, each at its own time.
    fn suspect(&mut self, member: Member, reason: Reason, low_ms: u64, high_ms: u64) {
        for coordinator in 0..self.scenario.num_coordinators as usize {
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
    pub(crate) fn crash(&mut self, host: usize) {
        if !self.hosts[host].is_up {
            return;
        }
        self.hosts[host].is_up = false;
        self.hosts[host].is_frozen = false;
        self.hosts[host].deferred.clear();
        for actor in self.hosts[host].actors.clone() {
            let member = self.actors[actor].member;
            self.stop(actor);
            self.say(|| format!("{member} dies"));
            if member.role != Role::Coordinator {
                self.suspect(member, Reason::Dead, 5, 200);
            }
        }
        let at_ms = self.after(20, 700);
        self.schedule(at_ms, Happening::StartHost(host));
    }

    fn freeze(&mut self, host: usize) {
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
        let at_ms = self.after(10, 1500);
        self.schedule(at_ms, Happening::Thaw(host));
    }

    pub(crate) fn thaw(&mut self, host: usize) {
        if !self.hosts[host].is_frozen {
            return;
        }
        self.hosts[host].is_frozen = false;
        self.say(|| format!("process {host} goes on"));
        for happening in std::mem::take(&mut self.hosts[host].deferred) {
            let now_ms = self.now_ms;
            self.schedule(now_ms, happening);
        }
    }

    fn cut(&mut self, pairs: Vec<(usize, usize)>) -> bool {
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
        let at_ms = self.after(20, 1500);
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
        self.network.mend_all();
        for host in 0..self.hosts.len() {
            self.thaw(host);
        }
        for actor in &mut self.actors {
            actor.torn = false;
        }
    }
}
