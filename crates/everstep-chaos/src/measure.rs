//! What a disturbed run cost: a pure function of what was observed.

use std::collections::BTreeMap;

use everstep_telemetry::{Event, EventRecord};
use serde::Serialize;

use crate::driver::Observed;
use crate::record::{Commit, Life};

mod matching;

pub use matching::{FaultReport, faults};

/// An agent logs that a process ended as it was told to within this time, in seconds.
const STOP_LOGGED_SECONDS: f64 = 2.0;

/// The gap between commits that follows a fault is looked for in this time after it, in seconds, if no other fault comes first.
const GAP_WINDOW_SECONDS: f64 = 10.0;

/// Median and maximum.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// Median.
    pub median: f64,
    /// Maximum.
    pub max: f64,
}

impl Spread {
    /// Of some numbers; none of none.
    #[must_use]
    pub fn of(mut numbers: Vec<f64>) -> Option<Self> {
        numbers.retain(|number| number.is_finite());
        numbers.sort_by(f64::total_cmp);
        let max = *numbers.last()?;
        let half = numbers.len() / 2;
        let median = if numbers.len().is_multiple_of(2) {
            f64::midpoint(numbers[half - 1], numbers[half])
        } else {
            numbers[half]
        };
        Some(Self { median, max })
    }
}

/// Faults of one kind and target.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KindReport {
    /// How many really happened.
    pub injected: usize,
    /// From how many the run recovered.
    pub recovered: usize,
    /// How many could not happen.
    pub missed: usize,
    /// Detection.
    pub detection_seconds: Option<Spread>,
    /// Recovery.
    pub recovery_seconds: Option<Spread>,
    /// Gap between commits.
    pub gap_seconds: Option<Spread>,
}

/// An event's name in `events.jsonl`.
#[must_use]
pub fn kind(event: &EventRecord) -> String {
    serde_json::to_value(event)
        .ok()
        .and_then(|value| Some(value.get("kind")?.as_str()?.to_owned()))
        .unwrap_or_default()
}

/// The longest time between two commits of which at least a part lies between the fault and the next one.
fn gap(at: f64, next_fault: Option<f64>, commits: &[Commit]) -> Option<f64> {
    let end = next_fault
        .unwrap_or(f64::INFINITY)
        .min(at + GAP_WINDOW_SECONDS);
    let pairs = commits.iter().zip(commits.iter().skip(1));
    pairs
        .filter(|(before, after)| after.at > at && before.at < end)
        .map(|(before, after)| after.at - before.at)
        .max_by(f64::total_cmp)
}

/// The longest time between two commits of the whole run.
#[must_use]
pub fn longest_gap(commits: &[Commit]) -> Option<f64> {
    let pairs = commits.iter().zip(commits.iter().skip(1));
    pairs
        .map(|(before, after)| after.at - before.at)
        .max_by(f64::total_cmp)
}

/// The length of an ordinary step: the median of all.
#[must_use]
pub fn step_seconds(commits: &[Commit]) -> Option<f64> {
    let pairs = commits.iter().zip(commits.iter().skip(1));
    Spread::of(pairs.map(|(before, after)| after.at - before.at).collect())
        .map(|spread| spread.median)
}

/// Faults by kind and target.
#[must_use]
pub fn by_kind(faults: &[FaultReport]) -> BTreeMap<String, KindReport> {
    let mut groups: BTreeMap<String, Vec<&FaultReport>> = BTreeMap::new();
    for fault in faults {
        groups
            .entry(fault.record.label.clone())
            .or_default()
            .push(fault);
    }
    let spread = |group: &[&FaultReport], number: fn(&FaultReport) -> Option<f64>| {
        Spread::of(group.iter().filter_map(|fault| number(fault)).collect())
    };
    groups
        .into_iter()
        .map(|(label, group)| {
            let report = KindReport {
                injected: group.iter().filter(|fault| fault.record.happened).count(),
                recovered: group.iter().filter(|fault| fault.recovered).count(),
                missed: group.iter().filter(|fault| !fault.record.happened).count(),
                detection_seconds: spread(&group, |fault| fault.detection_seconds),
                recovery_seconds: spread(&group, |fault| fault.recovery_seconds),
                gap_seconds: spread(&group, |fault| fault.gap_seconds),
            };
            (label, report)
        })
        .collect()
}

