//! The simulated cluster: processes, virtual time, and the queue of what happens next.

use std::collections::BTreeMap;

use everstep_protocol::coordinator::Event as CoordinatorEvent;
use everstep_protocol::random::{Purpose, Stream};
use everstep_protocol::shard::Event as ShardEvent;
use everstep_protocol::worker::Event as WorkerEvent;
use everstep_protocol::{Member, Message, Role};

use crate::check::Checker;
use crate::network::Network;
use crate::outcome::{Outcome, Recovery};
use crate::process::{Actor, Host};
use crate::scenario::{Fault, Scenario};
use crate::store::{Store, Write};
use crate::toy::{Expected, Toy};

/// Something that happens to one life of an actor.
#[derive(Debug)]
pub(crate) enum Local {
    Start,
    Wake,
    Coordinator(CoordinatorEvent<Toy>),
    Shard(ShardEvent<Toy>),
    Worker(WorkerEvent<Toy>),
    /// The device is done with its task.
    Device,
    /// A coordinator's shell looks whether somebody leads.
    Campaign,
}

/// Something that happens.
#[derive(Debug)]
pub(crate) enum Happening {
    Deliver {
        from: Member,
        to: Member,
        message: Message<Toy>,
    },
    Local {
        actor: usize,
        incarnation: u64,
        event: Local,
    },
    StartHost(usize),
    StartActor(usize),
    Strike(Fault),
    Thaw(usize),
    /// Ends a partition.
    Mend(u64),
    /// A coordinator's transport gives a member up, if the reason still holds.
    Detect {
        coordinator: usize,
        member: Member,
        reason: Reason,
    },
    /// A store operation is over.
    Written(Write),
    Heal,
}

/// Why a member is given up.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reason {
    Dead,
    Frozen,
    Cut,
    Whim,
}

/// A cluster in one thread.
pub(crate) struct World<'a> {
    pub(crate) scenario: Scenario,
    pub(crate) expected: Expected,
    pub(crate) random: Stream,
    pub(crate) now_ms: u64,
    sequence: u64,
    queue: BTreeMap<(u64, u64), Happening>,
    pub(crate) actors: Vec<Actor>,
    pub(crate) hosts: Vec<Host>,
    pub(crate) network: Network,
    pub(crate) store: Store,
    pub(crate) checker: Checker,
    pub(crate) outcome: Outcome,
    pub(crate) is_chaos: bool,
    pub(crate) is_finished: bool,
    pub(crate) trace: Option<&'a mut dyn FnMut(String)>,
}

/// A run that handles more events than this does not end.
const EVENTS_MAX: u64 = 3_000_000;

impl<'a> World<'a> {
    pub(crate) fn new(seed: u64, trace: Option<&'a mut dyn FnMut(String)>) -> Self {
        let scenario = Scenario::new(seed);
        let expected = Expected::compute(
            seed,
            scenario.num_steps,
            scenario.num_blocks,
            scenario.num_slots,
            scenario.num_chunks,
        );
        let mut actors = Vec::new();
        let mut hosts: Vec<Host> = Vec::new();
        for (role, count) in [
            (Role::Coordinator, scenario.num_coordinators),
            (Role::Shard, scenario.num_shards),
            (Role::Worker, scenario.num_workers),
        ] {
            for index in 0..count {
                let shares = scenario.colocated && role == Role::Worker && index == 0;
                // Worker 0 lives with shard 0, whose process comes right after the coordinators'.
                let host = if shares {
                    scenario.num_coordinators as usize
                } else {
                    hosts.push(Host::default());
                    hosts.len() - 1
                };
                hosts[host].actors.push(actors.len());
                actors.push(Actor {
                    member: Member {
                        role,
                        index,
                        incarnation: 0,
                    },
                    host,
                    machine: None,
                    wake_ms: None,
                    over: false,
                    device: Vec::new(),
                    running: None,
                    heard_ms: 0,
                    campaigns: false,
                    torn: false,
                });
            }
        }
        let mut world = Self {
            network: Network::new(hosts.len()),
            store: Store::default(),
            checker: Checker::new(&scenario),
            outcome: Outcome {
                seed,
                ..Outcome::default()
            },
            random: Stream::new(seed, Purpose::Fault, &[1]),
            is_chaos: scenario.chaos_ms > 0,
            scenario,
            expected,
            now_ms: 0,
            sequence: 0,
            queue: BTreeMap::new(),
            actors,
            hosts,
            is_finished: false,
            trace,
        };
        world.prepare();
        world
    }

    fn prepare(&mut self) {
        let scenario = self.scenario.clone();
        self.say(|| format!("{scenario:?}"));
        for host in 0..self.hosts.len() {
            let is_coordinator = host < scenario.num_coordinators as usize;
            let late = self.is_chaos
                && scenario.faults.contains(&Fault::LateJoin)
                && !is_coordinator
                && self.random.below(3) == 0;
            let at_ms = if late {
                self.count_fault(Fault::LateJoin);
                self.random.below(scenario.chaos_ms)
            } else {
                self.random.below(20)
            };
            self.schedule(at_ms, Happening::StartHost(host));
        }
        for (at_ms, fault) in scenario.strikes {
            self.schedule(at_ms, Happening::Strike(fault));
        }
        if self.is_chaos {
            self.schedule(scenario.chaos_ms, Happening::Heal);
            for fault in [Fault::Reorder, Fault::SlowStore] {
                if scenario.faults.contains(&fault) {
                    self.count_fault(fault);
                }
            }
        }
    }

