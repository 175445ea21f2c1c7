//! Checkpoints and evaluations.

use super::*;

#[test]
fn checkpoints_are_committed_when_every_block_is_stored() {
    let mut bench = Bench::training(config());
    for step in 0..2 {
        bench.reduced(step, 0);
        let said = bench.reduced(step, 1);
        let snapshot = if step == 1 { " snapshot" } else { "" };
        assert_eq!(said[1], format!("s-0 decide {step}{snapshot}"));
    }
    let stored = |block: u32| Message::Stored {
        version: Step(2),
        blocks: vec![block],
        object: vec![block as u8],
    };
    assert_eq!(bench.hear(shard(0), stored(1)), NOTHING);
    assert_eq!(bench.hear(shard(0), stored(1)), NOTHING, "twice");
    // What does not come is asked for, at whoever should store it.
    let said = bench.tick(400);
    assert!(said.contains(&"s-1 snapshot 2 [0]".into()), "{said:?}");
    assert_eq!(bench.hear(shard(1), stored(0)), ["commit 2 [[1], [0]]"]);
    let committed = Event::ManifestCommitted { version: Step(2) };
    assert_eq!(
        bench.take(committed),
        ["CheckpointCommitted { version: Step(2) }"]
    );
    assert_eq!(bench.coordinator.committed(), Step(2));
}

#[test]
fn a_lost_storer_is_replaced_while_the_version_is_current_and_not_later() {
    let mut bench = Bench::training(config());
    for step in 0..2 {
        bench.reduced(step, 0);
        bench.reduced(step, 1);
    }
    let said = bench.lose(shard(1));
    assert_eq!(said.last().unwrap(), "s-0 snapshot 2 [0, 1]");
    let mut bench = Bench::training(CoordinatorConfig {
        num_steps: 9,
        ..config()
    });
    for step in 0..3 {
        bench.reduced(step, 0);
        bench.reduced(step, 1);
    }
    let said = bench.lose(shard(1));
    assert_eq!(
        said.last().unwrap(),
        "CheckpointAbandoned { version: Step(2) }"
    );
}

#[test]
fn evaluations_hold_the_decision_and_the_last_one_the_last_manifest() {
    let mut bench = Bench::training(CoordinatorConfig {
        evaluate_every: 2,
        num_steps: 1,
        ..config()
    });
    let evaluated = |step, chunk: u32| Message::Evaluated {
        step: Step(step),
        chunk,
        sums: EvaluationSums {
            loss_sum: 6.0,
            tokens: 2 + u64::from(chunk),
            ..EvaluationSums::default()
        },
    };
    bench.reduced(0, 0);
    assert_eq!(bench.reduced(0, 1), NOTHING);
    assert_eq!(bench.hear(worker(0), evaluated(0, 1)), NOTHING);
    let said = bench.hear(worker(1), evaluated(0, 0));
    assert_eq!(said[..2], ["evaluation 0 2.4 5", "log 0 102"]);
    assert_eq!(
        said[6..],
        ["w-0 lease 1 [Evaluate(0)]", "w-1 lease 1 [Evaluate(1)]"]
    );
    let stored = Message::Stored {
        version: Step(1),
        blocks: vec![0, 1],
        object: vec![5],
    };
    assert_eq!(bench.hear(shard(0), stored), NOTHING);
    bench.hear(worker(1), evaluated(1, 0));
    assert_eq!(
        bench.hear(worker(1), evaluated(1, 1)),
        ["evaluation 1 2.4 5", "commit 1 [[5]]"]
    );
    let committed = Event::ManifestCommitted { version: Step(1) };
    assert_eq!(
        bench.take(committed),
        [
            "CheckpointCommitted { version: Step(1) }",
            "broadcast finish",
            "Finished"
        ]
    );
    assert_eq!(bench.hello(reborn(shard(0)), empty()), ["s-0 finish"]);
    // A leader that finds the last checkpoint has nothing to do.
    let mut bench = Bench::new(config());
    assert_eq!(bench.elect(2, 3, 3), ["broadcast finish", "Finished"]);
    // A standby that hears of the end is done too.
    let mut bench = Bench::new(config());
    let finish = Message::Finish { epoch: Epoch(1) };
    assert_eq!(bench.hear(me(1), finish), ["broadcast finish", "Finished"]);
}

#[test]
fn what_the_clock_asks_for_is_taken_with_the_next_version() {
    let mut bench = Bench::training(CoordinatorConfig {
        checkpoint_every: 0,
        num_steps: 9,
        ..config()
    });
    let step = |bench: &mut Bench, step| {
        bench.reduced(step, 0);
        bench.reduced(step, 1)[1].clone()
    };
    assert_eq!(step(&mut bench, 0), "s-0 decide 0");
    assert!(!bench.coordinator.is_checkpointing());
    assert_eq!(bench.take(Event::CheckpointDue), NOTHING);
    assert!(bench.coordinator.is_checkpointing());
    assert_eq!(step(&mut bench, 1), "s-0 decide 1 snapshot");
    assert_eq!(step(&mut bench, 2), "s-0 decide 2", "asked once");
    let stored = Message::Stored {
        version: Step(2),
        blocks: vec![0, 1],
        object: vec![7],
    };
    assert!(bench.coordinator.is_checkpointing());
    assert_eq!(bench.hear(shard(0), stored), ["commit 2 [[7]]"]);
    bench.take(Event::ManifestCommitted { version: Step(2) });
    assert!(!bench.coordinator.is_checkpointing());
    // The clock of one who leads no more, or not yet, counts for nothing.
    let mut standby = Bench::new(config());
    standby.take(Event::CheckpointDue);
    assert!(!standby.coordinator.is_checkpointing());
}

