//! The plan of a seed: a random topology and workload, and a random subset of the fault kinds, each as often as chance has it.

use everstep_protocol::Role;
use everstep_protocol::random::{Purpose, Stream};

use crate::phase::Phase;
use crate::plan::{Action, Moment, Plan, Target, Timing, Topology, Workload};

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

    fn freeze(&mut self, low_ms: u64, high_ms: u64) -> Action {
        Action::Freeze {
            for_ms: self.between(low_ms, high_ms),
        }
    }

    /// One side of a cut.
    fn side(&mut self) -> Target {
        self.of(&[
            Target::Any,
            Target::Any,
            Target::Leader,
            Target::Primary(None),
        ])
    }

    /// What strikes in a phase, and whom.
    fn in_phase(&mut self) -> (Action, Target) {
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
            0 => self.freeze(10, 2500),
            1 => Action::FalseSuspicion,
            2 => Action::Partition {
                for_ms: self.between(20, 1500),
            },
            _ => KILL,
        };
        (action, target)
    }
}

/// A way to strike, with what is drawn for it.
#[derive(Clone, Copy)]
enum Strike {
    /// At any moment.
    Anytime(fn(&mut Draw) -> (Action, Target)),
    /// When the protocol is in a certain phase.
    InPhase,
}

const KILL: Action = Action::Kill { down_ms: None };

/// What may strike. A seed enables each at random.
const STRIKES: [Strike; 23] = [
    Strike::Anytime(|_| (KILL, Target::Role(Role::Worker))),
    Strike::Anytime(|_| (KILL, Target::Role(Role::Shard))),
    Strike::Anytime(|_| (KILL, Target::Role(Role::Coordinator))),
    Strike::Anytime(|_| (KILL, Target::Leader)),
    Strike::Anytime(|_| (KILL, Target::LeaderAndSuccessor)),
    Strike::Anytime(|draw| {
        let roles = [Role::Worker, Role::Shard, Role::Shard, Role::Coordinator];
        (KILL, Target::AllOf(draw.of(&roles)))
    }),
    Strike::Anytime(|_| (KILL, Target::Replicas(None))),
    Strike::Anytime(|_| (KILL, Target::All)),
    Strike::Anytime(|_| (Action::KillMidway, Target::Any)),
    Strike::InPhase,
    Strike::Anytime(|draw| {
        let pause_ms = draw.between(20, 300);
        let target = if draw.one_in(2) {
            Target::All
        } else {
            Target::AllOf(draw.role())
        };
        (Action::RollingRestart { pause_ms }, target)
    }),
    Strike::Anytime(|draw| (draw.freeze(10, 1500), Target::Any)),
    // Long enough to be declared lost.
    Strike::Anytime(|draw| (draw.freeze(1000, 5000), Target::Any)),
    Strike::Anytime(|draw| (draw.freeze(600, 4000), Target::Leader)),
    Strike::Anytime(|draw| {
        let for_ms = draw.between(20, 1500);
        (Action::Partition { for_ms }, draw.side())
    }),
    Strike::Anytime(|draw| {
        let for_ms = draw.between(20, 1500);
        (Action::OneWayCut { for_ms }, draw.side())
    }),
    Strike::Anytime(|draw| {
        let action = Action::Flap {
            for_ms: draw.between(200, 2000),
            period_ms: draw.between(20, 250),
        };
        let targets = [Target::Any, Target::Leader, Target::Role(Role::Shard)];
        (action, draw.of(&targets))
    }),
    Strike::Anytime(|_| (Action::FalseSuspicion, Target::Any)),
    Strike::Anytime(|draw| {
        let targets = [
            Target::Role(Role::Shard),
            Target::Role(Role::Worker),
            Target::AllOf(Role::Shard),
        ];
        (Action::Drain, draw.of(&targets))
    }),
    Strike::Anytime(|draw| {
        let for_ms = draw.between(100, 3000);
        (Action::StoreOutage { for_ms }, Target::All)
    }),
    Strike::Anytime(|draw| {
        let for_ms = draw.between(100, 2000);
        (Action::StaleList { for_ms }, Target::All)
    }),
    Strike::Anytime(|_| (Action::StoreRace, Target::All)),
    Strike::Anytime(|draw| {
        let missing = draw.one_in(2);
        (Action::DamageCheckpoint { missing }, Target::All)
    }),
];

/// A condition of the whole chaos phase of so many milliseconds, with what is drawn for it.
type Condition = fn(&mut Draw, u64) -> (Action, Target);

