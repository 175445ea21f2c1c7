//! The plan of a seed: a random topology and workload, and a random subset of the fault kinds, each as often as chance has it.

use everstep_protocol::Role;
use everstep_protocol::random::{Purpose, Stream};

use crate::phase::Phase;
use crate::plan::{Action, Moment, Plan, Target, Timing, Topology, Workload};

/// Members of the swarm. A seed enables each at random.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    KillWorker,
    KillShard,
    KillCoordinator,
    KillLeader,
    KillLeaderAndSuccessor,
    KillAllOfRole,
    KillBlock,
    KillAll,
    KillMidway,
    InPhase,
    RollingRestart,
    Freeze,
    Zombie,
    ZombieLeader,
    Partition,
    OneWayCut,
    Flap,
    FalseSuspicion,
    Drain,
    StoreOutage,
    StaleList,
    StoreRace,
    DamageCheckpoint,
    // From here on: conditions of the whole chaos phase.
    Aftershock,
    Drop,
    Duplicate,
    Reorder,
    Delay,
    Corrupt,
    SlowLink,
    SlowWorker,
    LateJoin,
    SlowStore,
    LostReply,
}

const STRIKES: [Kind; 23] = [
    Kind::KillWorker,
    Kind::KillShard,
    Kind::KillCoordinator,
    Kind::KillLeader,
    Kind::KillLeaderAndSuccessor,
    Kind::KillAllOfRole,
    Kind::KillBlock,
    Kind::KillAll,
    Kind::KillMidway,
    Kind::InPhase,
    Kind::RollingRestart,
    Kind::Freeze,
    Kind::Zombie,
    Kind::ZombieLeader,
    Kind::Partition,
    Kind::OneWayCut,
    Kind::Flap,
    Kind::FalseSuspicion,
    Kind::Drain,
    Kind::StoreOutage,
    Kind::StaleList,
    Kind::StoreRace,
    Kind::DamageCheckpoint,
];

const CONDITIONS: [Kind; 11] = [
    Kind::Aftershock,
    Kind::Drop,
    Kind::Duplicate,
    Kind::Reorder,
    Kind::Delay,
    Kind::Corrupt,
    Kind::SlowLink,
    Kind::SlowWorker,
    Kind::LateJoin,
    Kind::SlowStore,
    Kind::LostReply,
];

struct Draw(Stream);

