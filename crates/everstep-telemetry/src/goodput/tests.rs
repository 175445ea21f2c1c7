use std::time::{Duration, SystemTime};

use super::{Cause, Goodput, SlotCounts, account};
use crate::events::{Event, EventRecord};
use crate::jsonl::timestamp;
use crate::metrics::StepMetrics;

/// A run whose clock starts at the epoch.
#[derive(Default)]
struct Run {
    metrics: Vec<StepMetrics>,
    events: Vec<EventRecord>,
}

fn time(ms: u64) -> String {
    timestamp(SystemTime::UNIX_EPOCH + Duration::from_millis(ms))
}

impl Run {
    fn commits(mut self, times_ms: impl IntoIterator<Item = u64>) -> Self {
        for ms in times_ms {
            self.metrics.push(StepMetrics {
                step: self.metrics.len() as u64 + 1,
                loss: 1.0,
                grad_norm: 1.0,
                lr: 1e-3,
                tokens: 10,
                tokens_per_second: 1.0,
                step_seconds: 1.0,
                time: time(ms),
                validation_loss: None,
                expert_load: None,
            });
        }
        self
    }

    fn event(mut self, ms: u64, event: Event) -> Self {
        self.events.push(EventRecord {
            time: time(ms),
            event,
        });
        self
    }

    fn started(self, ms: u64) -> Self {
        let run = "r".to_owned();
        self.event(
            ms,
            Event::RunStarted {
                run,
                steps: 10,
                resumed_step: None,
            },
        )
    }

    fn finished(self, ms: u64) -> Self {
        self.event(
            ms,
            Event::RunFinished {
                step: 10,
                seconds: 1.0,
            },
        )
    }

    fn up(self, ms: u64, process: &str, role: &str) -> Self {
        let event = Event::ProcessStarted {
            process: process.to_owned(),
            node: "n".to_owned(),
            pid: 1,
            roles: vec![role.to_owned()],
            incarnation: 1,
        };
        self.event(ms, event)
    }

    fn lost(self, ms: u64, process: &str, role: &str) -> Self {
        let event = Event::ProcessLost {
            process: process.to_owned(),
            node: "n".to_owned(),
            roles: vec![role.to_owned()],
            step: None,
            epoch: None,
            reason: "killed".to_owned(),
        };
        self.event(ms, event)
    }

    fn leads(self, ms: u64, process: &str) -> Self {
        let (process, node) = (process.to_owned(), "n".to_owned());
        self.event(
            ms,
            Event::LeaderElected {
                process,
                node,
                epoch: 1,
                step: 0,
            },
        )
    }

    fn account(&self) -> Goodput {
        account(&self.metrics, &self.events, SlotCounts::default())
    }
}

fn lost(goodput: &Goodput, cause: Cause) -> (f64, u64) {
    let loss = goodput.lost.iter().find(|loss| loss.cause == cause);
    loss.map_or((0.0, 0), |loss| {
        ((loss.seconds * 1e3).round() / 1e3, loss.count)
    })
}

/// Every second of the wall time is accounted for exactly once.
fn demand_sum(goodput: &Goodput) {
    let lost: f64 = goodput.lost.iter().map(|loss| loss.seconds).sum();
    let all = goodput.useful_seconds + goodput.evaluation_seconds + lost;
    assert!((all - goodput.wall_seconds).abs() < 1e-6, "{goodput:?}");
}

#[test]
fn an_undisturbed_run_loses_its_start_and_its_end() {
    let goodput = Run::default()
        .started(0)
        .commits((1..=10).map(|step| 2000 + step * 1000))
        .finished(12_500)
        .account();
    assert_eq!(goodput.step_seconds, 1.0);
    assert_eq!(goodput.useful_seconds, 10.0);
    assert_eq!(lost(&goodput, Cause::StartUp), (2.0, 0));
    assert_eq!(lost(&goodput, Cause::End), (0.5, 0));
    assert_eq!(goodput.lost.len(), 2);
    assert_eq!(goodput.goodput, 10.0 / 12.5);
    demand_sum(&goodput);
}