    pub(crate) fn say(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace(format!("{:>7} {}", self.now_ms, line()));
        }
    }

    pub(crate) fn schedule(&mut self, at_ms: u64, happening: Happening) {
        self.sequence += 1;
        self.queue
            .insert((at_ms.max(self.now_ms), self.sequence), happening);
    }

    pub(crate) fn after(&mut self, low_ms: u64, high_ms: u64) -> u64 {
        self.now_ms + low_ms + self.random.below(high_ms - low_ms + 1)
    }

    pub(crate) fn count_fault(&mut self, fault: Fault) {
        *self.outcome.faults.entry(fault).or_insert(0) += 1;
    }

    pub(crate) fn count(&mut self, recovery: Recovery) {
        *self.outcome.recoveries.entry(recovery).or_insert(0) += 1;
    }

    pub(crate) fn violate(&mut self, what: String) {
        self.say(|| format!("VIOLATION {what}"));
        self.outcome
            .violation
            .get_or_insert(format!("at {} ms: {what}", self.now_ms));
    }

    pub(crate) fn actor_of(&self, member: Member) -> Option<usize> {
        let offset = match member.role {
            Role::Coordinator => 0,
            Role::Shard => self.scenario.num_coordinators,
            Role::Worker => self.scenario.num_coordinators + self.scenario.num_shards,
        };
        let actor = (offset + member.index) as usize;
        (actor < self.actors.len()).then_some(actor)
    }

    /// Runs to the end.
    pub(crate) fn run(mut self) -> Outcome {
        // Ample for the slowest scenario once everything is healed; only a stuck run gets there.
        let per_step_ms = 1000
            + 2 * self.scenario.compute_max_ms * u64::from(self.scenario.num_slots)
            + 4 * self.scenario.store_max_ms;
        let bound_ms = self.scenario.chaos_ms + 30_000 + self.scenario.num_steps * per_step_ms;
        while self.outcome.violation.is_none() && !self.is_done() {
            let Some(((at_ms, _), happening)) = self.queue.pop_first() else {
                self.violate("liveness: nothing is left to happen".to_owned());
                break;
            };
            self.now_ms = at_ms;
            self.outcome.num_events += 1;
            if at_ms > bound_ms || self.outcome.num_events > EVENTS_MAX {
                self.violate(format!(
                    "liveness: the run has not finished; {}",
                    self.checker.progress()
                ));
                break;
            }
            self.happen(happening);
        }
        if self.outcome.violation.is_none() {
            self.check_end();
        }
        self.outcome.virtual_ms = self.now_ms;
        self.outcome
    }

    fn is_done(&self) -> bool {
        self.is_finished
            && self
                .actors
                .iter()
                .all(|actor| actor.over || actor.member.role == Role::Coordinator)
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Deliver { from, to, message } => self.deliver(from, to, message),
            Happening::Local {
                actor,
                incarnation,
                event,
            } => {
                if self.is_current(actor, incarnation) {
                    let host = self.actors[actor].host;
                    if self.hosts[host].is_frozen {
                        self.hosts[host].deferred.push(Happening::Local {
                            actor,
                            incarnation,
                            event,
                        });
                    } else {
                        self.local(actor, event);
                    }
                }
            }
            Happening::StartHost(host) => {
                if !self.hosts[host].is_up {
                    self.hosts[host].is_up = true;
                    for actor in self.hosts[host].actors.clone() {
                        self.start(actor);
                    }
                }
            }
            Happening::StartActor(actor) => {
                let is_up = self.hosts[self.actors[actor].host].is_up;
                if is_up && self.actors[actor].machine.is_none() && !self.actors[actor].over {
                    self.start(actor);
                }
            }
            Happening::Strike(fault) => self.strike(fault),
            Happening::Thaw(host) => self.thaw(host),
            Happening::Mend(cut) => self.network.mend(cut),
            Happening::Detect {
                coordinator,
                member,
                reason,
            } => self.detect(coordinator, member, reason),
            Happening::Written(write) => self.written(write),
            Happening::Heal => self.heal(),
        }
    }

    fn is_current(&self, actor: usize, incarnation: u64) -> bool {
        self.actors[actor].member.incarnation == incarnation && self.actors[actor].machine.is_some()
    }

    fn deliver(&mut self, from: Member, to: Member, message: Message<Toy>) {
        let Some(actor) = self.actor_of(to) else {
            return;
        };
        if !self.is_current(actor, to.incarnation) {
            return;
        }
        let host = self.actors[actor].host;
        if self.hosts[host].is_frozen {
            self.hosts[host]
                .deferred
                .push(Happening::Deliver { from, to, message });
            return;
        }
        self.say(|| format!("{from} > {to} {message:?}"));
        let fenced = self.fenced(actor, &message);
        let event = match to.role {
            Role::Coordinator => {
                if from.role == Role::Coordinator {
                    self.actors[actor].heard_ms = self.now_ms;
                }
                Local::Coordinator(CoordinatorEvent::Message { from, message })
            }
            Role::Shard => Local::Shard(ShardEvent::Message { from, message }),
            Role::Worker => Local::Worker(WorkerEvent::Message { from, message }),
        };
        self.local(actor, event);
        if let Some(before) = fenced {
            self.check_fence(actor, before);
        }
    }
}
