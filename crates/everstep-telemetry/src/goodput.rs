//! Goodput: what a run's wall time was good for, and what the rest was lost to.
//!
//! [`account`] is a pure function of `metrics.jsonl`, `events.jsonl` and the workers' slot counters, so that it can be computed
//! of a living run, of a finished one and of one that is dead.
//!
//! ```text
//!  run_started     commit        commit                 commit      commit   run_finished
//!      ├── start-up ─┼─ undisturbed ┼──── disturbed ────────┼─ undist. ──┼─ end ─┤
//!                         median           median + excess
//!                                          └ excess: lost to the gravest cause whose window touches the interval
//! ```

mod windows;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::events::{Event, EventRecord};
use crate::metrics::StepMetrics;
use windows::Windows;

/// What took time that training did not need; the later one is the graver and gets the time when two coincide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// Longer than the median, and no event says why.
    Unexplained,
    /// From the start of the command to the first commit, less one step.
    StartUp,
    /// From the last commit to the end: last evaluation and checkpoint, farewell.
    End,
    /// Slots were leased a second time because their holder was slow.
    Straggler,
    /// Slots were computed twice and compared, and the results differed.
    Audit,
    /// The object store failed.
    Store,
    /// A loader process was gone.
    LoaderLost,
    /// A worker process was gone.
    WorkerLost,
    /// A shard process was gone, or its blocks lacked a replica.
    ShardLost,
    /// There was no leader.
    LeaderLost,
    /// A node was drained.
    Drain,
    /// A process was alive and made no progress.
    Hang,
    /// State was lost; steps were computed again from a checkpoint.
    Rollback,
}

impl Cause {
    /// A few words for people.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::Unexplained => "unexplained",
            Self::StartUp => "start-up",
            Self::End => "end",
            Self::Straggler => "stragglers",
            Self::Audit => "audits",
            Self::Store => "store",
            Self::LoaderLost => "loaders lost",
            Self::WorkerLost => "workers lost",
            Self::ShardLost => "shards lost",
            Self::LeaderLost => "leaders lost",
            Self::Drain => "drains",
            Self::Hang => "hangs",
            Self::Rollback => "rollbacks",
        }
    }
}

/// Time lost to one cause.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Loss {
    /// The cause.
    pub cause: Cause,
    /// Wall time, in seconds.
    pub seconds: f64,
    /// How often it happened; 0 where that has no meaning.
    pub count: u64,
}

/// What the workers' slot counters say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotCounts {
    /// Slots of a step.
    pub per_step: u64,
    /// Slots whose gradient was computed, by all lives of all workers.
    pub computed: u64,
    /// How many of them were audits: computed a second time on purpose.
    pub audited: u64,
}

/// The account of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Goodput {
    /// Wall time of all sessions of the run; the time between two sessions does not count.
    pub wall_seconds: f64,
    /// Committed steps.
    pub steps: u64,
    /// Median time of an undisturbed step.
    pub step_seconds: f64,
    /// Time that the committed steps take undisturbed.
    pub useful_seconds: f64,
    /// Time that evaluations took beyond that.
    pub evaluation_seconds: f64,
    /// Share of the wall time that was useful or evaluation.
    pub goodput: f64,
    /// What the rest was lost to, gravest first; causes without time and count are left out.
    pub lost: Vec<Loss>,
    /// Slots computed, audits apart.
    pub slots_computed: u64,
    /// Slots that the committed steps need.
    pub slots_needed: u64,
    /// Slots computed as audits.
    pub slots_audited: u64,
    /// Share of the slots computed that were not repeats; none if nothing was counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step_efficiency: Option<f64>,
    /// Share of the time between first and last commit that the worker processes were there; none without workers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub participation: Option<f64>,
}

/// One start of the command, to its end.
struct Session<'a> {
    start: SystemTime,
    end: SystemTime,
    events: Vec<(SystemTime, &'a Event)>,
    commits: Vec<SystemTime>,
}