/// How many events of each kind there are.
#[must_use]
pub fn events(events: &[(f64, EventRecord)]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for (_, event) in events {
        *counts.entry(kind(event)).or_default() += 1;
    }
    counts
}

/// Deaths: processes that ended before the last commit, or members that were taken for lost or hung, whichever are more.
#[must_use]
pub fn deaths(observed: &Observed) -> usize {
    let told = observed.events.iter().filter(|(_, event)| {
        matches!(
            event.event,
            Event::ProcessLost { .. } | Event::ProcessHung { .. }
        )
    });
    let last = observed.commits.last().map_or(0.0, |commit| commit.at);
    // Who leaves as it was told to is not dead.
    let was_told = |life: &Life, to: f64| {
        observed.events.iter().any(|(at, event)| {
            (at - to).abs() < STOP_LOGGED_SECONDS
                && matches!(&event.event, Event::ProcessStopped { process, .. } if *process == life.process)
        })
    };
    let ended = observed.lives.iter();
    let ended = ended.filter(|life| life.to.is_some_and(|to| to < last && !was_told(life, to)));
    told.count().max(ended.count())
}

/// The processes whose workers were quarantined for lying, by name.
#[must_use]
pub fn quarantined(events: &[(f64, EventRecord)]) -> Vec<String> {
    let named = events.iter().filter_map(|(_, event)| match &event.event {
        Event::WorkerQuarantined { process, .. } => Some(process.clone()),
        _ => None,
    });
    let mut named: Vec<String> = named.collect();
    named.sort();
    named.dedup();
    named
}

/// Steps that were computed again because the run went back.
#[must_use]
pub fn steps_recomputed(events: &[(f64, EventRecord)]) -> u64 {
    let back = events.iter().map(|(_, event)| match event.event {
        Event::Rollback {
            from_step, to_step, ..
        } => from_step.saturating_sub(to_step),
        _ => 0,
    });
    back.sum()
}

/// The share of the time between first and last commit in which workers were there and not stopped, over all workers.
#[must_use]
pub fn participation(observed: &Observed, num_workers: u32) -> Option<f64> {
    let (first, last) = (observed.commits.first()?.at, observed.commits.last()?.at);
    if last <= first || num_workers == 0 {
        return None;
    }
    let within = |from: f64, to: f64| (to.min(last) - from.max(first)).max(0.0);
    let workers = observed
        .lives
        .iter()
        .filter(|life| life.roles.iter().any(|role| role == "worker"));
    let alive: f64 = workers
        .map(|life| within(life.from, life.to.unwrap_or(last)))
        .sum();
    let paused: f64 = observed
        .faults
        .iter()
        .filter(|fault| fault.kind == "pause")
        .flat_map(|fault| {
            fault
                .victims
                .iter()
                .map(move |victim| (fault.until, victim))
        })
        .filter_map(|(until, victim)| {
            let life = observed.lives.iter().find(|life| {
                life.identity == victim.identity && life.roles.iter().any(|role| role == "worker")
            })?;
            let until = until.unwrap_or(last).min(life.to.unwrap_or(last));
            Some(within(victim.at, until))
        })
        .sum();
    Some((alive - paused) / ((last - first) * f64::from(num_workers)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_maxima() {
        assert_eq!(Spread::of(vec![]), None);
        let spread = Spread::of(vec![3.0, 1.0, f64::NAN, 2.0]).unwrap();
        assert_eq!((spread.median, spread.max), (2.0, 3.0));
        assert_eq!(Spread::of(vec![4.0, 1.0]).unwrap().median, 2.5);
    }

    #[test]
    fn a_gap_belongs_to_the_fault_that_it_follows() {
        let commits: Vec<Commit> = [0.0, 1.0, 2.0, 6.0, 7.0, 30.0]
            .iter()
            .enumerate()
            .map(|(step, at)| Commit {
                at: *at,
                step: step as u64,
            })
            .collect();
        assert_eq!(gap(2.5, None, &commits), Some(23.0));
        assert_eq!(gap(2.5, Some(6.5), &commits), Some(4.0));
        assert_eq!(gap(0.5, Some(1.5), &commits), Some(1.0));
        assert_eq!(gap(40.0, None, &commits), None);
        assert_eq!(longest_gap(&commits), Some(23.0));
        assert_eq!(step_seconds(&commits), Some(1.0));
    }
}
