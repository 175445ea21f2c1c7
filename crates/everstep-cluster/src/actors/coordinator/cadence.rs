//! When the next checkpoint is due, if not by steps: after a time, or as often as is best for what checkpoints cost and how often
//! something fails.
//!
//! With `auto` the interval is `sqrt(2 C M)`, the first-order optimum of Young (1974), which Daly (2006) derives as well for `C << M`.
//! `C` is what a checkpoint costs training: how much longer its steps took while it was on its way. `M` is the mean time between
//! failures: how long this coordinator has watched by how many processes it saw go. Replicas make nearly all of those harmless, so this
//! is on the safe side. No interval makes the store work more than half of the time.

use everstep_train::CheckpointEvery;

use crate::status::CadenceStatus;

/// What is assumed before anything was seen: one failure in this time.
const PRIOR_S: f64 = 3600.0;
/// A smaller cost cannot be told from the noise of step times.
const COST_MIN_S: f64 = 0.01;
const INTERVAL_MIN_S: f64 = 1.0;
const INTERVAL_MAX_S: f64 = 3600.0;
/// Share of the newest value in a running mean.
const NEWEST: f64 = 0.2;

/// The clock of checkpoints. Times are milliseconds of one clock.
#[derive(Debug)]
pub(super) struct Cadence {
    every: CheckpointEvery,
    started_ms: u64,
    num_failures: u32,
    /// When the last checkpoint was asked for; `None` for a leader that does not know.
    asked_ms: Option<u64>,
    /// Mean step time without a checkpoint on its way.
    quiet_step_s: Option<f64>,
    /// What the checkpoint that is on its way has cost so far, and since when it is.
    flight: Option<Flight>,
    cost_s: Option<f64>,
    upload_s: Option<f64>,
}

#[derive(Clone, Copy, Debug)]
struct Flight {
    since_ms: u64,
    cost_s: f64,
}

/// A running mean that forgets.
fn blend(mean: &mut Option<f64>, value: f64) {
    *mean = Some(mean.map_or(value, |mean| mean + NEWEST * (value - mean)));
}

impl Cadence {
    pub(super) fn new(every: CheckpointEvery, now_ms: u64) -> Self {
        Self {
            every,
            started_ms: now_ms,
            num_failures: 0,
            asked_ms: None,
            quiet_step_s: None,
            flight: None,
            cost_s: None,
            upload_s: None,
        }
    }

    /// This coordinator leads now, from `step` on. A leader of a run that has steps does not know when its last checkpoint was taken, so
    /// it takes one soon.
    pub(super) fn elected(&mut self, now_ms: u64, step: u64) {
        self.asked_ms = (step == 0).then_some(now_ms);
        self.flight = None;
    }

    /// A process is gone.
    pub(super) fn failed(&mut self) {
        self.num_failures += 1;
    }

    /// A step took so long.
    pub(super) fn stepped(&mut self, seconds: f64) {
        match (&mut self.flight, self.quiet_step_s) {
            (None, _) => blend(&mut self.quiet_step_s, seconds),
            (Some(flight), Some(quiet_s)) => flight.cost_s += seconds - quiet_s,
            (Some(_), None) => {}
        }
    }

    /// Whether a checkpoint shall be asked for now; `is_checkpointing` says whether one is on its way.
    pub(super) fn is_due(&mut self, now_ms: u64, is_checkpointing: bool) -> bool {
        match (self.flight, is_checkpointing) {
            (None, true) => {
                self.flight = Some(Flight {
                    since_ms: now_ms,
                    cost_s: 0.0,
                });
            }
            (Some(flight), false) => {
                blend(&mut self.cost_s, flight.cost_s.max(COST_MIN_S));
                let took_s = now_ms.saturating_sub(flight.since_ms) as f64 / 1e3;
                blend(&mut self.upload_s, took_s);
                self.flight = None;
            }
            _ => {}
        }
        let Some(interval_s) = self.interval_s(now_ms) else {
            return false;
        };
        let waited = |asked_ms| now_ms.saturating_sub(asked_ms) as f64 >= interval_s * 1e3;
        let is_due = !is_checkpointing && self.asked_ms.is_none_or(waited);
        if is_due {
            self.asked_ms = Some(now_ms);
        }
        is_due
    }

    /// Mean time between failures.
    fn mtbf_s(&self, now_ms: u64) -> f64 {
        let watched_s = now_ms.saturating_sub(self.started_ms) as f64 / 1e3;
        (watched_s + PRIOR_S) / f64::from(self.num_failures + 1)
    }

