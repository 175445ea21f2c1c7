use super::*;
use crate::ids::{Epoch, SlotRange};
use crate::message::{Decision, Placement, Repair, Status, View, ViewId};
use crate::testing::{
    LINE, Words, coordinator, decision, placement, shard as member, view, view_id, worker,
};

const V: u32 = 4;

/// A shard under test, with what it says as lines.
struct Bench {
    shard: Shard<Words>,
    now_ms: u64,
}

impl Bench {
    fn new(index: u32, num_blocks: u32) -> Self {
        let config = ShardConfig {
            me: member(index),
            num_slots: V,
            num_blocks,
            resend_ms: 100,
        };
        let mut bench = Self {
            shard: Shard::new(config, Words),
            now_ms: 0,
        };
        assert_eq!(bench.take(Event::Started).len(), 1);
        bench
    }

    /// A shard that has loaded its blocks of this view.
    fn ready(index: u32, placements: Vec<Placement>) -> Self {
        let num_blocks = placements.len() as u32;
        let mut bench = Self::new(index, num_blocks);
        bench.view(view(1, placements));
        for block in 0..num_blocks {
            bench.load(block);
        }
        bench
    }

    fn take(&mut self, event: Event<Words>) -> Vec<Effect<Words>> {
        self.shard.handle(self.now_ms, event)
    }

    fn hear(&mut self, from: Member, message: Message<Words>) -> Vec<String> {
        let effects = self.take(Event::Message { from, message });
        effects.iter().map(line).collect()
    }

    fn view(&mut self, view: View) -> Vec<String> {
        self.hear(coordinator(0), Message::View(view))
    }

    fn load(&mut self, block: BlockId) -> Vec<String> {
        let effects = self.take(Event::Loaded {
            lineage: LINE,
            version: Step(0),
            block,
            state: "w".to_owned(),
        });
        effects.iter().map(line).collect()
    }

    fn partial(&mut self, step: u64, start: u32, end: u32, gradient: &str) -> Vec<String> {
        self.hear(
            worker(0),
            Message::Partial {
                lineage: LINE,
                step: Step(step),
                range: SlotRange::new(start, end),
                block: 0,
                gradient: gradient.to_owned(),
                digests: Vec::new(),
            },
        )
    }

    fn ack(&mut self, from: Member, step: u64) -> Vec<String> {
        self.hear(
            from,
            Message::ReplicateAck {
                lineage: LINE,
                step: Step(step),
                block: 0,
                testimonies: Vec::new(),
            },
        )
    }

    fn replicate(&mut self, step: u64, gradient: &str) -> Vec<String> {
        self.hear(
            member(0),
            Message::Replicate {
                lineage: LINE,
                step: Step(step),
                block: 0,
                gradient: gradient.to_owned(),
                testimonies: Vec::new(),
            },
        )
    }

    fn decide(&mut self, step: u64, snapshot: bool) -> Vec<String> {
        self.hear(
            coordinator(0),
            Message::Decide {
                view: view_id(1),
                lineage: LINE,
                step: Step(step),
                decision: decision(0.0),
                snapshot,
            },
        )
    }

    fn tick(&mut self, now_ms: u64) -> Vec<String> {
        self.now_ms = now_ms;
        self.take(Event::Tick).iter().map(line).collect()
    }

    fn state(&self, block: BlockId) -> (u64, String) {
        let (version, state) = self.shard.state(block).unwrap();
        (version.0, state.clone())
    }
}

