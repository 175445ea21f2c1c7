//! Audits under a leader: who is asked, who is guilty, and what is repaired.

use super::*;
use crate::message::{Digest, Task, Testimony};

const TRUTH: u64 = 1;

/// One slot, audited; workers 0 to `num_workers`, of which worker 0 is leased the slot.
fn audited(num_workers: u32) -> Bench {
    let config = CoordinatorConfig {
        num_slots: 1,
        num_blocks: 1,
        audit: AuditPlan {
            seed: 0,
            share: 1.0,
        },
        ..config()
    };
    Bench::training_of(num_workers, 2, config)
}

impl Bench {
    fn said(&mut self, from: Member, run: u32, digest: u64) -> Vec<String> {
        let step = self.coordinator.step();
        let message = Message::Audited {
            step,
            slot: 0,
            run,
            digest: Digest([digest, 0]),
        };
        self.hear(from, message)
    }

    /// The block's sum holds what `worker` computed.
    fn counted(&mut self, worker: Member, digest: u64) -> Vec<String> {
        let message = Message::Reduced {
            view: self.current(),
            step: self.coordinator.step(),
            block: 0,
            report: report(1.0),
            testimonies: vec![Testimony {
                slot: 0,
                worker,
                digest: Digest([digest, 0]),
            }],
        };
        let primary = self.coordinator.view().unwrap().placements[0].primary;
        self.hear(primary, message)
    }

    fn quarantined(&self) -> Vec<Member> {
        self.coordinator.view().unwrap().quarantined.clone()
    }

    /// How many audits are leased to a worker.
    fn audits(&self, worker: Member) -> usize {
        self.coordinator
            .outstanding(worker)
            .iter()
            .filter(|task| matches!(task, Task::Audit { .. }))
            .count()
    }
}

#[test]
fn a_step_waits_for_its_audit() {
    let mut bench = audited(3);
    assert_eq!((bench.audits(worker(0)), bench.audits(worker(1))), (0, 1));
    bench.counted(worker(0), TRUTH);
    assert_eq!(bench.coordinator.step(), Step(0), "nobody has confirmed it");
    bench.said(worker(1), 7, TRUTH);
    assert_eq!(bench.coordinator.step(), Step(0), "that was not asked for");
    bench.said(worker(1), 0, TRUTH);
    assert_eq!(bench.coordinator.step(), Step(1));
    assert_eq!(bench.quarantined(), []);
}

#[test]
fn a_third_worker_decides_and_the_step_is_repaired() {
    let mut bench = audited(3);
    let line = bench.coordinator.view().unwrap().lineage;
    bench.counted(worker(0), 2);
    bench.said(worker(1), 0, TRUTH);
    assert_eq!(bench.quarantined(), [], "one against one");
    assert_eq!(bench.audits(worker(2)), 1);
    bench.said(worker(2), 1, TRUTH);
    assert_eq!(bench.quarantined(), [worker(0)]);
    let view = bench.coordinator.view().unwrap();
    assert_eq!(view.lineage, line.repaired());
    let repair = view.repair.unwrap();
    assert_eq!((repair.from, repair.recompute), (Step(0), false));
    assert!(bench.coordinator.outstanding(worker(0)).is_empty());
    // The slot is somebody else's now, and a sum that still holds the lie is not taken.
    bench.counted(worker(0), 2);
    assert_eq!(bench.coordinator.step(), Step(0));
    bench.counted(worker(1), TRUTH);
    assert_eq!(bench.coordinator.step(), Step(1));
    // Neither this life nor the next one is leased anything again.
    bench.lose(worker(0));
    bench.hello(reborn(worker(0)), idle());
    assert!(bench.coordinator.outstanding(reborn(worker(0))).is_empty());
    assert!(bench.coordinator.outstanding(worker(0)).is_empty());
}

#[test]
fn an_auditor_that_lies_is_the_culprit_too() {
    let mut bench = audited(3);
    bench.counted(worker(0), TRUTH);
    bench.said(worker(1), 0, 2);
    bench.said(worker(2), 1, TRUTH);
    assert_eq!(bench.quarantined(), [worker(1)]);
}

#[test]
fn a_lost_auditor_is_replaced() {
    let mut bench = audited(3);
    bench.lose(worker(1));
    assert_eq!(bench.audits(worker(2)), 1);
    bench.counted(worker(0), TRUTH);
    bench.said(worker(2), 1, TRUTH);
    assert_eq!(bench.coordinator.step(), Step(1));
}

#[test]
fn a_culprit_that_died_is_quarantined_all_the_same() {
    let mut bench = audited(3);
    bench.counted(worker(0), 2);
    bench.said(worker(1), 0, TRUTH);
    bench.lose(worker(0));
    bench.said(worker(2), 1, TRUTH);
    assert_eq!(bench.quarantined(), [worker(0)]);
}

#[test]
fn of_two_workers_the_one_that_contradicts_itself_lied() {
    let mut bench = audited(2);
    bench.counted(worker(0), TRUTH);
    bench.said(worker(1), 0, 2);
    // The less busy one is asked again first, and stands by it; then the other one.
    bench.said(worker(1), 1, 2);
    assert_eq!(bench.audits(worker(0)), 1);
    bench.said(worker(0), 2, TRUTH);
    assert_eq!(bench.quarantined(), [], "both stand by it");
    assert_eq!(bench.audits(worker(1)), 1);
    bench.said(worker(1), 3, 3);
    assert_eq!(bench.quarantined(), [worker(1)]);
    // The other one goes on, and was compared with itself already.
    assert_eq!(bench.audits(worker(0)), 0);
    bench.counted(worker(0), TRUTH);
    assert_eq!(bench.coordinator.step(), Step(1));
}

