use super::*;
use crate::audit::AuditPlan;
use crate::ids::{Lineage, Role, SlotRange};
use crate::message::{BlockStatus, Status, View, ViewId};
use crate::testing::{LINE, Words, coordinator as me, reborn, report, shard, worker};

mod audits;
mod checkpoints;
mod drains;
mod policy;
mod stragglers;

/// A leader under test. Effects become lines; heartbeats and views to workers are left out.
struct Bench {
    coordinator: Coordinator<Words>,
    now_ms: u64,
    /// Whether the store answers.
    has_store: bool,
}

fn config() -> CoordinatorConfig {
    CoordinatorConfig {
        num_slots: 4,
        num_blocks: 2,
        num_steps: 3,
        replication: 2,
        checkpoint_every: 2,
        evaluate_every: 0,
        num_evaluation_chunks: 2,
        num_shards: 2,
        shard_domains: Vec::new(),
        gather_ms: 1000,
        lease_ms: 500,
        resend_ms: 100,
        audit: AuditPlan::default(),
        skip_limit: 0,
    }
}

impl Bench {
    fn new(config: CoordinatorConfig) -> Self {
        Self {
            coordinator: Coordinator::new(config, me(0), Words),
            now_ms: 0,
            has_store: true,
        }
    }

    fn elect(&mut self, epoch: u64, checkpoint: u64, high_water: u64) -> Vec<String> {
        self.take(Event::Elected {
            epoch: Epoch(epoch),
            checkpoint: Step(checkpoint),
            high_water: Step(high_water),
            quarantined: Vec::new(),
        })
    }

    /// Two shards and two workers in step 0 of epoch 1.
    fn training(config: CoordinatorConfig) -> Self {
        Self::training_of(2, 2, config)
    }

    /// So many workers and shards in step 0 of epoch 1.
    fn training_of(num_workers: u32, num_shards: u32, config: CoordinatorConfig) -> Self {
        let mut bench = Self::new(config);
        bench.elect(1, 0, 0);
        for index in 0..num_workers {
            bench.hello(worker(index), idle());
        }
        for index in 0..num_shards {
            bench.hello(shard(index), empty());
        }
        for index in 0..num_shards {
            bench.ready(shard(index));
        }
        assert_eq!(bench.coordinator.phase(), Phase::Training);
        bench
    }

    /// What an event leads to; the store answers at once.
    fn take(&mut self, event: Event<Words>) -> Vec<String> {
        let mut effects = self.coordinator.handle(self.now_ms, event);
        let is_search = |effect: &Effect<Words>| matches!(effect, Effect::FindCheckpoint);
        if self.has_store && effects.iter().any(is_search) {
            let version = self.coordinator.committed();
            let found = Event::CheckpointFound { version };
            effects.extend(self.coordinator.handle(self.now_ms, found));
        }
        effects.iter().filter_map(line).collect()
    }

    fn hear(&mut self, from: Member, message: Message<Words>) -> Vec<String> {
        self.take(Event::Message { from, message })
    }

    fn hello(&mut self, from: Member, status: Status) -> Vec<String> {
        let epoch = self.coordinator.epoch();
        self.hear(from, Message::Hello { epoch, status })
    }

    fn current(&self) -> ViewId {
        self.coordinator.view().map(View::id).unwrap_or_default()
    }

    fn ready(&mut self, from: Member) -> Vec<String> {
        let view = self.current();
        self.hear(from, Message::ViewReady { view })
    }

    fn reduced(&mut self, step: u64, block: BlockId) -> Vec<String> {
        let message = Message::Reduced {
            view: self.current(),
            step: Step(step),
            block,
            report: report(f64::from(block) + 1.0),
            testimonies: Vec::new(),
        };
        self.hear(shard(block), message)
    }

    fn delivered(&mut self, from: Member, step: u64, start: u32, end: u32) -> Vec<String> {
        let message = Message::Delivered {
            view: self.current(),
            step: Step(step),
            range: SlotRange::new(start, end),
        };
        self.hear(from, message)
    }

