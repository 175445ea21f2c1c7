//! The story of each recovery: from the moment a loss was noticed to the first step committed after it.

use std::time::{Duration, Instant};

use everstep_telemetry::Event;

/// Losses that no commit has followed yet.
#[derive(Debug, Default)]
pub(super) struct Recoveries {
    open: Vec<Open>,
}

#[derive(Debug)]
struct Open {
    cause: &'static str,
    process: String,
    node: String,
    noticed_at: Instant,
    /// How long nothing had been heard of the process when it was given up.
    noticed_after: Option<Duration>,
    slots: u64,
    steps: u64,
}

impl Recoveries {
    /// Something of `process` is gone. What dies with one process is one loss, named after what was noticed first.
    pub(super) fn lost(
        &mut self,
        now: Instant,
        cause: &'static str,
        (process, node): (String, String),
        noticed_after: Option<Duration>,
    ) {
        if self.open.iter().any(|open| open.process == process) {
            return;
        }
        self.open.push(Open {
            cause,
            process,
            node,
            noticed_at: now,
            noticed_after,
            slots: 0,
            steps: 0,
        });
    }

    /// Slots of `process` are computed again.
    pub(super) fn slots_reassigned(&mut self, process: &str, count: u64) {
        if let Some(open) = self.open.iter_mut().find(|open| open.process == process) {
            open.slots += count;
        }
    }

    /// Steps are computed again, because of the last loss.
    pub(super) fn rolled_back(&mut self, now: Instant, leader: (String, String), steps: u64) {
        if self.open.is_empty() {
            self.lost(now, "rollback", leader, None);
        }
        if let Some(last) = self.open.last_mut() {
            last.steps += steps;
        }
    }

    /// A new step is committed: every loss before it is mended.
    pub(super) fn committed(&mut self, now: Instant, step: u64, epoch: u64) -> Vec<Event> {
        let mended = |open: Open| Event::Recovered {
            cause: open.cause.to_owned(),
            process: open.process,
            node: open.node,
            step,
            epoch,
            noticed_seconds: open.noticed_after.map(|after| after.as_secs_f64()),
            seconds: now.saturating_duration_since(open.noticed_at).as_secs_f64(),
            slots_recomputed: open.slots,
            steps_recomputed: open.steps,
        };
        self.open.drain(..).map(mended).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(process: &str) -> (String, String) {
        (process.to_owned(), "n".to_owned())
    }

    #[test]
    fn each_process_is_told_once_with_what_it_cost() {
        let start = Instant::now();
        let later = start + Duration::from_millis(1500);
        let mut recoveries = Recoveries::default();
        assert!(recoveries.committed(start, 1, 1).is_empty());
        recoveries.lost(start, "worker", on("a"), Some(Duration::from_millis(250)));
        recoveries.lost(later, "shard", on("a"), None);
        recoveries.slots_reassigned("a", 3);
        recoveries.slots_reassigned("slow", 2);
        recoveries.lost(later, "shard", on("b"), None);
        recoveries.rolled_back(later, on("leader"), 7);
        let events = recoveries.committed(later, 9, 2);
        let told = |event: &Event| match event {
            Event::Recovered {
                cause,
                process,
                noticed_seconds,
                seconds,
                slots_recomputed,
                steps_recomputed,
                ..
            } => (
                format!("{cause} {process}"),
                *noticed_seconds,
                *seconds,
                (*slots_recomputed, *steps_recomputed),
            ),
            other => panic!("{other:?}"),
        };
        let told: Vec<_> = events.iter().map(told).collect();
        assert_eq!(
            told,
            [
                ("worker a".to_owned(), Some(0.25), 1.5, (3, 0)),
                ("shard b".to_owned(), None, 0.0, (0, 7)),
            ]
        );
        assert!(recoveries.committed(later, 10, 2).is_empty());
    }
}
