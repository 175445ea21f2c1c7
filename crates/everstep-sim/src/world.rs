//! The simulated cluster: processes, virtual time, and the queue of what happens next.

use std::collections::{BTreeMap, BTreeSet};

use everstep_protocol::coordinator::Event as CoordinatorEvent;
use everstep_protocol::random::{Purpose, Stream};
use everstep_protocol::shard::Event as ShardEvent;
use everstep_protocol::worker::Event as WorkerEvent;
use everstep_protocol::{Member, Message, Role};

use crate::check::Checker;
use crate::coverage::Branch;
use crate::detect::Reason;
use crate::fault::Fault;
use crate::network::Network;
use crate::outcome::{Outcome, Recovery};
use crate::plan::{Action, Moment, Plan};
use crate::process::{Actor, Host, Sent};
use crate::store::{Store, Write};
use crate::strike::Pending;
use crate::toy::{Expected, Toy};
use crate::watch::Watch;
use crate::weather::Weather;

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
    /// A planned fault strikes, and concerns this actor.
    Strike {
        index: usize,
        concerned: Option<usize>,
    },
    /// A rolling restart gets to this process.
    Kill(usize),
    /// Another fault, while the cluster recovers.
    Aftershock,
    /// A flapping partition cuts again.
    Flap {
        pairs: Vec<(usize, usize)>,
        period_ms: u64,
        until_ms: u64,
    },
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

/// A cluster in one thread.
pub(crate) struct World<'a> {
    pub(crate) seed: u64,
    pub(crate) plan: Plan,
    pub(crate) expected: Expected,
    pub(crate) random: Stream,
    pub(crate) now_ms: u64,
    sequence: u64,
    pub(crate) queue: BTreeMap<(u64, u64), Happening>,
    pub(crate) actors: Vec<Actor>,
    pub(crate) hosts: Vec<Host>,
    pub(crate) network: Network,
    pub(crate) weather: Weather,
    pub(crate) pending: Pending,
    pub(crate) watch: Watch,
    pub(crate) store: Store,
    pub(crate) checker: Checker,
    pub(crate) outcome: Outcome,
    pub(crate) is_chaos: bool,
    pub(crate) is_finished: bool,
    /// For the minimiser's test: after a recovery of this kind and a fault of that kind, the next decision counts as a violation.
    #[cfg(test)]
    pub(crate) forbidden: Option<(Fault, Recovery)>,
    /// Workers, by index, whose devices have lied.
    pub(crate) liars: BTreeSet<u32>,
    /// Quarantines that outlive the cluster.
    pub(crate) recorded_liars: Vec<Member>,
    /// The run must have finished by then.
    bound_ms: u64,
    pub(crate) trace: Option<&'a mut dyn FnMut(String)>,
}

/// A run that handles more events than this does not end.
const EVENTS_MAX: u64 = 3_000_000;