    fn lose(&mut self, member: Member) -> Vec<String> {
        self.take(Event::Lost { member })
    }

    fn tick(&mut self, now_ms: u64) -> Vec<String> {
        self.now_ms = now_ms;
        self.take(Event::Tick)
    }

    fn placement(&self, block: usize) -> String {
        let placement = &self.coordinator.view().unwrap().placements[block];
        let names = |members: &[Member]| -> Vec<u32> {
            members.iter().map(|member| member.index).collect()
        };
        format!(
            "{} {:?} {:?}",
            placement.primary.index,
            names(&placement.backups),
            names(&placement.joining)
        )
    }
}

fn empty() -> Status {
    Status::Shard {
        quarantined: Vec::new(),
        lineage: Lineage(0),
        blocks: Vec::new(),
    }
}

fn idle() -> Status {
    Status::Worker {
        lineage: Lineage(0),
        step: Step(0),
        held: Vec::new(),
    }
}

/// Blocks by version; `Some` if the reduced gradient of that version is held.
fn holding(blocks: &[(u64, bool)]) -> Status {
    Status::Shard {
        quarantined: Vec::new(),
        lineage: LINE,
        blocks: (0..)
            .zip(blocks)
            .map(|(block, (version, reduced))| BlockStatus {
                block,
                version: Step(*version),
                last: Some(report(f64::from(block) + 1.0)),
                reduced: reduced.then_some(report(f64::from(block) + 1.0)),
            })
            .collect(),
    }
}

fn line(effect: &Effect<Words>) -> Option<String> {
    Some(match effect {
        Effect::Send { to, message } => {
            let what = match message {
                Message::View(view) if to.role == Role::Shard => format!("view {}", view.number),
                Message::View(_) => return None,
                Message::Lease { step, tasks, .. } => format!("lease {} {tasks:?}", step.0),
                Message::Decide { step, snapshot, .. } => {
                    let snapshot = if *snapshot { " snapshot" } else { "" };
                    format!("decide {}{snapshot}", step.0)
                }
                Message::Snapshot {
                    version, blocks, ..
                } => format!("snapshot {} {blocks:?}", version.0),
                Message::Expelled { .. } => "expelled".to_owned(),
                Message::Announce { epoch } => format!("announce {}", epoch.0),
                Message::Finish { .. } => "finish".to_owned(),
                other => format!("{other:?}"),
            };
            format!(
                "{}-{} {what}",
                if to.role == Role::Shard { "s" } else { "w" },
                to.index
            )
        }
        Effect::Broadcast {
            message: Message::Announce { .. },
        } => return None,
        Effect::Broadcast { .. } => "broadcast finish".to_owned(),
        Effect::LogStep { step, decision } => {
            format!("log {} {}", step.0, decision.gradient_norm)
        }
        Effect::LogEvaluation { version, sums } => {
            let (loss, tokens) = (sums.loss(), sums.tokens);
            format!("evaluation {} {loss} {tokens}", version.0)
        }
        Effect::CommitManifest { version, objects } => {
            format!("commit {} {objects:?}", version.0)
        }
        Effect::FindCheckpoint => return None,
        Effect::Note(Note::MemberJoined { .. }) => return None,
        Effect::Note(note) => match note {
            Note::MemberLost { member } => format!("lost {member}"),
            Note::Expelled { member } => format!("expelled {member}"),
            Note::SlotsReassigned { slots, lost, .. } => format!("again {slots:?} {lost}"),
            Note::ShardPromoted { member, blocks } => format!("promoted {member} {blocks:?}"),
            Note::BackupSeeded { member, blocks } => format!("seeded {member} {blocks:?}"),
            Note::Degraded { blocks, replicas } => format!("degraded {blocks:?} {replicas}"),
            Note::Resumed { step, .. } => format!("resumed {}", step.0),
            Note::MemberLeft { member } => format!("left {member}"),
            Note::DrainStarted { member } => format!("drains {member}"),
            Note::DrainFinished {
                member, num_moved, ..
            } => format!("drained {member} {num_moved}"),
            Note::DrainHolds { version } => format!("holds {}", version.0),
            Note::Rollback { to, from, .. } => format!("rollback {} from {}", to.0, from.0),
            other => format!("{other:?}"),
        },
        Effect::Release { member } => format!("release {member}"),
        other => format!("{other:?}"),
    })
}

