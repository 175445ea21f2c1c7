use super::*;
use crate::audit::AuditPlan;
use crate::ids::{Epoch, Lineage, SlotRange};
use crate::message::{Placement, Status, View};
use crate::testing::{
    LINE, Words, coordinator, decision, placement, shard, view, view_id, worker as member,
};

const V: u32 = 8;

struct Bench {
    worker: Worker<Words>,
    now_ms: u64,
    num_blocks: u32,
}

impl Bench {
    fn new(placements: Vec<Placement>) -> Self {
        let num_blocks = placements.len() as u32;
        let config = WorkerConfig {
            me: member(0),
            num_slots: V,
            num_blocks,
            resend_ms: 100,
            audit: AuditPlan::default(),
        };
        let mut bench = Self {
            worker: Worker::new(config, Words),
            now_ms: 0,
            num_blocks,
        };
        bench.take(Event::Started);
        bench.view(view(1, placements));
        bench
    }

    fn take(&mut self, event: Event<Words>) -> Vec<String> {
        let effects = self.worker.handle(self.now_ms, event);
        effects.iter().map(line).collect()
    }

    fn hear(&mut self, from: Member, message: Message<Words>) -> Vec<String> {
        self.take(Event::Message { from, message })
    }

    fn view(&mut self, view: View) -> Vec<String> {
        self.hear(view.leader, Message::View(view))
    }

    fn lease(&mut self, step: u64, tasks: &[Task]) -> Vec<String> {
        self.hear(
            coordinator(0),
            Message::Lease {
                epoch: Epoch(1),
                lineage: LINE,
                step: Step(step),
                tasks: tasks.to_vec(),
            },
        )
    }

    fn parameters(&mut self, version: u64, block: BlockId) -> Vec<String> {
        self.hear(
            shard(0),
            Message::Parameters {
                version: Step(version),
                block,
                parameters: format!("p{version}"),
            },
        )
    }

    fn computed(&mut self, step: u64, slot: u32) -> Vec<String> {
        let gradients = (0..self.num_blocks).map(|_| slot.to_string()).collect();
        self.take(Event::Computed {
            step: Step(step),
            slot,
            gradients,
        })
    }

    fn ack(&mut self, from: u32, step: u64, start: u32, end: u32, block: BlockId) -> Vec<String> {
        self.hear(
            shard(from),
            Message::PartialAck {
                lineage: LINE,
                step: Step(step),
                range: SlotRange::new(start, end),
                block,
            },
        )
    }

    fn tick(&mut self, now_ms: u64) -> Vec<String> {
        self.now_ms = now_ms;
        self.take(Event::Tick)
    }
}

fn line(effect: &Effect<Words>) -> String {
    match effect {
        Effect::Send { to, message } => {
            let what = match message {
                Message::Hello { .. } => "hello".to_owned(),
                Message::ViewReady { view } => format!("ready {}", view.number),
                Message::Pull { version, blocks } => format!("pull {} {blocks:?}", version.0),
                Message::Delivered { view, range, .. } => {
                    format!(
                        "delivered {}..{} in {}",
                        range.start, range.end, view.number
                    )
                }
                Message::Evaluated { chunk, .. } => format!("evaluated {chunk}"),
                Message::Partial {
                    range,
                    block,
                    gradient,
                    ..
                } => format!("{}..{} of {block} {gradient}", range.start, range.end),
                other => format!("{other:?}"),
            };
            format!("{to} {what}")
        }
        Effect::Prefetch { step, tasks } => format!("prefetch {} {tasks:?}", step.0),
        Effect::LoadParameters { version, block, .. } => format!("load {block} at {}", version.0),
        Effect::Compute { step, task } => format!("compute {task:?} of {}", step.0),
        Effect::Refused { from, epoch } => format!("refused {from} in {}", epoch.0),
        other => format!("{other:?}"),
    }
}

use Task::{Evaluate, Slot};

