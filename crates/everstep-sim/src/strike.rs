//! Strikes: whom a planned fault meets, and what it does.

use std::collections::{BTreeMap, BTreeSet};

use everstep_protocol::random::{Purpose, Stream};
use everstep_protocol::{BlockId, Member, Role};

use crate::detect::Reason;
use crate::fault::Fault;
use crate::outcome::Strike;
use crate::phase::Phase;
use crate::plan::{Action, Moment, Target};
use crate::process::Machine;
use crate::weather::{Condition, Window};
use crate::world::{Happening, World};

/// Faults that have not struck yet.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    /// Those that wait for a step.
    steps: Vec<(u64, usize)>,
    /// Those that wait for a phase, with how often they still let it pass.
    phases: BTreeMap<usize, (Phase, u64, u64)>,
    /// The phases that are waited for, as bits.
    awaited: u32,
    /// Faults that have not struck.
    pub(crate) num_open: usize,
    /// When the last fault that has struck is over.
    over_ms: u64,
    /// The actor whose effects are being carried out.
    pub(crate) acting: Option<usize>,
    /// Faults that strike it before the next of them.
    pub(crate) due: Vec<usize>,
    /// Aftershocks that may still come.
    pub(crate) aftershocks: u64,
}

impl Pending {
    pub(crate) fn add(&mut self, index: usize, moment: Moment) {
        self.num_open += 1;
        match moment {
            Moment::Step(step) => self.steps.push((step, index)),
            Moment::Phase {
                phase,
                from_step,
                skip,
            } => {
                self.phases.insert(index, (phase, from_step, skip));
                self.awaited |= phase.bit();
            }
            Moment::At(_) => {}
        }
    }
}