#[test]
fn the_only_worker_is_asked_twice_and_never_quarantined() {
    let mut bench = audited(1);
    assert_eq!(bench.audits(worker(0)), 1);
    bench.counted(worker(0), TRUTH);
    bench.said(worker(0), 0, 2);
    assert_eq!(bench.quarantined(), []);
    assert!(bench.coordinator.view().unwrap().repair.unwrap().recompute);
    bench.counted(worker(0), TRUTH);
    bench.said(worker(0), 1, TRUTH);
    assert_eq!(bench.coordinator.step(), Step(1));
}

#[test]
fn a_new_leader_learns_who_is_quarantined() {
    let bench = audited(0);
    let mut next = Bench::new(bench.coordinator.config.clone());
    next.elect(2, 0, 0);
    for index in 0..2 {
        next.hello(worker(index), idle());
    }
    let line = bench.coordinator.view().unwrap().lineage;
    let knows = |quarantined: Vec<Member>| Status::Shard {
        lineage: line.repaired(),
        blocks: vec![BlockStatus {
            block: 0,
            version: Step(0),
            last: None,
            reduced: None,
        }],
        quarantined,
    };
    next.hello(shard(0), knows(Vec::new()));
    next.hello(shard(1), knows(vec![worker(0)]));
    assert_eq!(next.coordinator.phase(), Phase::Training);
    assert_eq!(next.quarantined(), [worker(0)]);
    let view = next.coordinator.view().unwrap();
    assert!(view.lineage > line.repaired(), "one more repair covers all");
    assert_eq!(view.lineage.root(), line.root());
    assert!(next.coordinator.outstanding(worker(0)).is_empty());
    assert_eq!(next.coordinator.outstanding(worker(1)).len(), 2);
}

#[test]
fn after_a_full_stop_the_recorded_quarantine_holds_in_any_life() {
    let mut bench = Bench::new(audited(0).coordinator.config);
    bench.take(Event::Elected {
        epoch: Epoch(2),
        checkpoint: Step(0),
        high_water: Step(0),
        quarantined: vec![worker(0)],
    });
    let restarted = Member {
        incarnation: worker(0).incarnation + 7,
        ..worker(0)
    };
    for member in [restarted, worker(1), worker(2)] {
        bench.hello(member, idle());
    }
    bench.hello(shard(0), empty());
    bench.hello(shard(1), empty());
    bench.ready(shard(0));
    bench.ready(shard(1));
    assert_eq!(bench.coordinator.phase(), Phase::Training);
    assert_eq!(bench.quarantined(), [worker(0)]);
    assert!(bench.coordinator.outstanding(restarted).is_empty());
    assert!(!bench.coordinator.outstanding(worker(1)).is_empty());
}

#[test]
fn a_quarantine_that_is_found_late_takes_the_open_step_back() {
    let mut bench = audited(3);
    let line = bench.coordinator.view().unwrap().lineage;
    bench.counted(worker(0), TRUTH);
    bench.take(Event::Quarantined {
        workers: vec![worker(0)],
    });
    assert_eq!(bench.quarantined(), [worker(0)]);
    assert!(bench.coordinator.view().unwrap().lineage > line);
    assert!(bench.coordinator.outstanding(worker(0)).is_empty());
    // Nothing new: nothing is taken back again.
    let line = bench.coordinator.view().unwrap().lineage;
    bench.take(Event::Quarantined {
        workers: vec![worker(0)],
    });
    assert_eq!(bench.coordinator.view().unwrap().lineage, line);
}

#[test]
fn a_replica_that_missed_a_repair_does_not_count_by_its_sum() {
    let mut bench = Bench::new(CoordinatorConfig {
        num_blocks: 1,
        ..audited(0).coordinator.config
    });
    let line = Lineage(LINE.0 + 3);
    let status = |lineage, blocks: &[(u64, bool)]| match holding(blocks) {
        Status::Shard { blocks, .. } => Status::Shard {
            lineage,
            blocks,
            quarantined: vec![worker(0)],
        },
        other => other,
    };
    bench.elect(3, 0, 1);
    // A worker has heard of one more repair than the shards; only one of them has applied step 0.
    let computing = Status::Worker {
        lineage: line.repaired(),
        step: Step(1),
        held: Vec::new(),
    };
    bench.hello(worker(1), computing);
    bench.hello(shard(0), status(line, &[(0, true)]));
    bench.hello(shard(1), status(line, &[(1, false)]));
    assert_eq!(bench.coordinator.step(), Step(1));
    assert_eq!(bench.placement(0), "1 [] [0]");
    let view = bench.coordinator.view().unwrap();
    assert_eq!(view.lineage, line.repaired().repaired());
}

#[test]
fn a_dispute_with_a_worker_that_leaves_is_settled_by_both() {
    let mut bench = audited(2);
    bench.counted(worker(0), 2);
    bench.said(worker(1), 0, TRUTH);
    bench.take(Event::Drain {
        members: vec![worker(0)],
        seconds_left: None,
    });
    // Both are asked again, the one that leaves too; a liar that does not repeat itself is found.
    for run in 1..4 {
        let digest = |audits| if audits { TRUTH } else { 2 + u64::from(run) };
        for index in 0..2 {
            if bench.audits(worker(index)) > 0 {
                bench.said(worker(index), run, digest(index == 1));
            }
        }
    }
    assert_eq!(bench.quarantined(), [worker(0)]);
}