const NOTHING: [&str; 0] = [];

#[test]
fn a_fresh_run_gathers_places_and_leases() {
    let mut bench = Bench::new(config());
    assert_eq!(bench.elect(1, 0, 0), NOTHING);
    assert_eq!(bench.hello(worker(0), idle()), NOTHING);
    assert_eq!(bench.hello(shard(1), empty()), NOTHING);
    assert_eq!(bench.hello(shard(0), empty()), ["s-0 view 1", "s-1 view 1"]);
    assert_eq!(
        (bench.placement(0), bench.placement(1)),
        ("0 [1] []".into(), "1 [0] []".into())
    );
    assert_eq!(bench.ready(shard(1)), NOTHING);
    assert_eq!(
        bench.ready(shard(0)),
        [
            "resumed 0",
            "w-0 lease 0 [Slot(0), Slot(1), Slot(2), Slot(3)]"
        ]
    );
    // A worker that joins gets its share of the next step; there is nothing free in this one.
    assert_eq!(bench.hello(worker(1), idle()), NOTHING);
    bench.reduced(0, 0);
    assert_eq!(
        bench.reduced(0, 1)[5..],
        [
            "w-0 lease 1 [Slot(0), Slot(1)]",
            "w-1 lease 1 [Slot(2), Slot(3)]"
        ]
    );
}

#[test]
fn missing_shards_are_waited_for_but_not_for_ever() {
    let mut bench = Bench::new(config());
    bench.elect(1, 0, 0);
    assert_eq!(bench.tick(5000), NOTHING, "not without any shard");
    let mut bench = Bench::new(config());
    bench.elect(1, 0, 0);
    bench.hello(shard(1), empty());
    assert_eq!(bench.tick(900), NOTHING);
    assert_eq!(bench.tick(1000), ["degraded [0, 1] 1", "s-1 view 1"]);
}

#[test]
fn a_decision_is_logged_first_then_told_and_the_next_step_leased() {
    let mut bench = Bench::training(config());
    assert_eq!(bench.reduced(0, 1), NOTHING);
    assert_eq!(bench.reduced(1, 0), NOTHING, "another step");
    assert_eq!(
        bench.reduced(0, 0),
        [
            "log 0 102",
            "s-0 decide 0",
            "s-1 decide 0",
            "w-0 decide 0",
            "w-1 decide 0",
            "w-0 lease 1 [Slot(0), Slot(1)]",
            "w-1 lease 1 [Slot(2), Slot(3)]"
        ]
    );
    // Shards that do not confirm are told again.
    let applied = Message::Applied {
        lineage: LINE,
        step: Step(0),
    };
    bench.hear(shard(0), applied);
    let said = bench.tick(100);
    assert!(said.contains(&"s-1 decide 0".into()), "{said:?}");
    assert!(!said.contains(&"s-0 decide 0".into()), "{said:?}");
}

#[test]
fn a_lost_workers_slots_are_leased_again_unless_delivered() {
    let mut bench = Bench::training(config());
    bench.delivered(worker(0), 0, 0, 1);
    assert_eq!(
        bench.lose(worker(0)),
        ["lost worker-0#1", "again [1] true", "w-1 lease 0 [Slot(1)]"]
    );
    assert_eq!(bench.coordinator.slots_recomputed(), 1);
    assert_eq!(bench.lose(worker(0)), NOTHING, "twice");
    // Its later messages do no harm and tell it to end.
    let late = Message::Evaluated {
        step: Step(0),
        chunk: 0,
        sums: EvaluationSums::default(),
    };
    let expelled = ["expelled worker-0#1", "w-0 expelled"];
    assert_eq!(bench.hear(worker(0), late), expelled);
    assert_eq!(bench.hello(worker(0), idle()), expelled);
    // Its next life is welcome.
    assert_eq!(bench.hello(reborn(worker(0)), idle()), NOTHING);
    assert_eq!(bench.coordinator.members().count(), 4);
}