fn line(effect: &Effect<Words>) -> String {
    match effect {
        Effect::Send { to, message } => {
            let what = match message {
                Message::Hello { .. } => "hello".to_owned(),
                Message::ViewReady { view } => format!("ready {}", view.number),
                Message::Reduced { view, step, .. } => {
                    format!("reduced {} in {}", step.0, view.number)
                }
                Message::Applied { step, .. } => format!("applied {}", step.0),
                Message::Stored { version, .. } => format!("stored {}", version.0),
                Message::Parameters {
                    version,
                    parameters,
                    ..
                } => format!("parameters {} {parameters}", version.0),
                Message::PartialAck { step, range, .. } => {
                    format!("ack {} {}..{}", step.0, range.start, range.end)
                }
                Message::Replicate { step, gradient, .. } => {
                    format!("replicate {} {gradient}", step.0)
                }
                Message::ReplicateAck { step, .. } => format!("holds {}", step.0),
                Message::SeedRequest { block, .. } => format!("wants block {block}"),
                Message::Seed { version, .. } => format!("seed {}", version.0),
                Message::Seeded { version, .. } => format!("seeded {}", version.0),
                other => format!("{other:?}"),
            };
            format!("{to} {what}")
        }
        Effect::Load {
            version, blocks, ..
        } => format!("load {blocks:?} at {}", version.0),
        Effect::Store { version, blocks } => {
            let ids: Vec<BlockId> = blocks.iter().map(|(block, _)| *block).collect();
            format!("store {ids:?} at {}", version.0)
        }
        Effect::Refused { from, epoch } => format!("refused {from} in {}", epoch.0),
        other => format!("{other:?}"),
    }
}

#[test]
fn a_new_line_is_loaded_and_reported_when_complete() {
    let mut bench = Bench::new(0, 2);
    let placements = vec![placement(0, &[1], &[]), placement(1, &[0], &[])];
    assert_eq!(
        bench.view(view(1, placements.clone())),
        ["load [0, 1] at 0", "coordinator-0#1 hello"]
    );
    assert_eq!(bench.load(1), Vec::<String>::new());
    assert_eq!(bench.load(0), ["coordinator-0#1 ready 1"]);
    // A repeated view is confirmed again, an older one is not.
    assert_eq!(
        bench.view(view(1, placements.clone())),
        ["coordinator-0#1 ready 1"]
    );
    assert_eq!(
        bench.view(view(2, placements.clone())),
        ["coordinator-0#1 ready 2"]
    );
    assert_eq!(bench.view(view(1, placements)), Vec::<String>::new());
}

#[test]
fn a_step_goes_from_partial_sums_to_the_next_version() {
    let mut bench = Bench::ready(0, vec![placement(0, &[1], &[])]);
    let pull = Message::Pull {
        version: Step(1),
        blocks: vec![0],
    };
    assert_eq!(bench.hear(worker(3), pull), Vec::<String>::new());
    assert_eq!(bench.partial(0, 2, 4, "R"), ["worker-0#1 ack 0 2..4"]);
    assert_eq!(bench.partial(0, 1, 2, "b"), ["worker-0#1 ack 0 1..2"]);
    assert_eq!(
        bench.partial(0, 1, 3, "?"),
        Vec::<String>::new(),
        "no node of the tree"
    );
    assert_eq!(
        bench.partial(0, 0, 1, "a"),
        ["worker-0#1 ack 0 0..1", "shard-1#1 replicate 0 ((ab)R)"]
    );
    // An acknowledgement of an earlier step or of a stranger replicates nothing.
    assert_eq!(bench.ack(member(2), 0), Vec::<String>::new());
    assert_eq!(bench.ack(member(1), 0), ["coordinator-0#1 reduced 0 in 1"]);
    assert_eq!(
        bench.decide(0, false),
        [
            "worker-3#1 parameters 1 w 0@0:((ab)R)",
            "coordinator-0#1 applied 0"
        ]
    );
    assert_eq!(bench.state(0), (1, "w 0@0:((ab)R)".to_owned()));
    // What is late is acknowledged, so that its sender stops; a decision is applied once.
    assert_eq!(bench.partial(0, 0, 1, "a"), ["worker-0#1 ack 0 0..1"]);
    assert_eq!(bench.decide(0, false), ["coordinator-0#1 applied 0"]);
    assert_eq!(bench.state(0).0, 1);
}

#[test]
fn a_skipped_step_leaves_the_state() {
    let mut bench = Bench::ready(0, vec![placement(0, &[], &[])]);
    bench.partial(0, 0, 4, "g");
    let skip = Message::Decide {
        view: view_id(1),
        lineage: LINE,
        step: Step(0),
        decision: Decision {
            apply: false,
            ..decision(0.0)
        },
        snapshot: false,
    };
    bench.hear(coordinator(0), skip);
    assert_eq!(bench.state(0), (1, "w".to_owned()));
}