#[test]
fn jitter_is_no_loss_and_evaluations_are_apart() {
    let goodput = Run::default()
        .started(0)
        .commits([1000, 1900, 3000, 4000, 4950, 6000, 7000, 10_000])
        .event(
            9_000,
            Event::Evaluation {
                step: 7,
                loss: 1.0,
                tokens: 1,
                seconds: 2.0,
                expert_loads: Vec::new(),
            },
        )
        .finished(10_000)
        .account();
    assert_eq!(goodput.step_seconds, 1.0);
    assert_eq!(goodput.evaluation_seconds, 2.0);
    assert_eq!(goodput.useful_seconds, 8.0);
    assert!(goodput.lost.is_empty(), "{goodput:?}");
    demand_sum(&goodput);
}

#[test]
fn a_stall_goes_to_the_gravest_cause_that_was_open() {
    let goodput = Run::default()
        .started(0)
        .up(0, "w", "worker")
        .up(0, "s", "shard")
        .leads(1, "c")
        // A worker dies in the third second and is back in the fifth.
        .commits([1000, 2000, 5000])
        .lost(2100, "w", "worker")
        .lost(2150, "w", "worker")
        .up(4500, "w", "worker")
        .commits([6000, 7000, 8000, 9000])
        // Shard and worker die together; the shard has its blocks again at 13 s.
        .lost(9100, "s", "shard")
        .lost(9100, "w", "worker")
        .up(9500, "w", "worker")
        .up(9500, "s", "shard")
        .commits([12_000, 14_000])
        .event(
            13_000,
            Event::BackupSeeded {
                process: "s".to_owned(),
                node: "n".to_owned(),
                blocks: vec![0],
                step: 9,
                epoch: 1,
            },
        )
        .commits([15_000, 16_000, 17_000])
        // The leader dies, a standby takes over.
        .lost(17_100, "c", "coordinator")
        .leads(18_000, "d")
        .commits([19_500, 20_500])
        .finished(20_500)
        .account();
    assert_eq!(goodput.step_seconds, 1.0);
    assert_eq!(lost(&goodput, Cause::WorkerLost), (2.0, 2));
    assert_eq!(lost(&goodput, Cause::ShardLost), (3.0, 1));
    assert_eq!(lost(&goodput, Cause::LeaderLost), (1.5, 1));
    assert_eq!(lost(&goodput, Cause::Unexplained), (0.0, 0));
    // One worker, away for 2.4 and 0.4 of the 19.5 seconds from the first to the last commit.
    let participation = goodput.participation.unwrap();
    assert!((participation - (1.0 - 2.8 / 19.5)).abs() < 1e-9);
    demand_sum(&goodput);
}

#[test]
fn a_rollback_is_graver_than_what_caused_it() {
    let goodput = Run::default()
        .started(0)
        .commits([1000, 2000, 3000])
        .lost(3100, "s", "shard")
        .event(
            4000,
            Event::Rollback {
                from_step: 3,
                to_step: 0,
                epoch: 1,
                reason: "lost".to_owned(),
            },
        )
        .up(3500, "s", "shard")
        .commits([9000])
        .finished(9000)
        .account();
    assert_eq!(lost(&goodput, Cause::Rollback), (5.0, 1));
    assert_eq!(lost(&goodput, Cause::ShardLost), (0.0, 1));
    demand_sum(&goodput);
}