/// What happened between two commits.
struct Interval {
    seconds: f64,
    cause: Option<Cause>,
    evaluates: bool,
}

/// Accounts for a run's wall time. Times are those that the writers' clocks gave.
#[must_use]
pub fn account(metrics: &[StepMetrics], events: &[EventRecord], slots: SlotCounts) -> Goodput {
    let sessions = sessions(metrics, events);
    let mut lost: BTreeMap<Cause, (f64, u64)> = BTreeMap::new();
    let mut intervals = Vec::new();
    let mut wall_seconds = 0.0;
    let (mut present, mut expected) = (0.0, 0.0);
    for session in &sessions {
        wall_seconds += seconds(session.start, session.end);
        let windows = Windows::of(&session.events, session.end);
        for (cause, count) in windows.counts() {
            lost.entry(cause).or_default().1 += count;
        }
        let mut since = session.start;
        for (index, commit) in session.commits.iter().enumerate() {
            let within = |event: &&(SystemTime, &Event)| event.0 > since && event.0 <= *commit;
            let evaluates = session
                .events
                .iter()
                .filter(within)
                .any(|(_, event)| matches!(event, Event::Evaluation { .. }));
            let cause = if index == 0 {
                Some(Cause::StartUp)
            } else {
                windows.gravest(since, *commit)
            };
            intervals.push(Interval {
                seconds: seconds(since, *commit),
                cause,
                evaluates,
            });
            since = *commit;
        }
        let tail = if session.commits.is_empty() {
            Cause::StartUp
        } else {
            Cause::End
        };
        lost.entry(tail).or_default().0 += seconds(since, session.end);
        if let (Some(first), Some(last)) = (session.commits.first(), session.commits.last()) {
            let (there, of) = windows.presence(*first, *last);
            present += there;
            expected += of;
        }
    }

    let step_seconds = undisturbed_median(&intervals);
    let mut useful_seconds = 0.0;
    let mut evaluation_seconds = 0.0;
    let (mut quiet_seconds, mut num_quiet) = (0.0, 0.0);
    for interval in &intervals {
        let excess = (interval.seconds - step_seconds).max(0.0);
        match (interval.cause, interval.evaluates) {
            (Some(cause), _) => lost.entry(cause).or_default().0 += excess,
            (None, true) => evaluation_seconds += excess,
            (None, false) => {
                quiet_seconds += interval.seconds;
                num_quiet += 1.0;
                continue;
            }
        }
        useful_seconds += interval.seconds - excess;
    }
    // Shorter steps make up for longer ones, so that jitter around the median is not taken for a loss.
    let useful_quiet = (num_quiet * step_seconds).min(quiet_seconds);
    useful_seconds += useful_quiet;
    lost.entry(Cause::Unexplained).or_default().0 += quiet_seconds - useful_quiet;

    let steps = metrics.len() as u64;
    let slots_needed = slots.per_step * steps;
    let slots_computed = slots.computed.saturating_sub(slots.audited);
    Goodput {
        wall_seconds,
        steps,
        step_seconds,
        useful_seconds,
        evaluation_seconds,
        goodput: ratio(useful_seconds + evaluation_seconds, wall_seconds).unwrap_or(0.0),
        lost: lost
            .into_iter()
            .rev()
            .filter(|(_, (seconds, count))| *seconds > 0.0 || *count > 0)
            .map(|(cause, (seconds, count))| Loss {
                cause,
                seconds,
                count,
            })
            .collect(),
        slots_computed,
        slots_needed,
        slots_audited: slots.audited,
        step_efficiency: ratio(slots_needed as f64, slots_computed as f64)
            .map(|efficiency| efficiency.min(1.0)),
        participation: ratio(present, expected),
    }
}

