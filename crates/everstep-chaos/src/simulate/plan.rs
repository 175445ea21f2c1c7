//! A scenario as a plan of the simulator.
//!
//! What differs from a real run: the objective is a toy with a few blocks; every actor has a process of its own; there are no agents (what an
//! agent's death does to the protocol is nothing) and no loaders (workers that wait for a loader are slow ones); a storm by time is spread
//! over the run's steps, since virtual steps take other times than real ones.

use everstep_cluster::control::Injection;
use everstep_cluster::{ActorAddress, ActorRole, Topology};
use everstep_protocol::Role;
use everstep_protocol::random::{Purpose, Stream};
use everstep_sim::{Action as Sim, Moment, Phase as SimPhase, Plan, Target as SimTarget};
use everstep_train::RunConfig;

use crate::scenario::{Action, Damage, Direction, Fault, Phase, Scenario, Spacing, Storm, Target};

/// Longer runs are shortened, and the steps of their faults with them.
const STEPS_MAX: u64 = 2_000;

/// Enough blocks that every pair of a few shards shares some.
const NUM_BLOCKS: u32 = 6;

/// Somebody who hangs, or is stopped for good, stands still for so long, in virtual milliseconds: longer than it takes to be declared lost.
const HANG_MS: u64 = 3_000;

/// All processes are up then and nothing is committed yet, in virtual milliseconds.
const START_MS: u64 = 21;

/// A loader that was killed is away for so long, in virtual milliseconds.
const LOADER_AWAY_MS: u64 = 500;

/// How much slower workers are that wait for a loader.
const STARVED_FACTOR: u64 = 20;

/// A device lies for so long, in virtual milliseconds, if the scenario sets no end.
const LIE_MS: u64 = 5_000;

/// Time between two processes of a rolling restart, in virtual milliseconds.
const IN_TURN_MS: u64 = 900;

/// A plan, and what of the scenario it leaves out.
#[derive(Debug)]
pub(super) struct Planned {
    pub(super) plan: Plan,
    pub(super) left_out: Vec<String>,
    /// So many of the plan's faults must strike: all but the spare ones of a storm.
    pub(super) num_demanded: u64,
}

/// Makes the plan; `seed` draws the faults of a storm.
///
/// # Errors
/// A fault that the simulator does not know: its place and why, in one line.
pub(super) fn plan(
    scenario: &Scenario,
    topology: &Topology,
    run: &RunConfig,
    seed: u64,
) -> Result<Planned, String> {
    let total = run.run.stop_at.unwrap_or(run.run.steps);
    let scale = Scale {
        total,
        simulated: total.min(STEPS_MAX),
    };
    let mut mapper = Mapper {
        topology,
        run,
        scale,
        planned: Planned {
            plan: Plan::default(),
            left_out: Vec::new(),
            num_demanded: 0,
        },
        last_step: 0,
    };
    let plan = &mut mapper.planned.plan;
    plan.topology.num_workers = topology.count(ActorRole::Worker);
    plan.topology.num_shards = topology.count(ActorRole::Shard);
    plan.topology.num_coordinators = topology.count(ActorRole::Coordinator);
    plan.topology.replication = topology
        .cluster
        .replication
        .unwrap_or(run.cluster.replication);
    plan.workload.num_slots = u32::try_from(run.batch.slots).unwrap_or(u32::MAX);
    plan.workload.num_blocks = NUM_BLOCKS;
    plan.workload.num_steps = scale.simulated;
    plan.workload.checkpoint_every = scale.period(run.checkpoint.every.steps().unwrap_or(0));
    plan.workload.evaluate_every = scale.period(run.evaluation.every);
    plan.workload.audit_permille = permille(run.audit.share);

    for fault in &scenario.faults {
        mapper.add(fault, fault.moment.after_step)?;
    }
    if let Some(storm) = &scenario.storm {
        let drawn = draw(storm, scenario.check.faults, total, seed);
        let (needed, spare) = drawn.faults.split_at(drawn.faults.len() - drawn.spare);
        for (step, fault) in needed {
            mapper.add(fault, *step)?;
        }
        mapper.demand_all();
        for (step, fault) in spare {
            mapper.add(fault, *step)?;
        }
    } else {
        mapper.demand_all();
    }
    let planned = mapper.planned;
    if planned.plan.faults.is_empty() {
        return Err(format!(
            "nothing is left to simulate: {}",
            planned.left_out.join("; ")
        ));
    }
    planned.plan.check()?;
    Ok(planned)
}