#[test]
fn a_refused_manifest_is_no_checkpoint_and_the_last_one_is_taken_again() {
    let mut bench = Bench::training(CoordinatorConfig {
        num_steps: 3,
        ..config()
    });
    let stored = |version| Message::Stored {
        version: Step(version),
        blocks: vec![0, 1],
        object: vec![version as u8],
    };
    for step in 0..2 {
        bench.reduced(step, 0);
        bench.reduced(step, 1);
    }
    assert_eq!(bench.hear(shard(0), stored(2)), ["commit 2 [[2]]"]);
    let refused = |version| Event::ManifestRefused {
        version: Step(version),
    };
    assert_eq!(
        bench.take(refused(2)),
        ["CheckpointAbandoned { version: Step(2) }"]
    );
    assert_eq!(bench.take(refused(2)), NOTHING, "twice");
    assert_eq!(bench.coordinator.committed(), Step(0));
    bench.reduced(2, 0);
    bench.reduced(2, 1);
    assert_eq!(bench.hear(shard(0), stored(3)), ["commit 3 [[3]]"]);
    bench.take(refused(3));
    let said = bench.tick(100);
    assert!(
        said.iter().any(|line| line.contains("snapshot 3")),
        "{said:?}"
    );
    assert_eq!(bench.hear(shard(0), stored(3)), ["commit 3 [[3]]"]);
    let said = bench.take(Event::ManifestCommitted { version: Step(3) });
    assert_eq!(said.last().unwrap(), "Finished");
}

#[test]
fn while_the_store_is_away_the_newest_snapshot_replaces_the_one_between() {
    let mut bench = Bench::training(CoordinatorConfig {
        num_steps: 9,
        ..config()
    });
    let mut said = Vec::new();
    for step in 0..8 {
        bench.reduced(step, 0);
        said.extend(bench.reduced(step, 1));
    }
    let superseded: Vec<&String> = said
        .iter()
        .filter(|line| line.starts_with("CheckpointSuperseded"))
        .collect();
    assert_eq!(
        superseded,
        [
            "CheckpointSuperseded { version: Step(4), by: Step(6) }",
            "CheckpointSuperseded { version: Step(6), by: Step(8) }"
        ]
    );
    let stored = |version| Message::Stored {
        version: Step(version),
        blocks: vec![0, 1],
        object: vec![version as u8],
    };
    assert_eq!(bench.hear(shard(0), stored(4)), NOTHING, "given up");
    assert_eq!(bench.hear(shard(0), stored(8)), ["commit 8 [[8]]"]);
    // The newest one makes the oldest pointless.
    let committed = Event::ManifestCommitted { version: Step(8) };
    assert_eq!(
        bench.take(committed),
        [
            "CheckpointCommitted { version: Step(8) }",
            "CheckpointSuperseded { version: Step(2), by: Step(8) }"
        ]
    );
}

#[test]
fn a_rollback_waits_for_the_store_and_takes_what_is_intact_there() {
    let mut bench = Bench::new(config());
    bench.has_store = false;
    bench.elect(2, 2, 2);
    bench.hello(shard(0), empty());
    assert_eq!(bench.hello(shard(1), empty()), NOTHING);
    assert_eq!(bench.coordinator.phase(), Phase::Gathering);
    for now_ms in [2_000, 9_000, 60_000] {
        assert_eq!(bench.tick(now_ms), NOTHING, "asked once");
    }
    // The newest checkpoint turned out damaged.
    let found = Event::CheckpointFound { version: Step(0) };
    let said = bench.take(found);
    assert_eq!(said[0], "rollback 0 from 2");
    assert_eq!(bench.coordinator.phase(), Phase::Restoring);
    assert_eq!(bench.coordinator.step(), Step(0));
    // A search that was made void by what came meanwhile changes nothing.
    let late = Event::CheckpointFound { version: Step(2) };
    assert_eq!(bench.take(late), NOTHING);
    assert_eq!(bench.coordinator.step(), Step(0));
}

#[test]
fn a_checkpoint_that_is_damaged_while_it_is_restored_is_given_up() {
    let mut bench = Bench::new(config());
    bench.has_store = false;
    bench.elect(2, 2, 2);
    bench.hello(shard(0), empty());
    bench.hello(shard(1), empty());
    bench.tick(60_000);
    bench.take(Event::CheckpointFound { version: Step(2) });
    assert_eq!(bench.coordinator.phase(), Phase::Restoring);
    let seeks = |bench: &mut Bench, now_ms| {
        bench.now_ms = now_ms;
        let effects = bench.coordinator.handle(now_ms, Event::Tick);
        effects
            .iter()
            .any(|effect| matches!(effect, Effect::FindCheckpoint))
    };
    let wait_ms = 4 * config().gather_ms;
    assert!(!seeks(&mut bench, 60_000 + wait_ms / 2));
    assert!(seeks(&mut bench, 60_000 + wait_ms));
    // Intact: shards are only slow.
    let line = bench.coordinator.view().map(|view| view.lineage);
    bench.take(Event::CheckpointFound { version: Step(2) });
    assert_eq!(bench.coordinator.view().map(|view| view.lineage), line);
    assert!(seeks(&mut bench, 60_000 + 4 * wait_ms));
    let said = bench.take(Event::CheckpointFound { version: Step(0) });
    assert_eq!(said[0], "rollback 0 from 2");
    assert_eq!(bench.coordinator.step(), Step(0));
}