#[test]
fn partial_sums_one_step_ahead_wait_and_later_ones_are_not_taken() {
    let mut bench = Bench::ready(0, vec![placement(0, &[], &[])]);
    assert_eq!(bench.partial(1, 0, 4, "next"), Vec::<String>::new());
    assert_eq!(bench.partial(2, 0, 4, "far"), Vec::<String>::new());
    bench.partial(0, 0, 4, "g");
    assert_eq!(
        bench.decide(0, false),
        [
            "worker-0#1 ack 1 0..4",
            "coordinator-0#1 reduced 1 in 1",
            "coordinator-0#1 applied 0"
        ]
    );
}

#[test]
fn unanswered_messages_are_repeated_until_they_are_answered() {
    let mut bench = Bench::ready(0, vec![placement(0, &[1], &[])]);
    bench.partial(0, 0, 4, "g");
    assert_eq!(bench.tick(50), Vec::<String>::new());
    assert_eq!(bench.tick(100), ["shard-1#1 replicate 0 g"]);
    assert_eq!(bench.ack(member(1), 0), ["coordinator-0#1 reduced 0 in 1"]);
    assert_eq!(bench.tick(200), ["coordinator-0#1 reduced 0 in 1"]);
    bench.decide(0, false);
    assert_eq!(bench.tick(900), Vec::<String>::new());
}

#[test]
fn a_backup_holds_acknowledges_and_is_promoted_with_what_it_holds() {
    let mut bench = Bench::ready(1, vec![placement(0, &[1, 2], &[])]);
    assert_eq!(bench.replicate(0, "g"), ["shard-0#1 holds 0"]);
    assert_eq!(bench.replicate(0, "g"), ["shard-0#1 holds 0"], "said again");
    // Shard 0 is lost: what shard 1 holds goes to shard 2, and counts when that has it.
    assert_eq!(
        bench.view(view(2, vec![placement(1, &[2], &[])])),
        ["shard-2#1 replicate 0 g", "coordinator-0#1 ready 2"]
    );
    assert_eq!(bench.ack(member(2), 0), ["coordinator-0#1 reduced 0 in 2"]);
}

#[test]
fn acknowledgements_count_across_views_but_reports_do_not() {
    let mut bench = Bench::ready(0, vec![placement(0, &[1], &[])]);
    bench.partial(0, 0, 4, "g");
    bench.ack(member(1), 0);
    assert_eq!(
        bench.view(view(2, vec![placement(0, &[1], &[2])])),
        [
            "shard-2#1 replicate 0 g",
            "coordinator-0#1 reduced 0 in 2",
            "coordinator-0#1 ready 2"
        ]
    );
    // The joining replica is a backup now, and must hold the step.
    assert_eq!(
        bench.view(view(3, vec![placement(0, &[1, 2], &[])])),
        ["shard-2#1 replicate 0 g", "coordinator-0#1 ready 3"]
    );
    assert_eq!(bench.ack(member(2), 0), ["coordinator-0#1 reduced 0 in 3"]);
}

fn seed_at(version: u64) -> Message<Words> {
    Message::Seed {
        lineage: LINE,
        block: 0,
        version: Step(version),
        last: None,
        state: "s".to_owned(),
    }
}

#[test]
fn a_joining_replica_replays_the_log_after_its_seed() {
    let mut bench = Bench::new(2, 1);
    assert_eq!(
        bench.view(view(1, vec![placement(0, &[1], &[2])])),
        [
            "shard-0#1 wants block 0",
            "coordinator-0#1 ready 1",
            "coordinator-0#1 hello"
        ]
    );
    for step in 3..6 {
        assert_eq!(bench.replicate(step, "g"), Vec::<String>::new());
        assert_eq!(
            bench.decide(step, false),
            [format!("coordinator-0#1 applied {step}")]
        );
    }
    bench.replicate(6, "h");
    let seed = seed_at(4);
    assert_eq!(
        bench.hear(member(0), seed),
        ["shard-0#1 holds 6", "coordinator-0#1 seeded 6"]
    );
    assert_eq!(bench.state(0), (6, "s 0@4:g 0@5:g".to_owned()));
}