#[test]
fn a_hang_counts_from_when_it_began_to_the_end_of_its_recovery() {
    let hung = |process: &str, seconds: f64| Event::ProcessHung {
        process: process.to_owned(),
        node: "n".to_owned(),
        reason: "it is stopped by a signal".to_owned(),
        seconds,
    };
    let woke = |process: &str| Event::ProcessWoke {
        process: process.to_owned(),
        node: "n".to_owned(),
        seconds: 2.0,
    };
    let goodput = Run::default()
        .started(0)
        .up(0, "w", "worker")
        .up(0, "c", "coordinator")
        .up(0, "d", "coordinator")
        .leads(1, "c")
        // The worker is stopped at 2.1 s, noticed at 3, ended, and back at 4.5.
        .commits([1000, 2000, 5000])
        .event(3000, hung("w", 0.9))
        .lost(3010, "w", "worker")
        .up(4500, "w", "worker")
        .commits([6000, 7000, 8000])
        // The leader is stopped and wakes up when another one leads.
        .event(9000, hung("c", 0.9))
        .leads(10_000, "d")
        .commits([10_500, 11_500])
        .event(11_600, woke("c"))
        // A standby may hang: nobody waits for it.
        .event(12_000, hung("c", 0.9))
        .commits([12_500, 13_500])
        .event(13_600, woke("c"))
        .finished(13_500)
        .account();
    assert_eq!(lost(&goodput, Cause::Hang), (3.5, 2));
    assert_eq!(lost(&goodput, Cause::WorkerLost), (0.0, 0));
    assert_eq!(lost(&goodput, Cause::LeaderLost), (0.0, 0));
    let participation = goodput.participation.unwrap();
    assert!((participation - (1.0 - 2.4 / 12.5)).abs() < 1e-9);
    demand_sum(&goodput);
}

#[test]
fn a_node_that_is_left_and_a_lie_have_causes_of_their_own() {
    let notice = Event::PreemptionNotice {
        source: "aws".to_owned(),
        node: "n".to_owned(),
        seconds_left: Some(120),
    };
    let stopped = |process: &str| Event::ProcessStopped {
        process: process.to_owned(),
        node: "n".to_owned(),
    };
    let mismatch = Event::AuditMismatch {
        step: 6,
        epoch: 1,
        slot: 3,
        digests: Vec::new(),
    };
    let goodput = Run::default()
        .started(0)
        .up(0, "w", "worker")
        .commits([1000, 2000])
        .event(2500, notice.clone())
        .event(2600, notice)
        .event(3000, stopped("w"))
        .event(3500, stopped("s"))
        .commits([4000, 5000, 6000, 7000])
        .event(7500, mismatch)
        .commits([9500, 10_500])
        .finished(10_500)
        .account();
    assert_eq!(goodput.step_seconds, 1.0);
    assert_eq!(lost(&goodput, Cause::Drain), (1.0, 1));
    assert_eq!(lost(&goodput, Cause::Audit), (1.5, 1));
    assert_eq!(lost(&goodput, Cause::WorkerLost), (0.0, 0));
    demand_sum(&goodput);
}

#[test]
fn the_time_between_two_sessions_does_not_count() {
    let goodput = Run::default()
        .started(0)
        .commits([1000, 2000])
        .started(100_000)
        .commits([102_000, 103_000])
        .finished(103_000)
        .account();
    assert_eq!(goodput.wall_seconds, 5.0);
    assert_eq!(goodput.useful_seconds, 4.0);
    assert_eq!(lost(&goodput, Cause::StartUp), (1.0, 0));
    demand_sum(&goodput);
}

#[test]
fn repeats_lower_the_efficiency_and_audits_do_not() {
    let run = Run::default().started(0).commits([1000, 2000, 3000, 4000]);
    let slots = SlotCounts {
        per_step: 8,
        computed: 45,
        audited: 5,
    };
    let goodput = account(&run.metrics, &run.events, slots);
    assert_eq!((goodput.slots_needed, goodput.slots_computed), (32, 40));
    assert_eq!(goodput.step_efficiency, Some(0.8));
    let table = goodput.table().join("\n");
    assert!(
        table.contains("step efficiency 80.0 %: 40 slots computed for 32 needed, 5 more as audits"),
        "{table}"
    );
}

#[test]
fn logs_of_nothing_give_nothing() {
    let goodput = Run::default().account();
    assert_eq!(goodput, Goodput::default());
    assert_eq!(goodput.table().len(), 1);
    // Times that are no times are left out rather than guessed.
    let mut run = Run::default().started(0).commits([1000]);
    run.metrics[0].time = "yesterday".to_owned();
    run.events[0].time = "now".to_owned();
    assert_eq!(run.account().wall_seconds, 0.0);
}