impl<'a> World<'a> {
    pub(crate) fn new(plan: Plan, seed: u64, trace: Option<&'a mut dyn FnMut(String)>) -> Self {
        let (topology, workload) = (&plan.topology, &plan.workload);
        let expected = Expected::compute(
            seed,
            workload.num_steps,
            workload.num_blocks,
            workload.num_slots,
            workload.num_chunks,
        );
        let mut actors = Vec::new();
        let mut hosts: Vec<Host> = Vec::new();
        for (role, count) in [
            (Role::Coordinator, topology.num_coordinators),
            (Role::Shard, topology.num_shards),
            (Role::Worker, topology.num_workers),
        ] {
            for index in 0..count {
                let shares = topology.colocated && role == Role::Worker && index == 0;
                // Worker 0 lives with shard 0, whose process comes right after the coordinators'.
                let host = if shares {
                    topology.num_coordinators as usize
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
                    sent: Sent::default(),
                });
            }
        }
        let mut world = Self {
            network: Network::new(hosts.len()),
            store: Store::default(),
            weather: Weather::default(),
            pending: Pending::default(),
            watch: Watch::default(),
            checker: Checker::new(&plan),
            outcome: Outcome {
                seed,
                num_planned: plan.faults.len() as u64,
                ..Outcome::default()
            },
            random: Stream::new(seed, Purpose::Fault, &[1]),
            is_chaos: !plan.faults.is_empty(),
            #[cfg(test)]
            forbidden: None,
            bound_ms: 0,
            seed,
            plan,
            expected,
            now_ms: 0,
            sequence: 0,
            queue: BTreeMap::new(),
            actors,
            hosts,
            is_finished: false,
            liars: BTreeSet::new(),
            recorded_liars: Vec::new(),
            trace,
        };
        world.prepare();
        world
    }

    fn prepare(&mut self) {
        let plan = self.plan.clone();
        let seed = self.seed;
        self.say(|| format!("seed {seed} of\n{plan}"));
        for host in 0..self.hosts.len() {
            self.hosts[host].starts_ms = self.random.below(20);
        }
        let mut latest_ms = 0;
        for (index, fault) in plan.faults.iter().enumerate() {
            latest_ms += fault.action.duration_ms();
            if let Action::LateJoin { at_ms } = fault.action {
                self.postpone_start(index, at_ms);
                continue;
            }
            match fault.moment {
                Moment::At(at_ms) => {
                    latest_ms += at_ms;
                    let concerned = None;
                    self.pending.num_open += 1;
                    self.schedule(at_ms, Happening::Strike { index, concerned });
                }
                Moment::Step(_) | Moment::Phase { .. } => self.pending.add(index, fault.moment),
            }
        }
        for host in 0..self.hosts.len() {
            let at_ms = self.hosts[host].starts_ms;
            self.schedule(at_ms, Happening::StartHost(host));
        }
        if let Some(chaos_ms) = plan.chaos_ms {
            latest_ms = chaos_ms;
            if self.is_chaos {
                self.schedule(chaos_ms, Happening::Heal);
            }
        }
        self.bound_ms = latest_ms + self.allowance_ms();
        self.strike_steps();
    }

    /// What a healed cluster needs at most for the whole run; only a stuck one gets there.
    pub(crate) fn allowance_ms(&self) -> u64 {
        let (timing, workload) = (&self.plan.timing, &self.plan.workload);
        // A step: every slot on one worker, and the retries around it. Around all: restarts, an election, gathering, a rollback.
        // The slowest of a million seeds took 12 s.
        let per_step_ms = 200 + timing.compute_max_ms * u64::from(workload.num_slots);
        8_000 + workload.num_steps * per_step_ms + 10 * timing.store_max_ms
    }

    /// From now on the run must get on by itself.
    pub(crate) fn start_clock(&mut self) {
        self.bound_ms = self.now_ms + self.allowance_ms();
        self.outcome.healed_ms = self.now_ms;
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

    pub(crate) fn met(&mut self, branch: Branch) {
        *self.outcome.branches.entry(branch).or_insert(0) += 1;
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
            Role::Shard => self.plan.topology.num_coordinators,
            Role::Worker => self.plan.topology.num_coordinators + self.plan.topology.num_shards,
        };
        let actor = (offset + member.index) as usize;
        (actor < self.actors.len()).then_some(actor)
    }

    /// Runs to the end.
    pub(crate) fn run(mut self) -> Outcome {
        while self.outcome.violation.is_none() && !self.is_done() {
            let Some(((at_ms, _), happening)) = self.queue.pop_first() else {
                self.violate("liveness: nothing is left to happen".to_owned());
                break;
            };
            self.now_ms = at_ms;
            self.outcome.num_events += 1;
            if at_ms > self.bound_ms || self.outcome.num_events > EVENTS_MAX {
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
            Happening::Strike { index, concerned } => self.strike(index, concerned),
            Happening::Kill(host) => self.roll(host),
            Happening::Aftershock => self.aftershock(),
            Happening::Flap {
                pairs,
                period_ms,
                until_ms,
            } => self.flap(pairs, period_ms, until_ms),
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
        self.observe_arrival(actor, &message);
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
            self.met(Branch::StaleLeaderFenced);
            self.check_fence(actor, before);
        }
    }
}
