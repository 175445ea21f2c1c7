//! Processes and the lives of the actors in them.

use std::collections::{BTreeMap, BTreeSet};

use everstep_protocol::audit::AuditPlan;
use everstep_protocol::coordinator::CoordinatorConfig;
use everstep_protocol::shard::ShardConfig;
use everstep_protocol::worker::WorkerConfig;
use everstep_protocol::{BlockId, Coordinator, Member, Role, Shard, Step, Task, Worker};

use crate::effects::{GATHER_MS, LEASE_MS, RESEND_MS};
use crate::toy::Toy;
use crate::world::{Happening, Local, World};

/// A machine in its actor.
#[derive(Debug)]
pub(crate) enum Machine {
    Coordinator(Box<Coordinator<Toy>>),
    Shard(Box<Shard<Toy>>),
    Worker(Box<Worker<Toy>>),
}

/// One actor of the topology, through all its lives.
#[derive(Debug)]
pub(crate) struct Actor {
    pub(crate) member: Member,
    pub(crate) host: usize,
    /// Absent while its process is down, or once it is over.
    pub(crate) machine: Option<Machine>,
    pub(crate) wake_ms: Option<u64>,
    /// Whether it has been told that the run is over.
    pub(crate) over: bool,
    /// Worker: what is on the device, by block.
    pub(crate) device: Vec<Option<(Step, u64)>>,
    /// Worker: the running task.
    pub(crate) running: Option<(Step, Task)>,
    /// Coordinator: when it heard of a leader.
    pub(crate) heard_ms: u64,
    /// Coordinator: whether it is trying to win an epoch.
    pub(crate) campaigns: bool,
    /// It dies while it carries out its next effects.
    pub(crate) torn: bool,
    /// Worker: where it sent the partial sums of its step.
    pub(crate) sent: Sent,
}

/// Partial sums that a worker sent: the step, and the primary by block and first slot.
#[derive(Debug, Default)]
pub(crate) struct Sent {
    pub(crate) step: Step,
    pub(crate) primaries: BTreeMap<(BlockId, u32), u32>,
}

/// A process: actors that live and die together.
#[derive(Debug, Default)]
pub(crate) struct Host {
    pub(crate) actors: Vec<usize>,
    pub(crate) is_up: bool,
    pub(crate) is_frozen: bool,
    /// When it starts first.
    pub(crate) starts_ms: u64,
    /// When it goes on.
    pub(crate) frozen_until_ms: u64,
    /// Which of its actors have been released, while it drains.
    pub(crate) drains: Option<BTreeSet<usize>>,
    /// What happened to it while it stood still.
    pub(crate) deferred: Vec<Happening>,
}

impl World<'_> {
    /// Which slots are computed twice.
    pub(crate) fn audit(&self) -> AuditPlan {
        AuditPlan {
            seed: self.seed,
            share: self.plan.workload.audit_permille as f64 / 1000.0,
        }
    }

    /// A new life begins, with nothing but its number.
    pub(crate) fn start(&mut self, actor: usize) {
        if self.actors[actor].over {
            return;
        }
        let (topology, workload) = (&self.plan.topology, &self.plan.workload);
        let me = Member {
            incarnation: self.actors[actor].member.incarnation + 1,
            ..self.actors[actor].member
        };
        let audit = self.audit();
        let machine = match me.role {
            Role::Coordinator => Machine::Coordinator(Box::new(Coordinator::new(
                CoordinatorConfig {
                    num_slots: workload.num_slots,
                    num_blocks: workload.num_blocks,
                    num_steps: workload.num_steps,
                    replication: topology.replication,
                    checkpoint_every: workload.checkpoint_every,
                    evaluate_every: workload.evaluate_every,
                    num_evaluation_chunks: workload.num_chunks,
                    num_shards: topology.num_shards,
                    shard_domains: topology.shard_domains(),
                    gather_ms: GATHER_MS,
                    lease_ms: LEASE_MS,
                    resend_ms: RESEND_MS,
                    audit,
                    skip_limit: 0,
                },
                me,
                Toy,
            ))),
            Role::Shard => Machine::Shard(Box::new(Shard::new(
                ShardConfig {
                    me,
                    num_slots: workload.num_slots,
                    num_blocks: workload.num_blocks,
                    resend_ms: RESEND_MS,
                },
                Toy,
            ))),
            Role::Worker => Machine::Worker(Box::new(Worker::new(
                WorkerConfig {
                    me,
                    num_slots: workload.num_slots,
                    num_blocks: workload.num_blocks,
                    resend_ms: RESEND_MS,
                    audit,
                },
                Toy,
            ))),
        };
        let num_blocks = workload.num_blocks as usize;
        let state = &mut self.actors[actor];
        state.member = me;
        state.machine = Some(machine);
        state.wake_ms = None;
        state.device = vec![None; num_blocks];
        state.running = None;
        state.heard_ms = self.now_ms;
        state.campaigns = false;
        state.torn = false;
        state.sent = Sent::default();
        self.say(|| format!("{me} starts"));
        self.local(actor, Local::Start);
    }

    /// An actor's machine is gone.
    pub(crate) fn stop(&mut self, actor: usize) {
        let state = &mut self.actors[actor];
        state.machine = None;
        state.wake_ms = None;
        state.running = None;
    }
}