impl Draw {
    fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.0.below(high - low + 1)
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.0.below(n) == 0
    }

    fn of<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.0.below(items.len() as u64) as usize]
    }

    fn role(&mut self) -> Role {
        self.of(&[Role::Worker, Role::Shard, Role::Coordinator])
    }

    fn strike(&mut self, kind: Kind) -> (Action, Target) {
        let kill = Action::Kill { down_ms: None };
        match kind {
            Kind::KillWorker => (kill, Target::Role(Role::Worker)),
            Kind::KillShard => (kill, Target::Role(Role::Shard)),
            Kind::KillCoordinator => (kill, Target::Role(Role::Coordinator)),
            Kind::KillLeader => (kill, Target::Leader),
            Kind::KillLeaderAndSuccessor => (kill, Target::LeaderAndSuccessor),
            Kind::KillAllOfRole => (
                kill,
                Target::AllOf(self.of(&[
                    Role::Worker,
                    Role::Shard,
                    Role::Shard,
                    Role::Coordinator,
                ])),
            ),
            Kind::KillBlock => (kill, Target::Replicas(None)),
            Kind::KillAll => (kill, Target::All),
            Kind::KillMidway => (Action::KillMidway, Target::Any),
            Kind::InPhase => {
                let target = self.of(&[
                    Target::Concerned,
                    Target::Concerned,
                    Target::Concerned,
                    Target::Leader,
                    Target::Primary(None),
                    Target::Replicas(None),
                    Target::LeaderAndSuccessor,
                    Target::All,
                ]);
                let action = match self.between(0, 5) {
                    0 => Action::Freeze {
                        for_ms: self.between(10, 2500),
                    },
                    1 => Action::FalseSuspicion,
                    2 => Action::Partition {
                        for_ms: self.between(20, 1500),
                    },
                    _ => kill,
                };
                (action, target)
            }
            Kind::RollingRestart => (
                Action::RollingRestart {
                    pause_ms: self.between(20, 300),
                },
                if self.one_in(2) {
                    Target::All
                } else {
                    Target::AllOf(self.role())
                },
            ),
            Kind::Freeze => (
                Action::Freeze {
                    for_ms: self.between(10, 1500),
                },
                Target::Any,
            ),
            Kind::Zombie => (
                Action::Freeze {
                    for_ms: self.between(1000, 5000),
                },
                Target::Any,
            ),
            Kind::ZombieLeader => (
                Action::Freeze {
                    for_ms: self.between(600, 4000),
                },
                Target::Leader,
            ),
            Kind::Partition => (
                Action::Partition {
                    for_ms: self.between(20, 1500),
                },
                self.of(&[
                    Target::Any,
                    Target::Any,
                    Target::Leader,
                    Target::Primary(None),
                ]),
            ),
            Kind::OneWayCut => (
                Action::OneWayCut {
                    for_ms: self.between(20, 1500),
                },
                self.of(&[
                    Target::Any,
                    Target::Any,
                    Target::Leader,
                    Target::Primary(None),
                ]),
            ),
            Kind::Flap => (
                Action::Flap {
                    for_ms: self.between(200, 2000),
                    period_ms: self.between(20, 250),
                },
                self.of(&[Target::Any, Target::Leader, Target::Role(Role::Shard)]),
            ),
            Kind::FalseSuspicion => (Action::FalseSuspicion, Target::Any),
            Kind::Drain => {
                let targets = [
                    Target::Role(Role::Shard),
                    Target::Role(Role::Worker),
                    Target::AllOf(Role::Shard),
                ];
                (Action::Drain, self.of(&targets))
            }
            Kind::StoreOutage => (
                Action::StoreOutage {
                    for_ms: self.between(100, 3000),
                },
                Target::All,
            ),
            Kind::StaleList => (
                Action::StaleList {
                    for_ms: self.between(100, 2000),
                },
                Target::All,
            ),
            Kind::StoreRace => (Action::StoreRace, Target::All),
            Kind::DamageCheckpoint => (
                Action::DamageCheckpoint {
                    missing: self.one_in(2),
                },
                Target::All,
            ),
            // Conditions are made by `condition`.
            _ => (Action::FalseSuspicion, Target::Any),
        }
    }

    fn condition(&mut self, kind: Kind, chaos_ms: u64) -> (Action, Target) {
        let for_ms = chaos_ms;
        match kind {
            Kind::Drop => (
                Action::Drop {
                    for_ms,
                    permille: self.between(10, 250),
                },
                Target::All,
            ),
            Kind::Duplicate => (
                Action::Duplicate {
                    for_ms,
                    permille: self.between(10, 300),
                },
                Target::All,
            ),
            Kind::Reorder => (Action::Reorder { for_ms }, Target::All),
            Kind::Delay => (
                Action::Delay {
                    for_ms,
                    permille: 15,
                },
                Target::All,
            ),
            Kind::Corrupt => (
                Action::Corrupt {
                    for_ms,
                    permille: self.between(5, 60),
                },
                Target::All,
            ),
            Kind::SlowLink => (
                Action::SlowLink {
                    for_ms,
                    tensor_ms: self.between(5, 60),
                },
                self.of(&[
                    Target::Any,
                    Target::Role(Role::Shard),
                    Target::Role(Role::Worker),
                ]),
            ),
            Kind::SlowWorker => (
                Action::SlowWorker {
                    for_ms,
                    factor: self.between(10, 60),
                },
                Target::Actor(Role::Worker, 0),
            ),
            Kind::LateJoin => (
                Action::LateJoin {
                    at_ms: self.between(50, chaos_ms.max(51)),
                },
                Target::Role(self.of(&[Role::Worker, Role::Shard])),
            ),
            Kind::SlowStore => (
                Action::SlowStore {
                    for_ms,
                    max_ms: self.between(200, 1500),
                },
                Target::All,
            ),
            Kind::LostReply => (
                Action::LostReply {
                    for_ms,
                    permille: self.between(50, 500),
                },
                Target::All,
            ),
            _ => (
                Action::Aftershock {
                    times: self.between(1, 8),
                },
                Target::All,
            ),
        }
    }
}