#[test]
fn a_seed_does_not_come_between_a_greeting_and_the_new_leaders_view() {
    let mut bench = Bench::ready(1, vec![placement(0, &[], &[1])]);
    bench.hear(member(0), seed_at(4));
    let announce = Message::Announce { epoch: Epoch(2) };
    assert_eq!(
        bench.hear(coordinator(1), announce),
        ["coordinator-1#1 hello"]
    );
    // The leader has been told of version 4, and makes this replica the primary of step 4.
    assert_eq!(bench.hear(member(0), seed_at(6)), Vec::<String>::new());
    assert_eq!(bench.state(0).0, 4);
    let of_new = |number, placements| View {
        epoch: Epoch(2),
        leader: coordinator(1),
        ..view(number, placements)
    };
    bench.hear(
        coordinator(1),
        Message::View(of_new(1, vec![placement(1, &[], &[0])])),
    );
    bench.hear(member(0), seed_at(6));
    assert_eq!(bench.state(0).0, 4);
    // As a joining replica of the new view it takes what that view's primary sends.
    bench.hear(
        coordinator(1),
        Message::View(of_new(2, vec![placement(0, &[], &[1])])),
    );
    bench.hear(member(0), seed_at(6));
    assert_eq!(bench.state(0).0, 6);
}

#[test]
fn a_gap_in_the_log_asks_for_the_block_again() {
    let mut bench = Bench::ready(1, vec![placement(0, &[], &[1])]);
    let seed = seed_at(1);
    bench.hear(member(0), seed.clone());
    bench.decide(1, false);
    let mut asked = Vec::new();
    for now_ms in (50..1000).step_by(50) {
        asked.extend(bench.tick(now_ms));
    }
    assert!(
        asked.contains(&"shard-0#1 wants block 0".to_owned()),
        "{asked:?}"
    );
    // A seed of somebody else, who may follow another leader, is not taken.
    bench.hear(member(3), seed_at(9));
    assert_eq!(bench.state(0).0, 1);
    // An older seed never takes state back.
    bench.replicate(1, "g");
    assert_eq!(bench.state(0).0, 2);
    bench.hear(member(0), seed);
    assert_eq!(bench.state(0).0, 2);
}

#[test]
fn the_log_of_an_empty_replica_is_bounded() {
    let mut bench = Bench::new(2, 1);
    bench.view(view(1, vec![placement(0, &[], &[2])]));
    for step in 0..1000 {
        bench.replicate(step, "g");
    }
    let held = bench.shard.blocks[&0].log.len();
    assert!(held <= 64, "{held}");
    assert!(bench.shard.blocks[&0].log.contains_key(&Step(999)));
}

#[test]
fn snapshots_are_taken_by_the_last_backup_and_repeated_on_demand() {
    let mut bench = Bench::ready(1, vec![placement(0, &[1], &[]), placement(1, &[0], &[])]);
    bench.replicate(0, "g");
    // Block 1 is still open, so the step is not applied everywhere.
    assert_eq!(bench.decide(0, true), ["store [0] at 1"]);
    let ask = |version, blocks| Message::Snapshot {
        epoch: Epoch(1),
        version: Step(version),
        blocks,
    };
    assert_eq!(
        bench.hear(coordinator(0), ask(1, vec![0])),
        Vec::<String>::new(),
        "on its way"
    );
    let stored = bench.take(Event::Stored {
        version: Step(1),
        blocks: vec![0],
        object: vec![7],
    });
    assert_eq!(line(&stored[0]), "coordinator-0#1 stored 1");
    assert_eq!(
        bench.hear(coordinator(0), ask(1, vec![0])),
        ["coordinator-0#1 stored 1"]
    );
    // Block 1 is still at version 0.
    assert_eq!(
        bench.hear(coordinator(0), ask(1, vec![1])),
        Vec::<String>::new()
    );
    assert_eq!(
        bench.hear(coordinator(0), ask(0, vec![1])),
        ["store [1] at 0"]
    );
}