impl Goodput {
    /// A short table for people, one line per element.
    #[must_use]
    pub fn table(&self) -> Vec<String> {
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        let share = |seconds: f64| percent(ratio(seconds, self.wall_seconds).unwrap_or(0.0));
        let mut lines = vec![format!(
            "goodput {}: {:.1} s of {:.1} s ({} steps of {:.1} ms undisturbed)",
            percent(self.goodput),
            self.useful_seconds + self.evaluation_seconds,
            self.wall_seconds,
            self.steps,
            1e3 * self.step_seconds,
        )];
        for loss in &self.lost {
            let times = match loss.count {
                0 => String::new(),
                count => format!("  ({count} times)"),
            };
            lines.push(format!(
                "  {:<14} {:>8.1} s {:>7}{times}",
                loss.cause.text(),
                loss.seconds,
                share(loss.seconds)
            ));
        }
        if let Some(efficiency) = self.step_efficiency {
            let audits = match self.slots_audited {
                0 => String::new(),
                audits => format!(", {audits} more as audits"),
            };
            lines.push(format!(
                "step efficiency {}: {} slots computed for {} needed{audits}",
                percent(efficiency),
                self.slots_computed,
                self.slots_needed
            ));
        }
        if let Some(participation) = self.participation {
            lines.push(format!(
                "participation {} of the workers",
                percent(participation)
            ));
        }
        lines
    }
}

/// Splits the logs into sessions, by the `run_started` events.
fn sessions<'a>(metrics: &[StepMetrics], events: &'a [EventRecord]) -> Vec<Session<'a>> {
    let mut timed: Vec<(SystemTime, &Event)> = events
        .iter()
        .filter_map(|record| Some((record.at()?, &record.event)))
        .collect();
    // Several writers append; what they say is in the order of their writes, not always of their clocks.
    timed.sort_by_key(|(at, _)| *at);
    let mut commits: Vec<SystemTime> = metrics
        .iter()
        .filter_map(|step| humantime::parse_rfc3339(&step.time).ok())
        .collect();
    commits.sort();
    let mut starts: Vec<SystemTime> = timed
        .iter()
        .filter(|(_, event)| matches!(event, Event::RunStarted { .. }))
        .map(|(at, _)| *at)
        .collect();
    if starts.is_empty() {
        // A node of a larger cluster, where nobody says when the run began.
        let first = timed.first().map(|(at, _)| *at);
        starts.extend(first.into_iter().chain(commits.first().copied()).min());
    }
    let mut sessions = Vec::new();
    for (index, start) in starts.iter().copied().enumerate() {
        let until = starts.get(index + 1).copied();
        let within = |at: SystemTime| at >= start && until.is_none_or(|until| at < until);
        let events: Vec<(SystemTime, &Event)> = timed
            .iter()
            .copied()
            .filter(|(at, _)| within(*at))
            .collect();
        let commits: Vec<SystemTime> = commits.iter().copied().filter(|at| within(*at)).collect();
        let last = events.last().map(|(at, _)| *at);
        let end = last.max(commits.last().copied()).unwrap_or(start);
        sessions.push(Session {
            start,
            end,
            events,
            commits,
        });
    }
    sessions
}

/// Median of the intervals that nothing disturbed; of all, if there are none.
fn undisturbed_median(intervals: &[Interval]) -> f64 {
    let quiet = |interval: &&Interval| interval.cause.is_none() && !interval.evaluates;
    let mut times: Vec<f64> = intervals.iter().filter(quiet).map(|i| i.seconds).collect();
    if times.is_empty() {
        times = intervals.iter().map(|interval| interval.seconds).collect();
    }
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(0.0)
}

fn seconds(from: SystemTime, to: SystemTime) -> f64 {
    to.duration_since(from)
        .unwrap_or(Duration::ZERO)
        .as_secs_f64()
}

fn ratio(part: f64, whole: f64) -> Option<f64> {
    (whole > 0.0).then(|| part / whole)
}

#[cfg(test)]
mod tests;