impl Plan {
    /// The plan of a seed, always the same.
    pub fn of_seed(seed: u64) -> Self {
        let mut draw = Draw(Stream::new(seed, Purpose::Fault, &[0]));
        let num_shards = draw.between(1, 4) as u32;
        let num_steps = draw.between(2, 12);
        let compute_max_ms = draw.between(2, 20);
        let num_slots = draw.between(1, 20) as u32;
        let num_workers = draw.between(1, 4) as u32;
        let mut plan = Plan {
            topology: Topology {
                num_workers,
                num_shards,
                num_coordinators: draw.between(1, 3) as u32,
                replication: draw.between(1, 3) as u32,
                colocated: draw.one_in(4),
            },
            workload: Workload {
                num_slots,
                num_blocks: draw.between(1, 5) as u32,
                num_steps,
                checkpoint_every: draw.between(0, 5),
                evaluate_every: draw.between(0, 4),
                num_chunks: draw.between(1, 5) as u32,
                audit_permille: 0,
            },
            timing: Timing {
                latency_max_ms: draw.between(1, 10),
                seed_max_ms: if draw.one_in(3) { 300 } else { 0 },
                compute_max_ms,
                store_max_ms: draw.between(5, 60),
                shares_log: !draw.one_in(4),
            },
            faults: Vec::new(),
            chaos_ms: Some(0),
        };
        // Undisturbed runs, and runs with everything, are plans too.
        let rarity = match draw.between(0, 9) {
            0 => return plan,
            1 => 1,
            _ => 5,
        };
        // About as long as the undisturbed run, so that strikes meet it at every stage, and sometimes much longer.
        let per_step_ms =
            20 + compute_max_ms * u64::from(num_slots).div_ceil(u64::from(num_workers));
        let chaos_ms = num_steps * per_step_ms * draw.between(1, 4) + draw.between(0, 500);
        plan.chaos_ms = Some(chaos_ms);
        for kind in CONDITIONS {
            if draw.one_in(rarity) {
                let (action, target) = draw.condition(kind, chaos_ms);
                let times = if kind == Kind::LateJoin {
                    draw.between(1, 2)
                } else {
                    1
                };
                // One process is met only once it is there.
                let at_ms = if target == Target::All { 0 } else { 30 };
                for _ in 0..times {
                    plan.push(action.clone(), target, Moment::At(at_ms));
                }
            }
        }
        let striking: Vec<Kind> = STRIKES
            .into_iter()
            .filter(|_| draw.one_in(rarity))
            .collect();
        let num_strikes = if striking.is_empty() {
            0
        } else {
            draw.between(1, 12)
        };
        for _ in 0..num_strikes {
            // There are as many phases as other kinds.
            let kind = if draw.one_in(4) {
                Kind::InPhase
            } else {
                draw.of(&striking)
            };
            let (action, target) = draw.strike(kind);
            let moment = if kind == Kind::InPhase {
                Moment::Phase {
                    phase: draw.of(&Phase::ALL),
                    from_step: draw.between(0, num_steps - 1),
                    skip: draw.between(0, 8) / 3,
                }
            } else if draw.one_in(8) {
                Moment::Step(draw.between(0, num_steps - 1))
            } else {
                Moment::At(draw.between(0, chaos_ms))
            };
            plan.push(action, target, moment);
        }
        let mut lies = Draw(Stream::new(seed, Purpose::Fault, &[2]));
        if lies.one_in(rarity) {
            plan.workload.audit_permille = lies.of(&[1000, 1000, 500]);
            let action = Action::LyingWorker {
                for_ms: chaos_ms,
                permille: lies.of(&[50, 300, 600]),
            };
            let liar = Target::Actor(Role::Worker, num_workers - 1);
            plan.push(action, liar, Moment::At(30));
        } else if lies.one_in(4) {
            plan.workload.audit_permille = 300;
        }
        plan
    }
}
