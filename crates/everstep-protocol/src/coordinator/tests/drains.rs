//! Members that shall leave.

use super::*;

fn drain(bench: &mut Bench, members: &[Member], seconds_left: Option<u64>) -> Vec<String> {
    bench.take(Event::Drain {
        members: members.to_vec(),
        seconds_left,
    })
}

fn seeded(bench: &mut Bench, from: Member, step: u64) -> Vec<String> {
    let joining: Vec<BlockId> = (0..2)
        .filter(|block| {
            bench.coordinator.view().unwrap().placements[*block as usize]
                .joining
                .contains(&from)
        })
        .collect();
    let mut said = Vec::new();
    for block in joining {
        said = bench.hear(
            from,
            Message::Seeded {
                lineage: LINE,
                block,
                version: Step(step),
            },
        );
    }
    said
}

/// Decides a step: each primary reports its blocks.
fn decide(bench: &mut Bench, step: u64) -> Vec<String> {
    let mut said = Vec::new();
    for block in 0..2 {
        let primary = bench.coordinator.view().unwrap().placements[block].primary;
        let message = Message::Reduced {
            view: bench.current(),
            step: Step(step),
            block: block as BlockId,
            report: report(1.0),
            testimonies: Vec::new(),
        };
        said = bench.hear(primary, message);
    }
    said
}

fn three_shards() -> Bench {
    let config = CoordinatorConfig {
        num_shards: 3,
        num_steps: 8,
        checkpoint_every: 0,
        ..config()
    };
    Bench::training_of(2, 3, config)
}

#[test]
fn a_draining_worker_finishes_gets_nothing_new_and_goes() {
    let mut bench = three_shards();
    assert_eq!(
        drain(&mut bench, &[worker(0)], None),
        ["drains worker-0#1"],
        "it keeps its leases"
    );
    assert_eq!(drain(&mut bench, &[worker(0)], None), NOTHING, "twice");
    bench.delivered(worker(0), 0, 0, 2);
    let said = decide(&mut bench, 0);
    assert_eq!(
        said[said.len() - 3..],
        [
            "w-1 lease 1 [Slot(0), Slot(1), Slot(2), Slot(3)]",
            "drained worker-0#1 0",
            "release worker-0#1"
        ]
    );
    // Said again until it is gone; then it has left, and is not lost.
    let said = bench.tick(100);
    assert!(said.contains(&"release worker-0#1".into()), "{said:?}");
    assert_eq!(bench.lose(worker(0)), ["left worker-0#1"]);
    assert_eq!(bench.coordinator.slots_recomputed(), 0);
    // Its next life is welcome.
    bench.hello(reborn(worker(0)), idle());
    let said = decide(&mut bench, 1);
    assert!(
        said.contains(&"w-0 lease 2 [Slot(0), Slot(1)]".into()),
        "{said:?}"
    );
}

#[test]
fn leases_that_cannot_be_finished_in_time_are_handed_over() {
    let mut bench = three_shards();
    bench.now_ms = 4000;
    bench.delivered(worker(0), 0, 0, 2);
    decide(&mut bench, 0);
    // 2000 ms per slot, two slots, three seconds.
    let said = drain(&mut bench, &[worker(0)], Some(3));
    assert_eq!(
        said,
        [
            "drains worker-0#1",
            "again [0, 1] true",
            "w-1 lease 1 [Slot(0), Slot(1)]",
            "drained worker-0#1 0",
            "release worker-0#1"
        ]
    );
}

#[test]
fn a_draining_shards_blocks_are_seeded_elsewhere_then_it_goes() {
    let mut bench = three_shards();
    // Blocks are on shards 0 and 1, or 1 and 2.
    let before = (bench.placement(0), bench.placement(1));
    assert_eq!(before, ("0 [2] []".into(), "1 [0] []".into()));
    let said = drain(&mut bench, &[shard(0)], None);
    assert_eq!(
        said,
        ["drains shard-0#1", "s-0 view 2", "s-1 view 2", "s-2 view 2"]
    );
    assert_eq!(
        (bench.placement(0), bench.placement(1)),
        ("0 [2] [1]".into(), "1 [0] [2]".into())
    );
    seeded(&mut bench, shard(1), 0);
    seeded(&mut bench, shard(2), 0);
    // Its backups go at once; as primary it stays to the end of the step, so that nothing is said twice.
    assert_eq!(
        (bench.placement(0), bench.placement(1)),
        ("0 [2, 1] []".into(), "1 [2] []".into())
    );
    let said = decide(&mut bench, 0);
    assert!(said.contains(&"drained shard-0#1 2".into()), "{said:?}");
    assert!(said.iter().all(|line| !line.contains("again")), "{said:?}");
    let placements = &bench.coordinator.view().unwrap().placements;
    assert!(
        placements
            .iter()
            .all(|placement| placement.role_of(shard(0)).is_none())
    );
    assert_eq!(bench.lose(shard(0)), ["left shard-0#1"]);
    // The next life takes its share again.
    bench.hello(reborn(shard(0)), empty());
    let placements = &bench.coordinator.view().unwrap().placements;
    assert!(
        placements
            .iter()
            .any(|placement| placement.joining.contains(&reborn(shard(0))))
    );
}