impl World<'_> {
    /// Strikes what waited for the committed steps.
    pub(crate) fn strike_steps(&mut self) {
        if self.pending.steps.is_empty() {
            return;
        }
        let high_water = self.checker.high_water().0;
        let (due, later) = std::mem::take(&mut self.pending.steps)
            .into_iter()
            .partition(|(step, _)| *step <= high_water);
        self.pending.steps = later;
        let due: Vec<(u64, usize)> = due;
        for (_, index) in due {
            let at_ms = self.after(0, 5);
            let concerned = None;
            self.schedule(at_ms, Happening::Strike { index, concerned });
        }
    }

    /// A phase is reached; what waited for it strikes.
    pub(crate) fn reached(&mut self, phase: Phase, concerned: usize) {
        if self.pending.awaited & phase.bit() == 0 || !self.is_chaos {
            return;
        }
        let high_water = self.checker.high_water().0;
        let mut struck = Vec::new();
        for (index, (awaited, from_step, skip)) in &mut self.pending.phases {
            if *awaited == phase && *from_step <= high_water {
                if *skip == 0 {
                    struck.push(*index);
                } else {
                    *skip -= 1;
                }
            }
        }
        for index in struck {
            self.pending.phases.remove(&index);
            self.count_fault(Fault::InPhase(phase));
            // Either at once, with the rest of what it does undone, or just after it.
            if self.pending.acting == Some(concerned) && self.random.below(2) == 0 {
                self.pending.due.push(index);
            } else {
                let at_ms = self.now_ms;
                let concerned = Some(concerned);
                self.schedule(at_ms, Happening::Strike { index, concerned });
            }
        }
    }

    fn is_up(&self, host: usize) -> bool {
        self.hosts[host].is_up
    }

    fn up(&self) -> Vec<usize> {
        (0..self.hosts.len())
            .filter(|host| self.is_up(*host))
            .collect()
    }

    /// Processes that run an actor of this role and are up.
    fn hosts_of(&self, role: Role) -> Vec<usize> {
        self.up()
            .into_iter()
            .filter(|host| {
                self.hosts[*host].actors.iter().any(|actor| {
                    self.actors[*actor].member.role == role && self.actors[*actor].machine.is_some()
                })
            })
            .collect()
    }

    /// The actor that leads in the latest epoch, or may think so.
    pub(crate) fn leader(&self) -> Option<usize> {
        self.actors
            .iter()
            .enumerate()
            .filter_map(|(actor, state)| match &state.machine {
                Some(Machine::Coordinator(machine)) if machine.is_leading() => {
                    Some((machine.epoch(), actor))
                }
                _ => None,
            })
            .max()
            .map(|(_, actor)| actor)
    }

    fn replicas(&self, block: BlockId) -> Vec<Member> {
        let machine = self
            .leader()
            .and_then(|leader| self.actors[leader].machine.as_ref());
        let Some(Machine::Coordinator(machine)) = machine else {
            return Vec::new();
        };
        machine
            .view()
            .and_then(|view| view.placements.get(block as usize))
            .map(|placement| placement.replicas().collect())
            .unwrap_or_default()
    }

    fn successor(&self) -> Option<usize> {
        let leader = self.leader();
        (0..self.plan.topology.num_coordinators as usize)
            .find(|actor| Some(*actor) != leader && self.actors[*actor].machine.is_some())
    }

    /// The processes that a target means now, ascending.
    fn resolve(&self, target: Target, concerned: Option<usize>, random: &mut Stream) -> Vec<usize> {
        if target == Target::All {
            return self.up();
        }
        let one = |hosts: Vec<usize>, random: &mut Stream| {
            if hosts.is_empty() {
                return Vec::new();
            }
            vec![hosts[random.below(hosts.len() as u64) as usize]]
        };
        let host_of = |actor: usize| self.actors[actor].host;
        let of_members = |members: Vec<Member>| -> Vec<usize> {
            members
                .into_iter()
                .filter_map(|member| self.actor_of(member))
                .map(host_of)
                .collect()
        };
        let num_blocks = u64::from(self.plan.workload.num_blocks);
        let mut hosts = match target {
            Target::Any => one(self.up(), random),
            Target::Role(role) => one(self.hosts_of(role), random),
            Target::Actor(role, index) => {
                let member = Member {
                    role,
                    index,
                    incarnation: 0,
                };
                self.actor_of(member).map(host_of).into_iter().collect()
            }
            Target::Leader => self.leader().map(host_of).into_iter().collect(),
            Target::Successor => self.successor().map(host_of).into_iter().collect(),
            Target::LeaderAndSuccessor => {
                let both = [self.leader(), self.successor()];
                both.into_iter().flatten().map(host_of).collect()
            }
            Target::Primary(block) => {
                let block = block.unwrap_or_else(|| random.below(num_blocks) as BlockId);
                of_members(self.replicas(block).into_iter().take(1).collect())
            }
            Target::Replicas(block) => {
                let block = block.unwrap_or_else(|| random.below(num_blocks) as BlockId);
                of_members(self.replicas(block))
            }
            Target::AllOf(role) => self.hosts_of(role),
            Target::All => Vec::new(),
            Target::Concerned => concerned.map(host_of).into_iter().collect(),
        };
        hosts.retain(|host| self.is_up(*host));
        hosts.sort_unstable();
        hosts.dedup();
        hosts
    }

    /// A process that joins late: it starts when its fault says.
    pub(crate) fn postpone_start(&mut self, index: usize, at_ms: u64) {
        let fault = &self.plan.faults[index];
        let mut random = Stream::new(self.seed, Purpose::Fault, &[2, fault.salt]);
        let candidates: Vec<usize> = (0..self.actors.len())
            .filter(|actor| match fault.target {
                Target::Role(role) | Target::AllOf(role) => self.actors[*actor].member.role == role,
                Target::Actor(role, index) => {
                    let member = self.actors[*actor].member;
                    member.role == role && member.index == index
                }
                _ => true,
            })
            .map(|actor| self.actors[actor].host)
            .collect();
        let late = if matches!(fault.target, Target::AllOf(_) | Target::All) {
            candidates
        } else {
            vec![candidates[random.below(candidates.len() as u64) as usize]]
        };
        for host in late {
            self.hosts[host].starts_ms = at_ms;
        }
        self.outcome.num_struck += 1;
        self.count_fault(Fault::LateJoin);
    }

    /// A planned fault strikes.
    pub(crate) fn strike(&mut self, index: usize, concerned: Option<usize>) {
        self.pending.num_open = self.pending.num_open.saturating_sub(1);
        if !self.is_chaos || self.is_finished {
            return;
        }
        let fault = self.plan.faults[index].clone();
        let mut random = Stream::new(self.seed, Purpose::Fault, &[2, fault.salt]);
        let hosts = if fault.action.is_condition() && fault.target == Target::All {
            // It holds for whoever comes.
            (0..self.hosts.len()).collect()
        } else {
            self.resolve(fault.target, concerned, &mut random)
        };
        let over_ms = self.now_ms + fault.action.duration_ms();
        if self.act(&fault.action, fault.target, hosts, &mut random) {
            self.outcome.num_struck += 1;
        }
        self.pending.over_ms = self.pending.over_ms.max(over_ms);
        if self.plan.chaos_ms.is_none() && self.pending.num_open == 0 {
            let at_ms = self.pending.over_ms;
            self.schedule(at_ms, Happening::Heal);
        }
    }

    fn act(
        &mut self,
        action: &Action,
        target: Target,
        hosts: Vec<usize>,
        random: &mut Stream,
    ) -> bool {
        let Some(first) = hosts.first().copied() else {
            return false;
        };
        let struck: Vec<Member> = hosts
            .iter()
            .flat_map(|host| self.hosts[*host].actors.iter())
            .map(|actor| self.actors[*actor].member)
            .collect();
        let role = self.actors[self.hosts[first].actors[0]].member.role;
        let kind = Fault::of(action, target, role);
        if !self.carry_out(action, target, hosts, random) {
            return false;
        }
        self.say(|| format!("strike: {action:?} on {target}: {struck:?}"));
        if let Some(kind) = kind {
            self.count_fault(kind);
            self.outcome.strikes.push(Strike {
                at_ms: self.now_ms,
                fault: kind,
                action: action.clone(),
                members: struck,
                detected_ms: None,
                recovered_ms: None,
            });
        }
        true
    }

    /// Does it; returns whether there was anything to do.
    fn carry_out(
        &mut self,
        action: &Action,
        target: Target,
        hosts: Vec<usize>,
        random: &mut Stream,
    ) -> bool {
        if let Some((condition, value)) = Condition::of(action) {
            self.begin_window(condition, value, target, &hosts, action.duration_ms());
            return true;
        }
        let now_ms = self.now_ms;
        match *action {
            Action::Kill { down_ms } => {
                for host in hosts {
                    self.crash(host, down_ms);
                }
            }
            Action::KillMidway => {
                for actor in hosts
                    .into_iter()
                    .flat_map(|host| self.hosts[host].actors.clone())
                {
                    self.actors[actor].torn = true;
                }
            }
            Action::RollingRestart { pause_ms } => {
                for (turn, host) in (0..).zip(hosts) {
                    self.schedule(now_ms + turn * pause_ms, Happening::Kill(host));
                }
            }
            Action::Freeze { for_ms } => {
                for host in hosts {
                    self.freeze(host, for_ms);
                }
            }
            Action::Partition { for_ms } => {
                let pairs = self.sides(target, &hosts, random, true);
                return self.cut(pairs, for_ms);
            }
            Action::OneWayCut { for_ms } => {
                let pairs = self.sides(target, &hosts, random, false);
                return self.cut(pairs, for_ms);
            }
            Action::Flap { for_ms, period_ms } => {
                let pairs = self.sides(target, &hosts, random, true);
                if pairs.is_empty() {
                    return false;
                }
                self.flap(pairs, period_ms.max(1), now_ms + for_ms);
            }
            Action::FalseSuspicion => {
                let members: Vec<Member> = hosts
                    .iter()
                    .flat_map(|host| &self.hosts[*host].actors)
                    .map(|actor| self.actors[*actor].member)
                    .filter(|member| member.role != Role::Coordinator)
                    .collect();
                for member in &members {
                    self.suspect(*member, Reason::Whim, 0, 30);
                }
                return !members.is_empty();
            }
            Action::Drain => {
                let hosts: Vec<usize> = hosts
                    .into_iter()
                    .filter(|host| self.may_drain(*host))
                    .collect();
                for host in &hosts {
                    self.hosts[*host].drains = Some(BTreeSet::new());
                }
                return !hosts.is_empty();
            }
            Action::StoreRace => {
                let standing: Vec<usize> = (0..self.plan.topology.num_coordinators as usize)
                    .filter(|actor| {
                        let host = self.actors[*actor].host;
                        self.is_up(host)
                            && !self.hosts[host].is_frozen
                            && !self.actors[*actor].campaigns
                            && matches!(&self.actors[*actor].machine,
                                Some(Machine::Coordinator(machine)) if !machine.is_leading())
                    })
                    .collect();
                for actor in &standing {
                    self.stand(*actor);
                }
                return !standing.is_empty();
            }
            Action::DamageCheckpoint { missing } => return self.damage_checkpoint(missing, random),
            Action::Aftershock { times } => self.pending.aftershocks += times,
            // The others are conditions, or happen at the start.
            _ => {}
        }
        true
    }

    fn begin_window(
        &mut self,
        condition: Condition,
        value: u64,
        target: Target,
        hosts: &[usize],
        for_ms: u64,
    ) {
        if condition == Condition::StaleList {
            self.weather.stale = (self.store.latest_epoch(), self.store.newest());
        }
        self.weather.push(Window {
            condition,
            hosts: condition.mask(hosts, target == Target::All),
            until_ms: self.now_ms + for_ms,
            value,
        });
    }

    /// Directed pairs of processes that a cut separates.
    fn sides(
        &self,
        target: Target,
        hosts: &[usize],
        random: &mut Stream,
        both_ways: bool,
    ) -> Vec<(usize, usize)> {
        let count = self.hosts.len();
        if target == Target::Any && !both_ways {
            let up = self.up();
            let mut pick = || up[random.below(up.len() as u64) as usize];
            let (from, to) = (pick(), pick());
            return if from == to {
                Vec::new()
            } else {
                vec![(from, to)]
            };
        }
        let side: Vec<bool> = (0..count)
            .map(|host| {
                if target == Target::Any {
                    random.below(2) == 0
                } else {
                    hosts.contains(&host)
                }
            })
            .collect();
        (0..count)
            .flat_map(|from| (0..count).map(move |to| (from, to)))
            .filter(|(from, to)| side[*from] != side[*to] && (both_ways || side[*from]))
            .collect()
    }

    pub(crate) fn flap(&mut self, pairs: Vec<(usize, usize)>, period_ms: u64, until_ms: u64) {
        if !self.is_chaos || self.now_ms >= until_ms {
            return;
        }
        self.cut(pairs.clone(), period_ms);
        let at_ms = self.now_ms + 2 * period_ms;
        self.schedule(
            at_ms,
            Happening::Flap {
                pairs,
                period_ms,
                until_ms,
            },
        );
    }

    /// A rolling restart gets to the next process.
    pub(crate) fn roll(&mut self, host: usize) {
        if self.is_chaos && !self.is_finished {
            self.crash(host, None);
        }
    }

    /// The protocol has just recovered from something, or is about to: a good moment for the next fault.
    pub(crate) fn shake(&mut self) {
        if !self.is_chaos || self.pending.aftershocks == 0 || self.random.below(3) == 0 {
            return;
        }
        self.pending.aftershocks -= 1;
        self.count_fault(Fault::Aftershock);
        let at_ms = self.after(0, 40);
        self.schedule(at_ms, Happening::Aftershock);
    }

    pub(crate) fn aftershock(&mut self) {
        if !self.is_chaos || self.is_finished {
            return;
        }
        let kill = Action::Kill { down_ms: None };
        let for_ms = 10 + self.random.below(1500);
        let kinds = [
            (kill.clone(), Target::Role(Role::Shard)),
            (kill.clone(), Target::Role(Role::Shard)),
            (kill.clone(), Target::Role(Role::Worker)),
            (kill, Target::Role(Role::Coordinator)),
            (Action::FalseSuspicion, Target::Any),
            (Action::Freeze { for_ms }, Target::Any),
        ];
        let (action, target) = &kinds[self.random.below(kinds.len() as u64) as usize];
        let mut random = Stream::new(self.random.next_u64(), Purpose::Fault, &[3]);
        let hosts = self.resolve(*target, None, &mut random);
        self.act(action, *target, hosts, &mut random);
    }
}