/// A storm's faults and the steps at which they strike; the last `spare` of them stand in for those whose target is away when they strike.
struct Drawn {
    faults: Vec<(u64, Fault)>,
    spare: usize,
}

fn draw(storm: &Storm, at_least: Option<usize>, total: u64, seed: u64) -> Drawn {
    let mut random = Stream::new(seed, Purpose::Fault, &[0]);
    let from = storm.from.after_step.min(total);
    // The last faults need some steps to be recovered in.
    let room = (total - from) * 9 / 10;
    let lasting = |seconds: f64| storm.for_seconds.map(|length| (length / seconds) as usize);
    let fitting = match storm.spacing {
        Spacing::EverySteps(every) => Some((room / every) as usize + 1),
        Spacing::EverySeconds(seconds) | Spacing::RandomSeconds(seconds) => lasting(seconds),
    };
    // As many as a real run, where a fault that could not happen is replaced by another.
    let count = storm.count_max.or(fitting).or(at_least).unwrap_or(1).max(1);
    let spare = count / 20 + 1;
    let all = (count + spare) as u64;
    let steps: Vec<u64> = match storm.spacing {
        Spacing::RandomSeconds(_) => {
            let mut steps: Vec<u64> = (0..all).map(|_| from + random.below(room + 1)).collect();
            steps.sort_unstable();
            steps
        }
        _ => (0..all).map(|number| from + number * room / all).collect(),
    };
    let weights: f64 = storm.faults.iter().map(|(weight, _)| weight).sum();
    let mut one = |step| {
        let mut left = random.unit_f64() * weights;
        let mut faults = storm.faults.iter();
        let found = faults.find(|(weight, _)| {
            left -= weight;
            left < 0.0
        });
        let (_, fault) = found.or(storm.faults.last())?;
        Some((step, fault.clone()))
    };
    Drawn {
        faults: steps.into_iter().filter_map(&mut one).collect(),
        spare,
    }
}

/// Steps of the real run as steps of the simulated one.
#[derive(Debug, Clone, Copy)]
struct Scale {
    total: u64,
    simulated: u64,
}

impl Scale {
    fn step(self, step: u64) -> u64 {
        if self.total == self.simulated {
            return step;
        }
        (u128::from(step) * u128::from(self.simulated) / u128::from(self.total.max(1))) as u64
    }

    /// A period stays one: 0 is off, and others are at least a step.
    fn period(self, every: u64) -> u64 {
        if every == 0 {
            return 0;
        }
        self.step(every).max(1)
    }
}

fn permille(share: f64) -> u64 {
    // What happens at all happens now and then.
    let permille = (share * 1_000.0).round() as u64;
    permille.max(u64::from(share > 0.0))
}

fn ms(seconds: f64) -> u64 {
    ((seconds * 1_000.0).round() as u64).max(1)
}

struct Mapper<'a> {
    topology: &'a Topology,
    run: &'a RunConfig,
    scale: Scale,
    planned: Planned,
    /// The simulated step of the fault before.
    last_step: u64,
}

/// Whom a fault of the scenario meets.
enum Whom {
    /// Somebody of the protocol.
    Member(SimTarget),
    Loader,
    Agent,
}

