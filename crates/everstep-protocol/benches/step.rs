//! Events per second of the protocol alone: the real machines of a whole cluster in one thread, over a network without delay, with a toy
//! for arithmetic. An element is one event that one machine handles; what a step takes is that, times its events, over as many
//! processes as there are.
//!
//! `coordinator` is the leader's part: it is one process however large the cluster is.
//!
//! `cargo bench -p everstep-protocol`

// A bench measures time; the machines are still told theirs.
#![allow(missing_docs, clippy::disallowed_types)]

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use everstep_protocol::audit::AuditPlan;
use everstep_protocol::coordinator::placement::Rules;
use everstep_protocol::coordinator::{self, CoordinatorConfig};
use everstep_protocol::policy::History;
use everstep_protocol::shard::{self, ShardConfig};
use everstep_protocol::worker::{self, WorkerConfig};
use everstep_protocol::{
    BlockId, Coordinator, Decision, Digest, Epoch, GradientReport, Member, Message, Numerics, Role,
    Shard, Step, Task, Worker,
};

/// Sums and states that cost nothing.
#[derive(Clone, Debug)]
struct Toy;

impl Numerics for Toy {
    type Gradient = u64;
    type Parameters = u64;
    type State = u64;

    fn sum(&self, left: u64, right: u64) -> u64 {
        left.wrapping_add(right)
    }

    fn report(&self, _block: BlockId, gradient: &u64) -> GradientReport {
        GradientReport {
            squared_norm: *gradient as f64,
            finite: true,
            loss_sum: 1.0,
            tokens: 1,
            load_excess: 0.0,
            history: History::default(),
        }
    }

    fn decide(&self, _step: Step, reports: &[GradientReport]) -> Decision {
        Decision {
            apply: true,
            scale: 1.0,
            gradient_norm: reports.iter().map(|report| report.squared_norm).sum(),
            loss: 1.0,
            tokens: 1,
            load_excess: 0.0,
            is_spike: false,
            history: History::default(),
        }
    }

    fn apply(&self, _: BlockId, _: Step, _: &Decision, gradient: &u64, state: &mut u64) {
        *state = state.wrapping_add(*gradient);
    }

    fn parameters(&self, _: BlockId, state: &u64) -> u64 {
        *state
    }

    fn digest(&self, gradients: &[u64]) -> Digest {
        let sum = gradients.iter().fold(0u64, |sum, gradient| {
            sum.wrapping_mul(31).wrapping_add(*gradient)
        });
        Digest([sum, 0])
    }
}

/// A cluster's size.
#[derive(Clone, Copy)]
struct Size {
    name: &'static str,
    num_workers: u32,
    num_shards: u32,
    num_slots: u32,
    num_blocks: u32,
    audit_share: f64,
}

const SIZES: [Size; 4] = [
    Size {
        name: "3x3",
        num_workers: 3,
        num_shards: 3,
        num_slots: 8,
        num_blocks: 24,
        audit_share: 0.0,
    },
    Size {
        name: "64x64",
        num_workers: 64,
        num_shards: 64,
        num_slots: 256,
        num_blocks: 256,
        audit_share: 0.0,
    },
    Size {
        name: "64x64, all audited",
        num_workers: 64,
        num_shards: 64,
        num_slots: 256,
        num_blocks: 256,
        audit_share: 1.0,
    },
    // One process of a large model: what grows with the square of the blocks shows here.
    Size {
        name: "1x1, 4096 blocks",
        num_workers: 1,
        num_shards: 1,
        num_slots: 4,
        num_blocks: 4096,
        audit_share: 0.0,
    },
];

fn member(role: Role, index: u32) -> Member {
    Member {
        role,
        index,
        incarnation: 1,
    }
}

struct Cluster {
    coordinator: Coordinator<Toy>,
    shards: Vec<Shard<Toy>>,
    workers: Vec<Worker<Toy>>,
    mail: VecDeque<(Member, Member, Message<Toy>)>,
    num_blocks: u32,
    num_decided: u64,
    num_events: u64,
    num_led: u64,
    leader_time: Duration,
}

impl Cluster {
    fn new(size: Size) -> Self {
        const RESEND_MS: u64 = 1000;
        let audit = AuditPlan {
            seed: 1,
            share: size.audit_share,
        };
        let config = CoordinatorConfig {
            num_slots: size.num_slots,
            num_blocks: size.num_blocks,
            num_steps: u64::MAX,
            replication: 2,
            checkpoint_every: 0,
            evaluate_every: 0,
            num_evaluation_chunks: 0,
            num_shards: size.num_shards,
            shard_domains: Vec::new(),
            gather_ms: 1000,
            lease_ms: 1000,
            resend_ms: RESEND_MS,
            audit,
            skip_limit: 0,
        };
        let shard = |index| ShardConfig {
            me: member(Role::Shard, index),
            num_slots: size.num_slots,
            num_blocks: size.num_blocks,
            resend_ms: RESEND_MS,
        };
        let worker = |index| WorkerConfig {
            me: member(Role::Worker, index),
            num_slots: size.num_slots,
            num_blocks: size.num_blocks,
            resend_ms: RESEND_MS,
            audit,
        };
        let mut cluster = Self {
            coordinator: Coordinator::new(config, member(Role::Coordinator, 0), Toy),
            shards: (0..size.num_shards)
                .map(|index| Shard::new(shard(index), Toy))
                .collect(),
            workers: (0..size.num_workers)
                .map(|index| Worker::new(worker(index), Toy))
                .collect(),
            mail: VecDeque::new(),
            num_blocks: size.num_blocks,
            num_decided: 0,
            num_events: 0,
            num_led: 0,
            leader_time: Duration::ZERO,
        };
        for index in 0..cluster.workers.len() {
            cluster.work(index, worker::Event::Started);
        }
        for index in 0..cluster.shards.len() {
            cluster.shard(index, shard::Event::Started);
        }
        cluster.lead(coordinator::Event::Elected {
            epoch: Epoch(1),
            checkpoint: Step(0),
            high_water: Step(0),
            quarantined: Vec::new(),
        });
        cluster
    }