#[test]
fn a_new_life_ends_the_old_one() {
    let mut bench = Bench::training(config());
    assert_eq!(
        bench.hello(reborn(worker(1)), idle()),
        [
            "lost worker-1#1",
            "again [2, 3] true",
            "w-0 lease 0 [Slot(2), Slot(3)]"
        ]
    );
    assert_eq!(
        bench.hello(worker(1), idle()),
        ["expelled worker-1#1", "w-1 expelled"]
    );
}

#[test]
fn unanswered_leases_are_repeated() {
    let mut bench = Bench::training(config());
    bench.delivered(worker(1), 0, 2, 3);
    let said = bench.tick(100);
    assert!(
        said.contains(&"w-0 lease 0 [Slot(0), Slot(1)]".into()),
        "{said:?}"
    );
    assert!(said.contains(&"w-1 lease 0 [Slot(3)]".into()), "{said:?}");
}

#[test]
fn a_lost_shards_backups_are_promoted_and_replicas_counted_anew() {
    let mut bench = Bench::training(config());
    bench.reduced(0, 0);
    assert_eq!(
        bench.lose(shard(0)),
        [
            "lost shard-0#1",
            "promoted shard-1#1 [0]",
            "degraded [0, 1] 1",
            "s-1 view 2"
        ]
    );
    assert_eq!(
        bench.reduced(0, 1),
        NOTHING,
        "block 0 is not reported in this view"
    );
    let old = Message::Reduced {
        view: ViewId {
            epoch: Epoch(1),
            number: 1,
        },
        step: Step(0),
        block: 0,
        report: report(1.0),
        testimonies: Vec::new(),
    };
    assert_eq!(bench.hear(shard(1), old), NOTHING);
    // The next life joins, is seeded at this step's version, and primaries are balanced between two steps.
    assert_eq!(
        bench.hello(reborn(shard(0)), empty()),
        ["s-0 view 3", "s-1 view 3"]
    );
    assert_eq!(bench.placement(0), "1 [] [0]");
    let seeded = |block, version| Message::Seeded {
        lineage: LINE,
        block,
        version: Step(version),
    };
    assert_eq!(
        bench.hear(reborn(shard(0)), seeded(0, 1)),
        NOTHING,
        "another version"
    );
    assert_eq!(bench.hear(reborn(shard(0)), seeded(0, 0)), NOTHING);
    assert_eq!(
        bench.hear(reborn(shard(0)), seeded(1, 0)),
        ["seeded shard-0#2 [0, 1]", "s-0 view 4", "s-1 view 4"]
    );
    let reduce = |bench: &mut Bench, block| {
        let message = Message::Reduced {
            view: bench.current(),
            step: Step(0),
            block,
            report: report(1.0),
            testimonies: Vec::new(),
        };
        bench.hear(shard(1), message)
    };
    reduce(&mut bench, 0);
    let said = reduce(&mut bench, 1);
    assert_eq!(said[0], "log 0 101");
    assert_eq!(bench.current().number, 5);
    assert_eq!(
        (bench.placement(0), bench.placement(1)),
        ("0 [1] []".into(), "1 [0] []".into())
    );
}

#[test]
fn what_a_dead_worker_delivered_to_a_dead_primary_is_computed_again() {
    let mut bench = Bench::training(config());
    bench.delivered(worker(0), 0, 0, 2);
    bench.delivered(worker(1), 0, 2, 4);
    bench.lose(worker(0));
    bench.lose(shard(0));
    // The new primaries have a moment to report that they lack nothing.
    let said = bench.tick(50);
    assert!(said.iter().all(|line| !line.contains("again")), "{said:?}");
    let said = bench.tick(100);
    assert!(said.contains(&"again [0, 1] true".into()), "{said:?}");
    assert!(
        said.contains(&"w-1 lease 0 [Slot(0), Slot(1)]".into()),
        "{said:?}"
    );
    // Worker 1 delivers to the new primaries; what it said of the old ones does not count.
    let old = Message::Delivered {
        view: ViewId {
            epoch: Epoch(1),
            number: 1,
        },
        step: Step(0),
        range: SlotRange::new(2, 4),
    };
    bench.hear(worker(1), old);
    let said = bench.lose(worker(1));
    assert!(said.contains(&"again [0, 1, 2, 3] true".into()), "{said:?}");
}