#[test]
fn a_shard_that_stores_a_part_of_a_checkpoint_stays_for_it() {
    let mut bench = Bench::training(CoordinatorConfig {
        checkpoint_every: 1,
        num_steps: 8,
        ..config()
    });
    decide(&mut bench, 0);
    drain(&mut bench, &[shard(0)], None);
    decide(&mut bench, 1);
    let said = bench.tick(100);
    assert!(
        said.iter().all(|line| !line.contains("release")),
        "{said:?}"
    );
    for version in 1..=2 {
        for (from, block) in [(shard(0), 1), (shard(1), 0)] {
            bench.hear(
                from,
                Message::Stored {
                    version: Step(version),
                    blocks: vec![block],
                    object: Vec::new(),
                },
            );
        }
        bench.take(Event::ManifestCommitted {
            version: Step(version),
        });
    }
    let said = bench.tick(200);
    assert!(said.contains(&"release shard-0#1".into()), "{said:?}");
}

#[test]
fn what_nobody_can_take_is_committed_and_the_run_waits_there() {
    let mut bench = Bench::training(CoordinatorConfig {
        checkpoint_every: 0,
        num_steps: 8,
        ..config()
    });
    decide(&mut bench, 0);
    let said = drain(&mut bench, &[shard(0), shard(1)], Some(60));
    assert_eq!(said, ["drains shard-0#1", "drains shard-1#1", "holds 2"]);
    let said = decide(&mut bench, 1);
    assert!(said.contains(&"s-0 decide 1 snapshot".into()), "{said:?}");
    assert!(said.iter().all(|line| !line.contains("lease")), "{said:?}");
    for (from, block) in [(shard(0), 1), (shard(1), 0)] {
        bench.hear(
            from,
            Message::Stored {
                version: Step(2),
                blocks: vec![block],
                object: Vec::new(),
            },
        );
    }
    let said = bench.take(Event::ManifestCommitted { version: Step(2) });
    assert!(said.contains(&"release shard-0#1".into()), "{said:?}");
    assert!(said.contains(&"release shard-1#1".into()), "{said:?}");
    bench.lose(shard(0));
    bench.lose(shard(1));
    // Others come: from where it stopped, without a rollback.
    bench.hello(reborn(shard(0)), empty());
    let said = bench.hello(reborn(shard(1)), empty());
    assert_eq!(said, ["s-0 view 3", "s-1 view 3"]);
    bench.ready(reborn(shard(0)));
    let said = bench.ready(reborn(shard(1)));
    assert!(said.contains(&"resumed 2".into()), "{said:?}");
    assert!(said.iter().any(|line| line.contains("lease 2")), "{said:?}");
}

#[test]
fn a_version_that_is_held_is_committed_without_its_evaluation() {
    let mut bench = Bench::training(CoordinatorConfig {
        checkpoint_every: 0,
        evaluate_every: 2,
        num_steps: 8,
        ..config()
    });
    for chunk in [0, 1] {
        let evaluated = Message::Evaluated {
            step: Step(0),
            chunk,
            sums: EvaluationSums {
                loss_sum: 6.0,
                tokens: 2,
                ..EvaluationSums::default()
            },
        };
        bench.hear(worker(0), evaluated);
    }
    decide(&mut bench, 0);
    drain(&mut bench, &[shard(0), shard(1)], Some(60));
    decide(&mut bench, 1);
    let stored = Message::Stored {
        version: Step(2),
        blocks: vec![0, 1],
        object: vec![3],
    };
    assert_eq!(bench.hear(shard(0), stored), ["commit 2 [[3]]"]);
}

#[test]
fn a_shard_that_comes_in_time_lifts_the_hold() {
    let mut bench = Bench::training(CoordinatorConfig {
        checkpoint_every: 0,
        num_steps: 8,
        replication: 1,
        num_shards: 2,
        ..config()
    });
    decide(&mut bench, 0);
    drain(&mut bench, &[shard(0), shard(1)], None);
    decide(&mut bench, 1);
    bench.hello(shard(2), empty());
    let said = bench.tick(100);
    assert!(said.iter().any(|line| line.contains("lease 2")), "{said:?}");
    assert_eq!(bench.placement(0), "0 [] [2]");
    seeded(&mut bench, shard(2), 2);
    decide(&mut bench, 2);
    // The checkpoint that was begun is completed first.
    for index in 0..2 {
        bench.hear(
            shard(index),
            Message::Stored {
                version: Step(2),
                blocks: vec![index],
                object: Vec::new(),
            },
        );
    }
    let said = bench.take(Event::ManifestCommitted { version: Step(2) });
    assert!(said.contains(&"release shard-0#1".into()), "{said:?}");
    assert!(said.contains(&"release shard-1#1".into()), "{said:?}");
}

#[test]
fn a_new_leader_gives_nothing_to_who_is_draining() {
    let mut bench = three_shards();
    bench.elect(2, 0, 0);
    drain(&mut bench, &[shard(0), worker(0)], None);
    let held = || holding(&[(1, false), (1, false)]);
    bench.hello(worker(0), idle());
    bench.hello(worker(1), idle());
    for index in 0..2 {
        bench.hello(shard(index), held());
    }
    let said = bench.hello(shard(2), empty());
    assert!(
        said.contains(&"w-1 lease 1 [Slot(0), Slot(1), Slot(2), Slot(3)]".into()),
        "{said:?}"
    );
    assert_eq!(
        (bench.placement(0), bench.placement(1)),
        ("1 [0] [2]".into(), "1 [0] [2]".into())
    );
}
