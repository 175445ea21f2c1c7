//! One step's overhead outside forward and backward: lease, sums, reduction, decision, update, publication, with the real machines and
//! the real arithmetic on the size of `examples/shakespeare-char.toml` (804,096 parameters, 4 slots), in one process.
//!
//! `cargo bench -p everstep-optim --bench step`

use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use everstep_optim::{
    ComputeDtype, Gradient, Init, Layout, OptimizerConfig, ParameterSpec, TrainingNumerics, Update,
};
use everstep_protocol::audit::AuditPlan;
use everstep_protocol::coordinator::{self, CoordinatorConfig};
use everstep_protocol::shard::{self, ShardConfig};
use everstep_protocol::worker::{self, WorkerConfig};
use everstep_protocol::{Coordinator, Epoch, Member, Message, Role, Shard, Step, Task, Worker};

const SLOTS: u32 = 4;

struct Process {
    numerics: TrainingNumerics,
    coordinator: Coordinator<TrainingNumerics>,
    shard: Shard<TrainingNumerics>,
    worker: Worker<TrainingNumerics>,
    mail: VecDeque<(Member, Member, Message<TrainingNumerics>)>,
    /// What the device would give for a slot; copied, as the device's result is.
    gradients: Vec<Vec<f32>>,
    decided: u64,
}

fn member(role: Role) -> Member {
    Member {
        role,
        index: 0,
        incarnation: 1,
    }
}

impl Process {
    fn new() -> Self {
        let parameters = vec![
            ParameterSpec {
                name: "matrices".into(),
                shape: vec![6273, 128],
                init: Init::Normal { std: 0.02 },
                update: Update::Decayed,
                group: 0,
            },
            ParameterSpec {
                name: "norms".into(),
                shape: vec![1152],
                init: Init::Ones,
                update: Update::Plain,
                group: 0,
            },
        ];
        let layout = Arc::new(Layout::new(parameters, 1 << 20).expect("the layout is valid"));
        let config = OptimizerConfig::new(1e-3, 1_000_000);
        let numerics = TrainingNumerics::new(layout.clone(), config, ComputeDtype::Float32)
            .expect("the optimizer is valid");
        let num_blocks = layout.num_blocks();
        let config = CoordinatorConfig {
            num_slots: SLOTS,
            num_blocks,
            num_steps: 1_000_000,
            replication: 1,
            checkpoint_every: 0,
            evaluate_every: 0,
            num_evaluation_chunks: 0,
            num_shards: 1,
            shard_domains: Vec::new(),
            gather_ms: 1,
            lease_ms: 1_000_000,
            resend_ms: 1_000_000,
            audit: AuditPlan::default(),
            skip_limit: 0,
        };
        let me = member(Role::Shard);
        let shard = ShardConfig {
            me,
            num_slots: SLOTS,
            num_blocks,
            resend_ms: 1_000_000,
        };
        let me = member(Role::Worker);
        let worker = WorkerConfig {
            me,
            num_slots: SLOTS,
            num_blocks,
            resend_ms: 1_000_000,
            audit: AuditPlan::default(),
        };
        let gradient = |block: &everstep_optim::Block| {
            (0..block.len)
                .map(|i| (i % 97) as f32 * 1e-3 - 0.05)
                .collect()
        };
        let mut process = Self {
            coordinator: Coordinator::new(config, member(Role::Coordinator), numerics.clone()),
            shard: Shard::new(shard, numerics.clone()),
            worker: Worker::new(worker, numerics.clone()),
            mail: VecDeque::new(),
            gradients: layout.blocks().iter().map(gradient).collect(),
            numerics,
            decided: 0,
        };
        process.on_coordinator(coordinator::Event::Elected {
            epoch: Epoch(1),
            checkpoint: Step(0),
            high_water: Step(0),
            quarantined: Vec::new(),
        });
        process.on_shard(shard::Event::Started);
        process.on_worker(worker::Event::Started);
        process
    }

    fn on_coordinator(&mut self, event: coordinator::Event<TrainingNumerics>) {
        use coordinator::Effect;
        let from = member(Role::Coordinator);
        for effect in self.coordinator.handle(0, event) {
            match effect {
                Effect::Send { to, message } => self.mail.push_back((from, to, message)),
                Effect::Broadcast { message } => {
                    for role in [Role::Shard, Role::Worker] {
                        self.mail.push_back((from, member(role), message.clone()));
                    }
                }
                Effect::FindCheckpoint => {
                    let version = Step(0);
                    self.on_coordinator(coordinator::Event::CheckpointFound { version });
                }
                Effect::LogStep { decision, .. } => {
                    black_box(decision);
                    self.decided += 1;
                }
                _ => {}
            }
        }
    }

    fn on_shard(&mut self, event: shard::Event<TrainingNumerics>) {
        use shard::Effect;
        let from = member(Role::Shard);
        for effect in self.shard.handle(0, event) {
            match effect {
                Effect::Send { to, message } => self.mail.push_back((from, to, message)),
                Effect::SendCoordinators { message } => {
                    self.mail
                        .push_back((from, member(Role::Coordinator), message));
                }
                Effect::Load {
                    lineage,
                    version,
                    blocks,
                } => {
                    for block in blocks {
                        let state = self.numerics.initial_state(1, block);
                        self.on_shard(shard::Event::Loaded {
                            lineage,
                            version,
                            block,
                            state,
                        });
                    }
                }
                _ => {}
            }
        }
    }

    fn on_worker(&mut self, event: worker::Event<TrainingNumerics>) {
        use worker::Effect;
        let from = member(Role::Worker);
        for effect in self.worker.handle(0, event) {
            match effect {
                Effect::Send { to, message } => self.mail.push_back((from, to, message)),
                Effect::SendCoordinators { message } => {
                    self.mail
                        .push_back((from, member(Role::Coordinator), message));
                }
                Effect::LoadParameters { parameters, .. } => {
                    // The device copies them.
                    black_box(parameters.as_bytes().to_vec());
                }
                Effect::Compute {
                    step,
                    task: Task::Slot(slot),
                } => {
                    let gradient = |values: &Vec<f32>| Gradient::new(values.clone(), 1.0, 192);
                    let gradients = self.gradients.iter().map(gradient).collect();
                    self.on_worker(worker::Event::Computed {
                        step,
                        slot,
                        gradients,
                    });
                }
                _ => {}
            }
        }
    }

    /// Delivers messages until one more step is decided.
    fn step(&mut self) {
        let until = self.decided + 1;
        while self.decided < until {
            let (from, to, message) = self
                .mail
                .pop_front()
                .expect("a step ends with its decision");
            match to.role {
                Role::Coordinator => {
                    self.on_coordinator(coordinator::Event::Message { from, message });
                }
                Role::Shard => self.on_shard(shard::Event::Message { from, message }),
                Role::Worker => self.on_worker(worker::Event::Message { from, message }),
            }
        }
    }
}

fn step(criterion: &mut Criterion) {
    let mut process = Process::new();
    process.step();
    criterion.bench_function("step overhead, 804,096 parameters, 4 slots", |bencher| {
        bencher.iter(|| process.step());
    });
}

criterion_group!(benches, step);
criterion_main!(benches);