#[test]
fn older_leaders_are_refused_and_told() {
    let mut bench = Bench::ready(0, vec![placement(0, &[], &[])]);
    bench.partial(0, 0, 4, "g");
    let announce = |epoch| Message::Announce {
        epoch: Epoch(epoch),
    };
    assert_eq!(
        bench.hear(coordinator(1), announce(2)),
        ["coordinator-1#1 hello"]
    );
    assert_eq!(bench.decide(0, false), ["refused coordinator-0#1 in 1"]);
    assert_eq!(bench.state(0).0, 0);
    assert_eq!(
        bench.hear(coordinator(0), announce(1)),
        ["refused coordinator-0#1 in 1", "coordinator-0#1 hello"]
    );
    let Status::Shard { blocks, .. } = bench.shard.status() else {
        panic!("a shard's status");
    };
    assert!(blocks[0].reduced.is_some());
    // A view of the new leader on the same line keeps what is here.
    let new = View {
        epoch: Epoch(2),
        leader: coordinator(1),
        ..view(1, vec![placement(0, &[], &[])])
    };
    let said = bench.hear(coordinator(1), Message::View(new));
    assert_eq!(
        said,
        ["coordinator-1#1 reduced 0 in 1", "coordinator-1#1 ready 1"]
    );
}

#[test]
fn a_decision_that_waits_is_not_taken_over_to_a_new_leader() {
    let mut bench = Bench::ready(0, vec![placement(0, &[], &[])]);
    bench.decide(0, false);
    let announce = Message::Announce { epoch: Epoch(2) };
    bench.hear(coordinator(1), announce);
    bench.partial(0, 0, 4, "g");
    assert_eq!(bench.state(0).0, 0);
}

#[test]
fn another_line_empties_the_shard_and_hides_old_messages() {
    let mut bench = Bench::ready(0, vec![placement(0, &[1], &[])]);
    bench.partial(0, 0, 4, "g");
    let restored = View {
        lineage: Lineage::new(Epoch(1), 1),
        restored_from: Step(5),
        ..view(2, vec![placement(0, &[1], &[])])
    };
    assert_eq!(bench.view(restored), ["load [0] at 5"]);
    assert!(bench.shard.versions().is_empty());
    // Late: of the old line.
    assert_eq!(bench.load(0), Vec::<String>::new());
    assert_eq!(bench.partial(5, 0, 4, "g"), Vec::<String>::new());
    assert_eq!(bench.ack(member(1), 5), Vec::<String>::new());
    assert_eq!(bench.decide(5, false), Vec::<String>::new());
}

#[test]
fn a_line_that_was_left_is_only_joined_by_a_new_life() {
    let mut bench = Bench::ready(0, vec![placement(0, &[1], &[])]);
    let later = |number, lineage| View {
        epoch: Epoch(2),
        lineage,
        ..view(number, vec![placement(0, &[1], &[])])
    };
    bench.view(later(1, Lineage::new(Epoch(1), 1)));
    assert_eq!(bench.view(later(2, LINE)), ["Restart"]);
}

#[test]
fn a_primary_that_missed_a_repair_does_not_wait_for_a_sum_that_it_gave_up() {
    let repaired = |times: u64, primary| View {
        lineage: Lineage(LINE.0 + times),
        repair: Some(Repair {
            from: Step(1),
            recompute: false,
        }),
        ..view(2, vec![placement(primary, &[1 - primary], &[])])
    };
    let behind = || {
        let mut bench = Bench::ready(0, vec![placement(0, &[1], &[])]);
        bench.partial(0, 0, 4, "g");
        bench
    };
    // Step 0 is decided. The next repair voids what comes after it.
    let said = behind().view(repaired(1, 0));
    assert!(said.contains(&"shard-1#1 replicate 0 g".into()), "{said:?}");
    // After two of them nobody knows.
    assert_eq!(behind().view(repaired(2, 0)), ["Restart"]);
    let said = behind().view(repaired(2, 1));
    assert!(!said.contains(&"Restart".into()), "{said:?}");
}