#[test]
fn a_block_without_replicas_takes_the_run_back_to_its_checkpoint() {
    let mut bench = Bench::training(CoordinatorConfig {
        replication: 1,
        ..config()
    });
    bench.reduced(0, 0);
    bench.reduced(0, 1);
    assert_eq!(bench.lose(shard(1)), ["lost shard-1#1"]);
    assert_eq!(bench.coordinator.phase(), Phase::Gathering);
    assert_eq!(bench.reduced(1, 0), NOTHING);
    assert_eq!(
        bench.hello(reborn(shard(1)), empty()),
        ["rollback 0 from 1", "s-0 view 2", "s-1 view 2"]
    );
    assert_eq!(
        bench.coordinator.view().unwrap().lineage,
        Lineage::new(Epoch(1), 1)
    );
    bench.ready(shard(0));
    let said = bench.ready(reborn(shard(1)));
    assert_eq!(said[0], "resumed 0");
    // The same step is decided again, but logged once in an epoch.
    bench.reduced(0, 0);
    let message = Message::Reduced {
        view: bench.current(),
        step: Step(0),
        block: 1,
        report: report(2.0),
        testimonies: Vec::new(),
    };
    let said = bench.hear(reborn(shard(1)), message);
    assert_eq!(said[0], "s-0 decide 0");
}

#[test]
fn a_later_leader_resumes_and_derives_the_last_decision_again() {
    let mut bench = Bench::new(config());
    bench.elect(2, 0, 2);
    let held = Status::Worker {
        lineage: LINE,
        step: Step(2),
        held: vec![SlotRange::new(0, 2)],
    };
    bench.hello(worker(0), held);
    bench.hello(worker(1), idle());
    // Shard 0 has applied step 1, shard 1 only holds its gradient.
    bench.hello(shard(0), holding(&[(2, false), (2, true)]));
    assert_eq!(
        bench.hello(shard(1), holding(&[(1, true), (1, true)])),
        [
            "s-0 view 1",
            "s-1 view 1",
            "s-0 decide 1",
            "s-1 decide 1",
            "w-0 decide 1",
            "w-1 decide 1",
            "resumed 2",
            "w-1 lease 2 [Slot(2), Slot(3)]",
            "s-0 snapshot 2 [1]",
            "s-1 snapshot 2 [0]"
        ]
    );
    assert_eq!(bench.coordinator.view().unwrap().lineage, LINE);
    assert_eq!(
        (bench.placement(0), bench.placement(1)),
        ("0 [1] []".into(), "1 [0] []".into())
    );
}

#[test]
fn a_decided_step_that_nobody_applied_is_not_lost() {
    let mut bench = Bench::new(config());
    bench.elect(2, 0, 2);
    bench.hello(shard(0), holding(&[(1, true), (1, true)]));
    let said = bench.hello(shard(1), holding(&[(1, true), (1, true)]));
    assert!(said.contains(&"s-0 decide 1".into()), "{said:?}");
    assert_eq!(bench.coordinator.step(), Step(2));
}

#[test]
fn replicas_that_lag_join_again() {
    let mut bench = Bench::new(config());
    bench.elect(2, 0, 2);
    bench.hello(shard(0), holding(&[(2, false), (2, false)]));
    bench.hello(shard(1), holding(&[(1, false), (0, true)]));
    assert_eq!(
        (bench.placement(0), bench.placement(1)),
        ("0 [] [1]".into(), "0 [] [1]".into())
    );
}