    fn lead(&mut self, event: coordinator::Event<Toy>) {
        let me = member(Role::Coordinator, 0);
        self.num_events += 1;
        self.num_led += 1;
        let begun = Instant::now();
        let effects = self.coordinator.handle(0, event);
        self.leader_time += begun.elapsed();
        for effect in effects {
            match effect {
                coordinator::Effect::Send { to, message } => self.mail.push_back((me, to, message)),
                coordinator::Effect::Broadcast { message } => {
                    let shards = (0..self.shards.len() as u32).map(|i| member(Role::Shard, i));
                    let workers = (0..self.workers.len() as u32).map(|i| member(Role::Worker, i));
                    let all = shards.chain(workers);
                    self.mail.extend(all.map(|to| (me, to, message.clone())));
                }
                coordinator::Effect::FindCheckpoint => {
                    self.lead(coordinator::Event::CheckpointFound { version: Step(0) });
                }
                coordinator::Effect::LogStep { .. } => self.num_decided += 1,
                _ => {}
            }
        }
    }

    fn shard(&mut self, index: usize, event: shard::Event<Toy>) {
        let me = member(Role::Shard, index as u32);
        self.num_events += 1;
        for effect in self.shards[index].handle(0, event) {
            match effect {
                shard::Effect::Send { to, message } => self.mail.push_back((me, to, message)),
                shard::Effect::Load {
                    lineage,
                    version,
                    blocks,
                } => {
                    for block in blocks {
                        self.shard(
                            index,
                            shard::Event::Loaded {
                                lineage,
                                version,
                                block,
                                state: 1,
                            },
                        );
                    }
                }
                _ => {}
            }
        }
    }

    fn work(&mut self, index: usize, event: worker::Event<Toy>) {
        let me = member(Role::Worker, index as u32);
        self.num_events += 1;
        for effect in self.workers[index].handle(0, event) {
            match effect {
                worker::Effect::Send { to, message } => self.mail.push_back((me, to, message)),
                worker::Effect::Compute {
                    step,
                    task: Task::Slot(slot) | Task::Audit { slot, .. },
                } => {
                    let gradients = vec![u64::from(slot); self.num_blocks as usize];
                    self.work(
                        index,
                        worker::Event::Computed {
                            step,
                            slot,
                            gradients,
                        },
                    );
                }
                _ => {}
            }
        }
    }

    /// Runs until so many more steps are decided.
    fn run(&mut self, num_steps: u64) {
        let until = self.num_decided + num_steps;
        while self.num_decided < until {
            let (from, to, message) = self.mail.pop_front().expect("the cluster stands still");
            let index = to.index as usize;
            match to.role {
                Role::Coordinator => self.lead(coordinator::Event::Message { from, message }),
                Role::Shard => self.shard(index, shard::Event::Message { from, message }),
                Role::Worker => self.work(index, worker::Event::Message { from, message }),
            }
        }
    }
}

/// Steps that a size is counted over.
const COUNTED_STEPS: u64 = 4;

fn steps(criterion: &mut Criterion) {
    for part in ["cluster", "coordinator"] {
        let mut group = criterion.benchmark_group(part);
        group.sample_size(10);
        for size in SIZES {
            let mut cluster = Cluster::new(size);
            cluster.run(2);
            let events = |cluster: &Cluster| match part {
                "cluster" => cluster.num_events,
                _ => cluster.num_led,
            };
            let before = events(&cluster);
            cluster.run(COUNTED_STEPS);
            let per_step = (events(&cluster) - before) / COUNTED_STEPS;
            group.throughput(Throughput::Elements(per_step));
            group.bench_function(BenchmarkId::from_parameter(size.name), |bencher| {
                bencher.iter_custom(|num_steps| {
                    let (begun, before) = (Instant::now(), cluster.leader_time);
                    cluster.run(num_steps);
                    match part {
                        "cluster" => begun.elapsed(),
                        _ => cluster.leader_time - before,
                    }
                });
            });
        }
        group.finish();
    }
}

/// Shards that join a cluster one by one: each changes the view, and takes its share.
fn joins(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("placement of a shard that joins");
    for (num_shards, num_blocks) in [(3, 24), (64, 256), (64, 4096)] {
        let rules = Rules {
            replication: 2,
            domains: &[],
            draining: BTreeSet::new(),
        };
        let shards: Vec<Member> = (0..num_shards)
            .map(|index| member(Role::Shard, index))
            .collect();
        let placements = rules.initial(num_blocks, &shards[1..]);
        let name = format!("{num_shards} shards, {num_blocks} blocks");
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
            bencher.iter_batched(
                || placements.clone(),
                |mut placements| {
                    assert!(rules.rebalance(&mut placements, &shards, 8));
                    placements
                },
                BatchSize::LargeInput,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, steps, joins);
criterion_main!(benches);