#[test]
fn a_lease_is_pulled_computed_in_order_pushed_and_delivered() {
    let mut bench = Bench::new(vec![placement(0, &[1], &[]), placement(1, &[0], &[])]);
    assert_eq!(
        bench.lease(0, &[Slot(3), Slot(2), Evaluate(1)]),
        [
            "prefetch 0 [Evaluate(1), Slot(2), Slot(3)]",
            "shard-0#1 pull 0 [0, 1]"
        ]
    );
    assert_eq!(bench.parameters(0, 1), ["load 1 at 0"]);
    assert_eq!(
        bench.parameters(7, 0),
        Vec::<String>::new(),
        "another version"
    );
    assert_eq!(
        bench.parameters(0, 0),
        ["load 0 at 0", "compute Evaluate(1) of 0"]
    );
    let evaluated = Event::Evaluated {
        step: Step(0),
        chunk: 1,
        sums: EvaluationSums {
            loss_sum: 1.0,
            tokens: 2,
            expert_choices: vec![3, 1],
        },
    };
    assert_eq!(
        bench.take(evaluated),
        ["coordinator-0#1 evaluated 1", "compute Slot(2) of 0"]
    );
    assert_eq!(bench.computed(0, 2), ["compute Slot(3) of 0"]);
    assert_eq!(
        bench.computed(0, 3),
        ["shard-0#1 2..4 of 0 (23)", "shard-1#1 2..4 of 1 (23)"]
    );
    assert_eq!(bench.ack(0, 0, 2, 4, 0), Vec::<String>::new());
    assert_eq!(bench.ack(0, 0, 2, 4, 0), Vec::<String>::new(), "twice");
    assert_eq!(
        bench.ack(1, 0, 2, 4, 1),
        ["coordinator-0#1 delivered 2..4 in 1"]
    );
    // Asked again, it answers again and computes nothing.
    assert_eq!(
        bench.lease(0, &[Slot(2), Slot(3), Evaluate(1)]),
        [
            "coordinator-0#1 evaluated 1",
            "coordinator-0#1 delivered 2..4 in 1"
        ]
    );
}

#[test]
fn a_lease_grows_and_each_part_is_pushed_when_it_is_complete() {
    let mut bench = Bench::new(vec![placement(0, &[], &[])]);
    bench.lease(0, &[Slot(0)]);
    assert_eq!(
        bench.parameters(0, 0),
        ["load 0 at 0", "compute Slot(0) of 0"]
    );
    assert_eq!(
        bench.lease(0, &[Slot(1), Slot(4), Slot(5)]),
        ["prefetch 0 [Slot(1), Slot(4), Slot(5)]"]
    );
    assert_eq!(
        bench.computed(0, 0),
        ["shard-0#1 0..1 of 0 0", "compute Slot(1) of 0"]
    );
    assert_eq!(
        bench.computed(0, 1),
        ["shard-0#1 1..2 of 0 1", "compute Slot(4) of 0"]
    );
    assert_eq!(bench.computed(0, 4), ["compute Slot(5) of 0"]);
    assert_eq!(bench.computed(0, 5), ["shard-0#1 4..6 of 0 (45)"]);
}

#[test]
fn versions_are_not_mixed_under_a_computation() {
    let mut bench = Bench::new(vec![placement(0, &[], &[])]);
    bench.lease(0, &[Slot(0), Slot(1)]);
    bench.parameters(0, 0);
    // The step moves on while slot 0 is computed: the rest of its lease is dropped.
    assert_eq!(
        bench.lease(1, &[Slot(0)]),
        ["prefetch 1 [Slot(0)]", "shard-0#1 pull 1 [0]"]
    );
    assert_eq!(bench.parameters(1, 0), Vec::<String>::new());
    assert_eq!(
        bench.computed(0, 0),
        ["load 0 at 1", "compute Slot(0) of 1"]
    );
    assert_eq!(bench.lease(0, &[Slot(1)]), Vec::<String>::new(), "late");
}