/// What may hold for the whole chaos phase. A seed enables each at random.
const CONDITIONS: [Condition; 11] = [
    |draw, _| {
        let times = draw.between(1, 8);
        (Action::Aftershock { times }, Target::All)
    },
    |draw, for_ms| {
        let permille = draw.between(10, 250);
        (Action::Drop { for_ms, permille }, Target::All)
    },
    |draw, for_ms| {
        let permille = draw.between(10, 300);
        (Action::Duplicate { for_ms, permille }, Target::All)
    },
    |_, for_ms| (Action::Reorder { for_ms }, Target::All),
    |_, for_ms| {
        let permille = 15;
        (Action::Delay { for_ms, permille }, Target::All)
    },
    |draw, for_ms| {
        let permille = draw.between(5, 60);
        (Action::Corrupt { for_ms, permille }, Target::All)
    },
    |draw, for_ms| {
        let tensor_ms = draw.between(5, 60);
        let targets = [
            Target::Any,
            Target::Role(Role::Shard),
            Target::Role(Role::Worker),
        ];
        (Action::SlowLink { for_ms, tensor_ms }, draw.of(&targets))
    },
    |draw, for_ms| {
        let factor = draw.between(10, 60);
        let target = Target::Actor(Role::Worker, 0);
        (Action::SlowWorker { for_ms, factor }, target)
    },
    |draw, chaos_ms| {
        let at_ms = draw.between(50, chaos_ms.max(51));
        let role = draw.of(&[Role::Worker, Role::Shard]);
        (Action::LateJoin { at_ms }, Target::Role(role))
    },
    |draw, for_ms| {
        let max_ms = draw.between(200, 1500);
        (Action::SlowStore { for_ms, max_ms }, Target::All)
    },
    |draw, for_ms| {
        let permille = draw.between(50, 500);
        (Action::LostReply { for_ms, permille }, Target::All)
    },
];

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
        for condition in CONDITIONS {
            if draw.one_in(rarity) {
                let (action, target) = condition(&mut draw, chaos_ms);
                let times = if matches!(action, Action::LateJoin { .. }) {
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
        let striking: Vec<Strike> = STRIKES
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
            let strike = if draw.one_in(4) {
                Strike::InPhase
            } else {
                draw.of(&striking)
            };
            let ((action, target), moment) = match strike {
                Strike::InPhase => {
                    let what = draw.in_phase();
                    let moment = Moment::Phase {
                        phase: draw.of(&Phase::ALL),
                        from_step: draw.between(0, num_steps - 1),
                        skip: draw.between(0, 8) / 3,
                    };
                    (what, moment)
                }
                Strike::Anytime(what) => {
                    let what = what(&mut draw);
                    let moment = if draw.one_in(8) {
                        Moment::Step(draw.between(0, num_steps - 1))
                    } else {
                        Moment::At(draw.between(0, chaos_ms))
                    };
                    (what, moment)
                }
            };
            plan.push(action, target, moment);
        }
        plan.flaky_leaders(
            &mut Draw(Stream::new(seed, Purpose::Fault, &[4])),
            rarity,
            chaos_ms,
        );
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

    /// Whoever leads hears and is heard badly, and is replaced again and again, while replicas lag behind: leaders that know little of what
    /// others hold, and members that know little of who leads.
    fn flaky_leaders(&mut self, draw: &mut Draw, rarity: u64, for_ms: u64) {
        if !draw.one_in(2 * rarity) {
            return;
        }
        for (target, permille) in [
            (Target::AllOf(Role::Coordinator), draw.between(100, 400)),
            (Target::Role(Role::Shard), draw.between(0, 300)),
        ] {
            self.push(Action::Drop { for_ms, permille }, target, Moment::At(30));
        }
        let permille = draw.between(0, 200);
        let links = Target::AllOf(Role::Coordinator);
        self.push(Action::Delay { for_ms, permille }, links, Moment::At(30));
        // Replicas are seeded late, and no leader knows what the others have decided.
        self.timing.shares_log &= draw.one_in(4);
        self.timing.seed_max_ms = 300;
        for _ in 0..draw.between(1, 3) {
            let step = draw.between(0, self.workload.num_steps - 1);
            self.push(KILL, Target::Primary(None), Moment::Step(step));
            let step = draw.between(step, self.workload.num_steps - 1);
            self.push(KILL, Target::Leader, Moment::Step(step));
        }
    }
}