impl Mapper<'_> {
    /// Plans a fault that strikes once `step` steps of the real run are committed.
    fn add(&mut self, fault: &Fault, step: u64) -> Result<(), String> {
        let wrong = |why: String| format!("{}: {why}", fault.place);
        let whom = self.whom(fault).map_err(wrong)?;
        let moment = self.moment(fault, step);
        for whom in whom {
            let (actions, target) = match whom {
                Whom::Agent => {
                    self.leave_out(
                        fault,
                        "agents, and the protocol does not notice their death",
                    );
                    continue;
                }
                Whom::Loader if fault.action == Action::Drain => {
                    self.leave_out(fault, "loaders that could leave");
                    continue;
                }
                Whom::Loader => (
                    vec![starving(&fault.action).map_err(wrong)?],
                    SimTarget::AllOf(Role::Worker),
                ),
                Whom::Member(target) => (self.actions(fault).map_err(wrong)?, target),
            };
            for action in actions {
                self.planned.plan.push(action, target, moment);
            }
        }
        Ok(())
    }

    /// What is planned so far must strike.
    fn demand_all(&mut self) {
        self.planned.num_demanded = self.planned.plan.faults.len() as u64;
    }

    fn leave_out(&mut self, fault: &Fault, what: &str) {
        let line = format!(
            "{}: {}: the simulator has no {what}",
            fault.place,
            fault.label()
        );
        if !self.planned.left_out.contains(&line) {
            self.planned.left_out.push(line);
        }
    }

    fn whom(&self, fault: &Fault) -> Result<Vec<Whom>, String> {
        let member = |target| Ok(vec![Whom::Member(target)]);
        match &fault.target {
            Target::Role { role, index } => match (role.protocol(), index) {
                (None, _) => Ok(vec![Whom::Loader]),
                (Some(role), None) => member(SimTarget::Role(role)),
                (Some(role), Some(index)) => member(SimTarget::Actor(role, *index)),
            },
            Target::Process(name) => Ok(vec![self.process(name)?]),
            Target::Node(name) => {
                let processes = self.topology.processes.iter();
                let own: Vec<Whom> = processes
                    .filter(|process| process.node == *name)
                    .map(|process| self.process(&process.name))
                    .collect::<Result<_, _>>()?;
                let is_cut = matches!(fault.action, Action::Partition { .. });
                if is_cut && own.len() > 1 {
                    return Err(format!(
                        "node {name} has several processes, and the simulator cuts one off"
                    ));
                }
                Ok(own)
            }
            Target::Any => member(SimTarget::Any),
            Target::Leader => member(SimTarget::Leader),
            Target::LeaderAndSuccessor => member(SimTarget::LeaderAndSuccessor),
            Target::ReplicasOfABlock => member(SimTarget::Replicas(None)),
            Target::All | Target::EveryProcessInTurn | Target::Store => member(SimTarget::All),
            Target::Agent => Ok(vec![Whom::Agent]),
        }
    }

    fn process(&self, name: &str) -> Result<Whom, String> {
        let number = self.topology.process_named(name);
        let own: Vec<ActorAddress> = self
            .topology
            .actors()
            .filter(|(_, process)| Some(*process) == number)
            .map(|(address, _)| address)
            .collect();
        match own.as_slice() {
            [one] => Ok(one.role.protocol().map_or(Whom::Loader, |role| {
                Whom::Member(SimTarget::Actor(role, one.index))
            })),
            _ => Err(format!(
                "process {name} has several roles, and the simulator gives every actor a process of its own"
            )),
        }
    }

    /// What the simulator does; the elements of one fault strike together.
    fn actions(&self, fault: &Fault) -> Result<Vec<Sim>, String> {
        let one = |action| Ok(vec![action]);
        let unknown = |what: &str| Err(format!("the simulator knows no {what}"));
        match &fault.action {
            Action::Kill if fault.target == Target::EveryProcessInTurn => {
                one(Sim::RollingRestart {
                    pause_ms: IN_TURN_MS,
                })
            }
            Action::Kill => one(Sim::Kill { down_ms: None }),
            Action::Pause { seconds } => one(Sim::Freeze {
                for_ms: seconds.map_or(HANG_MS, ms),
            }),
            Action::Partition {
                direction,
                seconds,
                flap_ms,
            } => {
                let for_ms = ms(*seconds);
                match (direction, flap_ms) {
                    (Direction::Both, Some(period_ms)) => one(Sim::Flap {
                        for_ms,
                        period_ms: *period_ms,
                    }),
                    (Direction::Both, None) => one(Sim::Partition { for_ms }),
                    (Direction::Out, None) => one(Sim::OneWayCut { for_ms }),
                    (Direction::In, None) => unknown("partition of direction \"in\""),
                    (_, Some(_)) => unknown("flapping partition of one direction"),
                }
            }
            Action::Network { weather, seconds } => Ok(self.weather(*weather, ms(*seconds))),
            Action::StoreOutage { seconds } => one(Sim::StoreOutage {
                for_ms: ms(*seconds),
            }),
            Action::StoreSlow { delay_ms, seconds } => one(Sim::SlowStore {
                for_ms: ms(*seconds),
                max_ms: *delay_ms,
            }),
            Action::StoreErrors { share, seconds, .. } if *share >= 1.0 => one(Sim::StoreOutage {
                for_ms: ms(*seconds),
            }),
            Action::StoreErrors { .. } => unknown("store errors of a share below 1"),
            Action::Damage { how } => one(Sim::DamageCheckpoint {
                missing: *how == Damage::Remove,
            }),
            Action::Inject { injection, seconds } => match injection {
                Injection::FlipGradientBits { share } => one(Sim::LyingWorker {
                    for_ms: seconds.map_or(LIE_MS, ms),
                    permille: permille(*share),
                }),
                Injection::HangDevice => one(Sim::Freeze { for_ms: HANG_MS }),
                Injection::SlowDevice { delay_ms } => one(Sim::SlowWorker {
                    for_ms: seconds.map_or(HANG_MS, ms),
                    factor: 1 + delay_ms / self.planned.plan.timing.compute_max_ms.max(1),
                }),
                Injection::Panic { .. } => one(Sim::KillMidway),
                Injection::NonFiniteGradient => {
                    unknown("non_finite: its gradients are whole numbers")
                }
            },
            Action::Drain => one(Sim::Drain),
        }
    }

    fn weather(&self, weather: crate::scenario::Weather, for_ms: u64) -> Vec<Sim> {
        let mut actions = Vec::new();
        if weather.loss > 0.0 {
            let permille = permille(weather.loss);
            actions.push(Sim::Drop { for_ms, permille });
        }
        if weather.delay_ms > 0 {
            let permille = 1_000;
            actions.push(Sim::Delay { for_ms, permille });
        }
        if weather.reorder > 0.0 {
            actions.push(Sim::Reorder { for_ms });
        }
        if weather.duplicate > 0.0 {
            let permille = permille(weather.duplicate);
            actions.push(Sim::Duplicate { for_ms, permille });
        }
        if weather.corrupt > 0.0 {
            let permille = permille(weather.corrupt);
            actions.push(Sim::Corrupt { for_ms, permille });
        }
        if weather.bandwidth_mbit > 0.0 {
            // A gradient of a whole block in float32.
            let bits = self.run.cluster.block_params as f64 * 32.0;
            let tensor_ms = (bits / (weather.bandwidth_mbit * 1_000.0)).ceil() as u64;
            actions.push(Sim::SlowLink {
                for_ms,
                tensor_ms: tensor_ms.clamp(1, 200),
            });
        }
        actions
    }

    fn moment(&mut self, fault: &Fault, step: u64) -> Moment {
        let step = self.scale.step(step);
        let reached = |phase| Moment::Phase {
            phase,
            from_step: step,
            skip: 0,
        };
        let moment = match fault.moment.phase {
            None if fault.moment.after_seconds > 0.0 => {
                return Moment::At(ms(fault.moment.after_seconds));
            }
            None => Moment::Step(step),
            Some(Phase::Start) => return Moment::At(START_MS),
            Some(Phase::Checkpoint) => reached(SimPhase::Snapshot),
            Some(Phase::Evaluation) => {
                let every = self.planned.plan.workload.evaluate_every.max(1);
                Moment::Step(step.next_multiple_of(every).max(every))
            }
            // Together with the fault before it, which nobody has noticed yet.
            Some(Phase::Recovery) => Moment::Step(self.last_step.max(step)),
            Some(Phase::Election) => reached(SimPhase::Election),
            Some(Phase::Seeding) => reached(SimPhase::Seeding),
            Some(Phase::Rollback) => reached(SimPhase::Restoring),
        };
        if let Moment::Step(step) = moment {
            self.last_step = step;
        }
        moment
    }
}

/// What a fault of a loader does to the workers, which wait for batches.
fn starving(action: &Action) -> Result<Sim, String> {
    let for_ms = match action {
        Action::Kill | Action::Inject { .. } => LOADER_AWAY_MS,
        Action::Pause { seconds } => seconds.map_or(HANG_MS, ms),
        Action::Partition { seconds, .. } | Action::Network { seconds, .. } => ms(*seconds),
        other => {
            return Err(format!(
                "the simulator has no loaders that {} could strike",
                other.kind()
            ));
        }
    };
    Ok(Sim::SlowWorker {
        for_ms,
        factor: STARVED_FACTOR,
    })
}