#[test]
fn a_decision_ends_the_step() {
    let mut bench = Bench::new(vec![placement(0, &[], &[])]);
    bench.lease(0, &[Slot(0), Slot(1)]);
    bench.parameters(0, 0);
    let decide = Message::Decide {
        view: view_id(1),
        lineage: LINE,
        step: Step(0),
        decision: decision(0.0),
        snapshot: false,
    };
    assert_eq!(bench.hear(coordinator(0), decide), Vec::<String>::new());
    assert_eq!(bench.computed(0, 0), Vec::<String>::new());
    assert_eq!(bench.lease(0, &[Slot(1)]), Vec::<String>::new(), "late");
    assert_eq!(bench.worker.step(), None);
}

#[test]
fn held_ranges_go_to_new_primaries_only() {
    let mut bench = Bench::new(vec![placement(0, &[2], &[]), placement(1, &[2], &[])]);
    bench.lease(0, &[Slot(0)]);
    bench.parameters(0, 0);
    bench.parameters(0, 1);
    bench.computed(0, 0);
    bench.ack(0, 0, 0, 1, 0);
    assert_eq!(
        bench.ack(1, 0, 0, 1, 1),
        ["coordinator-0#1 delivered 0..1 in 1"]
    );
    // Shard 0 is lost.
    assert_eq!(
        bench.view(view(
            2,
            vec![placement(2, &[], &[]), placement(1, &[2], &[])]
        )),
        ["coordinator-0#1 ready 2", "shard-2#1 0..1 of 0 0"]
    );
    assert_eq!(
        bench.ack(2, 0, 0, 1, 0),
        ["coordinator-0#1 delivered 0..1 in 2"]
    );
    // Back to one that has acknowledged.
    assert_eq!(
        bench.view(view(
            3,
            vec![placement(2, &[], &[]), placement(2, &[1], &[])]
        )),
        ["coordinator-0#1 ready 3", "shard-2#1 0..1 of 1 0"]
    );
    assert_eq!(
        bench.view(view(
            4,
            vec![placement(2, &[], &[]), placement(1, &[2], &[])]
        )),
        [
            "coordinator-0#1 ready 4",
            "coordinator-0#1 delivered 0..1 in 4"
        ]
    );
}

#[test]
fn pulls_spread_over_replicas_and_repeats_go_to_the_primary() {
    let mut bench = Bench::new(vec![
        placement(0, &[1], &[2]),
        placement(0, &[1], &[2]),
        placement(0, &[1], &[2]),
    ]);
    assert_eq!(
        bench.lease(0, &[Slot(0)]),
        [
            "prefetch 0 [Slot(0)]",
            "shard-0#1 pull 0 [0, 2]",
            "shard-1#1 pull 0 [1]"
        ]
    );
    bench.parameters(0, 0);
    assert_eq!(bench.tick(50), Vec::<String>::new());
    assert_eq!(bench.tick(100), ["shard-0#1 pull 0 [1, 2]"]);
    // A replica that is gone is not waited for.
    bench.parameters(0, 2);
    let said = bench.view(view(
        2,
        vec![
            placement(2, &[], &[]),
            placement(2, &[], &[]),
            placement(2, &[], &[]),
        ],
    ));
    assert_eq!(said, ["coordinator-0#1 ready 2", "shard-2#1 pull 0 [1]"]);
}

#[test]
fn partial_sums_are_repeated_until_acknowledged() {
    let mut bench = Bench::new(vec![placement(0, &[], &[])]);
    bench.lease(0, &[Slot(7)]);
    bench.parameters(0, 0);
    bench.computed(0, 7);
    assert_eq!(bench.tick(50), Vec::<String>::new());
    assert_eq!(bench.tick(100), ["shard-0#1 7..8 of 0 7"]);
    bench.ack(0, 0, 7, 8, 0);
    assert_eq!(bench.tick(1000), Vec::<String>::new());
}