#[test]
fn a_replica_that_lags_behind_the_workers_is_not_resumed_from_at_once() {
    let mut bench = Bench::new(config());
    let computing = |step| Status::Worker {
        lineage: LINE,
        step: Step(step),
        held: Vec::new(),
    };
    // This leader has logged nothing itself, so that only workers can tell it that steps are decided.
    bench.elect(2, 0, 0);
    bench.hello(worker(0), computing(2));
    bench.hello(shard(0), holding(&[(0, true), (0, true)]));
    assert_eq!(bench.tick(900), NOTHING);
    bench.hello(shard(1), holding(&[(2, false), (2, false)]));
    assert_eq!(bench.coordinator.step(), Step(2));
    // Nobody else comes: it goes on from there. A step that was just decided is not waited for.
    for (step, from_ms) in [(2, 1000), (1, 300)] {
        let mut bench = Bench::new(config());
        bench.elect(2, 0, 0);
        bench.hello(worker(0), computing(step));
        bench.hello(shard(0), holding(&[(0, true), (0, true)]));
        bench.tick(from_ms - 1);
        assert_eq!(bench.coordinator.phase(), Phase::Gathering);
        bench.tick(from_ms + 50);
        assert_eq!(bench.coordinator.phase(), Phase::Training);
        assert_eq!(bench.coordinator.step(), Step(0));
    }
}

#[test]
fn a_leader_that_misses_decided_steps_waits_then_rolls_back() {
    let mut bench = Bench::new(config());
    bench.elect(2, 2, 3);
    bench.hello(shard(0), holding(&[(1, true), (1, true)]));
    assert_eq!(bench.tick(1000), NOTHING);
    assert_eq!(bench.tick(2900), NOTHING);
    assert_eq!(
        bench.tick(3000),
        ["rollback 2 from 3", "degraded [0, 1] 1", "s-0 view 1"]
    );
    assert_eq!(bench.coordinator.view().unwrap().restored_from, Step(2));
}

#[test]
fn a_statement_from_before_the_epoch_does_not_count() {
    let mut bench = Bench::new(config());
    bench.elect(2, 0, 0);
    let early = Message::Hello {
        epoch: Epoch(1),
        status: empty(),
    };
    assert_eq!(bench.hear(shard(0), early), ["s-0 announce 2"]);
    assert_eq!(bench.coordinator.members().count(), 0);
}

#[test]
fn a_higher_epoch_deposes() {
    let mut bench = Bench::training(config());
    let hello = Message::Hello {
        epoch: Epoch(7),
        status: empty(),
    };
    assert_eq!(bench.hear(shard(0), hello), ["Deposed { by: Epoch(7) }"]);
    assert!(!bench.coordinator.is_leading());
    assert_eq!(bench.reduced(0, 0), NOTHING);
    assert_eq!(bench.lose(shard(0)), NOTHING);
    assert_eq!(bench.tick(1000), NOTHING);
    assert_eq!(bench.coordinator.next_deadline_ms(), None);
    // An epoch that is over is no use.
    assert_eq!(bench.elect(6, 0, 0), ["Deposed { by: Epoch(7) }"]);
    assert_eq!(bench.elect(8, 0, 0), NOTHING);
    assert!(bench.coordinator.is_leading());
}

#[test]
fn malformed_input_changes_nothing() {
    let mut bench = Bench::training(config());
    let reduced = Message::Reduced {
        view: bench.current(),
        step: Step(0),
        block: 99,
        report: report(1.0),
        testimonies: Vec::new(),
    };
    assert_eq!(bench.hear(shard(0), reduced), NOTHING);
    assert_eq!(bench.delivered(worker(0), 0, 7, 3), NOTHING);
    let stored = Message::Stored {
        version: Step(77),
        blocks: vec![99],
        object: Vec::new(),
    };
    assert_eq!(bench.hear(shard(0), stored), NOTHING);
    let evaluated = Message::Evaluated {
        step: Step(0),
        chunk: 99,
        sums: EvaluationSums {
            loss_sum: f64::NAN,
            ..EvaluationSums::default()
        },
    };
    assert_eq!(bench.hear(worker(0), evaluated), NOTHING);
}