#[test]
fn an_unlisted_block_serves_a_new_leader_whose_view_is_late() {
    let mut bench = Bench::ready(1, vec![placement(1, &[0], &[])]);
    bench.partial(0, 0, 4, "g");
    bench.view(view(2, vec![placement(0, &[2], &[])]));
    let announce = Message::Announce { epoch: Epoch(2) };
    bench.hear(coordinator(1), announce);
    let decide = Message::Decide {
        view: ViewId {
            epoch: Epoch(2),
            number: 1,
        },
        lineage: LINE,
        step: Step(0),
        decision: decision(0.0),
        snapshot: false,
    };
    bench.hear(coordinator(1), decide);
    assert_eq!(bench.state(0).0, 1);
    let late = View {
        epoch: Epoch(2),
        leader: coordinator(1),
        ..view(1, vec![placement(1, &[], &[])])
    };
    assert_eq!(
        bench.hear(coordinator(1), Message::View(late)),
        ["coordinator-1#1 ready 1"]
    );
}

#[test]
fn a_step_is_only_reported_applied_when_it_is() {
    let mut bench = Bench::ready(1, vec![placement(0, &[1], &[])]);
    assert_eq!(bench.decide(0, false), Vec::<String>::new());
    bench.replicate(0, "g");
    assert_eq!(bench.decide(0, false), ["coordinator-0#1 applied 0"]);
}

#[test]
fn an_unlisted_block_keeps_what_it_acknowledged_until_the_step_is_decided() {
    let mut bench = Bench::ready(1, vec![placement(0, &[1], &[])]);
    assert_eq!(bench.partial(0, 0, 2, "L"), ["worker-0#1 ack 0 0..2"]);
    bench.view(view(2, vec![placement(0, &[2], &[])]));
    bench.view(view(3, vec![placement(1, &[2], &[])]));
    assert_eq!(
        bench.partial(0, 2, 4, "R"),
        ["worker-0#1 ack 0 2..4", "shard-2#1 replicate 0 (LR)"]
    );
    bench.view(view(4, vec![placement(0, &[2], &[])]));
    bench.decide(0, false);
    assert!(
        bench.shard.versions().is_empty(),
        "the step moved on without it"
    );
}

#[test]
fn expelled_and_finished_shards_end() {
    let expelled = Message::Expelled { epoch: Epoch(1) };
    let mut bench = Bench::ready(0, vec![placement(0, &[], &[])]);
    assert_eq!(bench.hear(coordinator(0), expelled), ["Restart"]);
    assert_eq!(bench.partial(0, 0, 4, "g"), Vec::<String>::new());
    assert_eq!(bench.shard.next_deadline_ms(), None);
    // The end is a fact, from whatever epoch.
    let mut bench = Bench::ready(0, vec![placement(0, &[], &[])]);
    let finish = Message::Finish { epoch: Epoch(0) };
    assert_eq!(bench.hear(coordinator(1), finish), ["Finished"]);
    assert_eq!(view_id(1).number, 1);
}

#[test]
fn malformed_input_changes_nothing() {
    let mut bench = Bench::ready(0, vec![placement(0, &[], &[])]);
    assert_eq!(
        bench.view(view(9, Vec::new())),
        Vec::<String>::new(),
        "no placement of block 0"
    );
    let unknown = Message::Partial {
        lineage: LINE,
        step: Step(0),
        range: SlotRange::new(9, 3),
        block: 77,
        gradient: String::new(),
        digests: Vec::new(),
    };
    assert_eq!(bench.hear(worker(0), unknown), Vec::<String>::new());
    // Only coordinators lead.
    let finish = Message::Finish { epoch: Epoch(9) };
    assert_eq!(bench.hear(worker(0), finish), Vec::<String>::new());
    assert_eq!(bench.shard.epoch(), Epoch(1));
}