    /// Seconds from one checkpoint to the next; `None` if they are due by steps.
    fn interval_s(&self, now_ms: u64) -> Option<f64> {
        match self.every {
            CheckpointEvery::Steps(_) => None,
            CheckpointEvery::Time(interval) => Some(interval.as_secs_f64()),
            CheckpointEvery::Auto => {
                let cost_s = self.cost_s.unwrap_or(COST_MIN_S);
                let best_s = (2.0 * cost_s * self.mtbf_s(now_ms)).sqrt();
                let store_s = 2.0 * self.upload_s.unwrap_or(0.0);
                Some(best_s.clamp(
                    store_s.clamp(INTERVAL_MIN_S, INTERVAL_MAX_S),
                    INTERVAL_MAX_S,
                ))
            }
        }
    }

    /// For the status.
    pub(super) fn status(&self, now_ms: u64) -> CadenceStatus {
        let is_auto = self.every == CheckpointEvery::Auto;
        CadenceStatus {
            every: self.every.to_string(),
            interval_seconds: self.interval_s(now_ms),
            cost_seconds: self.cost_s,
            upload_seconds: self.upload_s,
            mtbf_seconds: is_auto.then(|| self.mtbf_s(now_ms)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Steps of 100 ms, 10 of them 20 ms longer while a checkpoint is on its way, from `from_ms` on.
    fn take_one(cadence: &mut Cadence, from_ms: u64) {
        for step in 0..10 {
            assert!(!cadence.is_due(from_ms + 120 * step, true));
            cadence.stepped(0.12);
        }
        assert!(!cadence.is_due(from_ms + 1200, false));
    }

    #[test]
    fn by_steps_the_clock_says_nothing() {
        let mut cadence = Cadence::new(CheckpointEvery::Steps(5), 0);
        cadence.elected(0, 0);
        assert!(!cadence.is_due(1 << 40, false));
        assert_eq!(cadence.status(0).every, "5 steps");
    }

    #[test]
    fn by_time_one_is_due_after_the_last_was_asked_for_and_never_beside_another() {
        let mut cadence = Cadence::new(CheckpointEvery::Time(Duration::from_secs(30)), 0);
        cadence.elected(1_000, 0);
        assert!(!cadence.is_due(30_999, false));
        assert!(cadence.is_due(31_000, false));
        assert!(!cadence.is_due(31_001, false));
        assert!(!cadence.is_due(70_000, true), "the store is slow");
        assert!(cadence.is_due(80_000, false), "overdue");
        // Whoever leads next does not know of that one.
        cadence.elected(81_000, 7);
        assert!(cadence.is_due(81_001, false));
        assert!(!cadence.is_due(111_000, false));
    }

    #[test]
    fn auto_is_youngs_interval_of_what_was_measured() {
        let mut cadence = Cadence::new(CheckpointEvery::Auto, 0);
        cadence.elected(0, 0);
        for _ in 0..100 {
            cadence.stepped(0.1);
        }
        take_one(&mut cadence, 10_000);
        // 10 steps that took 20 ms longer; one failure in an hour is assumed.
        let interval_s = cadence.interval_s(0).unwrap();
        let young_s = (2.0 * 0.2 * 3600.0_f64).sqrt();
        assert!((interval_s - young_s).abs() < 1e-6, "{interval_s}");
        for _ in 0..35 {
            cadence.failed();
        }
        let interval_s = cadence.interval_s(0).unwrap();
        assert!((interval_s - young_s / 6.0).abs() < 1e-6, "{interval_s}");
        // As good as free, and everything fails: the store is still idle half of the time.
        for _ in 0..1_000_000 {
            cadence.failed();
        }
        let interval_s = cadence.interval_s(0).unwrap();
        assert!((interval_s - 2.4).abs() < 1e-6, "{interval_s}");
        let status = cadence.status(0);
        assert!(
            (status.cost_seconds.unwrap() - 0.2).abs() < 1e-6,
            "{status:?}"
        );
        assert!(status.mtbf_seconds.unwrap() < 1.0, "{status:?}");
    }

    #[test]
    fn a_checkpoint_never_gains_time() {
        let mut cadence = Cadence::new(CheckpointEvery::Auto, 0);
        cadence.elected(0, 0);
        cadence.stepped(1.0);
        assert!(!cadence.is_due(0, true));
        cadence.stepped(0.1);
        assert!(!cadence.is_due(100, false));
        assert_eq!(cadence.cost_s, Some(COST_MIN_S));
    }
}