#[test]
fn a_new_leader_hears_what_is_held_and_may_go_back_a_step() {
    let mut bench = Bench::new(vec![placement(0, &[], &[])]);
    bench.lease(5, &[Slot(0)]);
    bench.parameters(5, 0);
    bench.computed(5, 0);
    bench.ack(0, 5, 0, 1, 0);
    let announce = Message::Announce { epoch: Epoch(2) };
    assert_eq!(
        bench.hear(coordinator(1), announce),
        ["coordinator-1#1 hello"]
    );
    let held = Status::Worker {
        lineage: LINE,
        step: Step(5),
        held: vec![SlotRange::new(0, 1)],
    };
    assert_eq!(bench.worker.status(), held);
    let new = View {
        epoch: Epoch(2),
        leader: coordinator(1),
        ..view(1, vec![placement(0, &[], &[])])
    };
    assert_eq!(
        bench.view(new),
        [
            "coordinator-1#1 ready 1",
            "coordinator-1#1 delivered 0..1 in 1"
        ]
    );
    assert_eq!(bench.lease(6, &[Slot(1)]), ["refused coordinator-0#1 in 1"]);
    let lease = |step| Message::Lease {
        epoch: Epoch(2),
        lineage: LINE,
        step: Step(step),
        tasks: vec![Slot(1)],
    };
    assert_eq!(
        bench.hear(coordinator(1), lease(4)),
        ["prefetch 4 [Slot(1)]", "shard-0#1 pull 4 [0]"]
    );
    assert_eq!(bench.hear(coordinator(1), lease(3)), Vec::<String>::new());
}

#[test]
fn another_line_starts_afresh() {
    let mut bench = Bench::new(vec![placement(0, &[], &[])]);
    bench.lease(5, &[Slot(0)]);
    bench.parameters(5, 0);
    bench.computed(5, 0);
    let line = Lineage::new(Epoch(1), 1);
    let restored = View {
        lineage: line,
        restored_from: Step(2),
        ..view(2, vec![placement(0, &[], &[])])
    };
    assert_eq!(bench.view(restored), ["coordinator-0#1 ready 2"]);
    assert_eq!(bench.ack(0, 5, 0, 1, 0), Vec::<String>::new());
    assert_eq!(
        bench.lease(5, &[Slot(1)]),
        Vec::<String>::new(),
        "of the old line"
    );
    let lease = Message::Lease {
        epoch: Epoch(1),
        lineage: line,
        step: Step(2),
        tasks: vec![Slot(0)],
    };
    assert_eq!(
        bench.hear(coordinator(0), lease),
        ["prefetch 2 [Slot(0)]", "shard-0#1 pull 2 [0]"]
    );
    assert_eq!(
        bench.parameters(2, 0),
        ["load 0 at 2", "compute Slot(0) of 2"]
    );
}

#[test]
fn a_forgotten_worker_greets_again() {
    let mut bench = Bench::new(vec![placement(0, &[], &[])]);
    let announce = || Message::Announce { epoch: Epoch(1) };
    assert_eq!(bench.hear(coordinator(0), announce()), Vec::<String>::new());
    bench.now_ms = 400;
    assert_eq!(
        bench.hear(coordinator(0), announce()),
        ["coordinator-0#1 hello"]
    );
    let expelled = Message::Expelled { epoch: Epoch(1) };
    assert_eq!(bench.hear(coordinator(0), expelled), ["Restart"]);
    assert_eq!(bench.worker.next_deadline_ms(), None);
}

#[test]
fn malformed_input_changes_nothing() {
    let mut bench = Bench::new(vec![placement(0, &[], &[])]);
    bench.lease(0, &[Slot(0), Slot(V), Slot(u32::MAX)]);
    bench.parameters(0, 99);
    assert_eq!(
        bench.parameters(0, 0),
        ["load 0 at 0", "compute Slot(0) of 0"]
    );
    // A device that answers with too few blocks, and one that answers what was not asked.
    assert_eq!(bench.computed(0, 3), Vec::<String>::new());
    let short = Event::Computed {
        step: Step(0),
        slot: 0,
        gradients: Vec::new(),
    };
    assert_eq!(bench.take(short), Vec::<String>::new());
    assert_eq!(bench.ack(0, 0, 3, 1, 99), Vec::<String>::new());
}
