//! The outcome of a scenario: measurements and verdict.

use std::collections::BTreeMap;

use everstep_telemetry::Goodput;
use serde::Serialize;

use crate::driver::Observed;
use crate::measure::{self, FaultReport, KindReport};
use crate::resources::{self, LifeReport};
use crate::scenario::{Check, DigestCheck, Scenario};

mod table;
mod timeline;

pub use table::table;
pub use timeline::timeline;

/// Digests of a committed step, as `everstep digest --json` prints them, and the digest of all losses and norms.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Digests {
    /// The step.
    pub step: u64,
    /// Of the parameters.
    pub parameters: String,
    /// Of the optimizer state.
    pub optimizer: String,
}

/// The whole report.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Name of the scenario.
    pub scenario: String,
    /// The seed.
    pub seed: u64,
    /// Whether everything that the scenario demands holds.
    pub passed: bool,
    /// What does not hold, one sentence each.
    pub failures: Vec<String>,
    /// How long the disturbed run took.
    pub seconds: f64,
    /// Steps committed.
    pub steps: u64,
    /// Digests of the undisturbed run.
    pub undisturbed: Option<Digests>,
    /// Digests of the disturbed run.
    pub disturbed: Option<Digests>,
    /// Whether digests, losses and gradient norms of all steps are equal.
    pub digest_equal: Option<bool>,
    /// Faults that really happened.
    pub faults_injected: usize,
    /// Faults from which the run recovered.
    pub faults_recovered: usize,
    /// By kind and target.
    pub by_kind: BTreeMap<String, KindReport>,
    /// Length of an ordinary step (median).
    pub step_seconds: Option<f64>,
    /// Longest time between two commits.
    pub longest_gap_seconds: Option<f64>,
    /// Steps that were computed again after rollbacks.
    pub steps_recomputed: u64,
    /// Where the time went, and how many slot computations were repeats.
    pub goodput: Option<Goodput>,
    /// Workers that were quarantined.
    pub quarantined: Vec<String>,
    /// Processes that ended before the run was over, or were taken for dead.
    pub deaths: usize,
    /// Share of the time in which workers were there.
    pub participation: Option<f64>,
    /// Events by kind.
    pub events: BTreeMap<String, usize>,
    /// Lives that were long enough to tell whether they grew.
    pub resources: Vec<LifeReport>,
    /// Every fault.
    pub faults: Vec<FaultReport>,
}

/// What the report needs beside the observations.
#[derive(Debug, Clone)]
pub struct Results {
    /// Digests of the undisturbed run.
    pub undisturbed: Option<Digests>,
    /// Digests of the disturbed run.
    pub disturbed: Option<Digests>,
    /// Whether losses and gradient norms of all steps are equal.
    pub numbers_equal: bool,
    /// Where the time went.
    pub goodput: Option<Goodput>,
    /// Workers of the topology.
    pub num_workers: u32,
}

impl Report {
    /// Measures and judges.
    #[must_use]
    pub fn new(scenario: &Scenario, seed: u64, observed: &Observed, results: Results) -> Self {
        let faults = measure::faults(observed);
        let mut report = Self {
            scenario: scenario.name.clone(),
            seed,
            passed: false,
            failures: observed.failure.iter().cloned().collect(),
            seconds: observed.seconds,
            steps: observed.commits.last().map_or(0, |commit| commit.step),
            digest_equal: match (&results.undisturbed, &results.disturbed) {
                (Some(undisturbed), Some(disturbed)) => {
                    Some(undisturbed == disturbed && results.numbers_equal)
                }
                _ => None,
            },
            undisturbed: results.undisturbed,
            disturbed: results.disturbed,
            faults_injected: faults.iter().filter(|fault| fault.record.happened).count(),
            faults_recovered: faults.iter().filter(|fault| fault.recovered).count(),
            by_kind: measure::by_kind(&faults),
            step_seconds: measure::step_seconds(&observed.commits),
            longest_gap_seconds: measure::longest_gap(&observed.commits),
            steps_recomputed: measure::steps_recomputed(&observed.events),
            goodput: results.goodput,
            quarantined: measure::quarantined(&observed.events),
            deaths: measure::deaths(observed),
            participation: measure::participation(observed, results.num_workers),
            events: measure::events(&observed.events),
            resources: resources::lives(&observed.lives),
            faults,
        };
        report.judge(&scenario.check, scenario.num_planned());
        report
    }

    fn judge(&mut self, check: &Check, num_planned: usize) {
        let mut failures = Vec::new();
        let mut demand = |holds: bool, failure: String| {
            if !holds {
                failures.push(failure);
            }
        };
        let faults = check.faults.unwrap_or(num_planned);
        let recoveries = check.recoveries.unwrap_or(faults);
        let (injected, recovered) = (self.faults_injected, self.faults_recovered);
        demand(
            injected >= faults,
            format!("{injected} faults happened; at least {faults} were planned"),
        );
        demand(
            recovered >= recoveries,
            format!(
                "the run recovered from {recovered} faults; at least {recoveries} were planned"
            ),
        );
        if check.digest == DigestCheck::Undisturbed {
            demand(
                self.digest_equal == Some(true),
                match self.digest_equal {
                    Some(_) => "the weights or losses differ from the undisturbed run's".to_owned(),
                    None => "there are no digests to compare".to_owned(),
                },
            );
        }
        if let (Some(max), gap) = (check.max_gap_seconds, self.longest_gap_seconds) {
            demand(
                gap.is_some_and(|gap| gap <= max),
                format!("longest gap between commits: {gap:?} s; allowed: {max} s"),
            );
        }
        let step = self.step_seconds.unwrap_or(0.0);
        for (label, max) in &check.gap_seconds_max {
            let gap = self.by_kind.get(label).and_then(|kind| kind.gap_seconds);
            demand(
                gap.is_some_and(|gap| gap.max - step <= *max),
                format!(
                    "{label}: longest gap {gap:?}, a step takes {step:.3} s; allowed: {max} s and one step"
                ),
            );
        }
        for (label, max) in &check.detection_seconds_max {
            let kind = self.by_kind.get(label);
            let detection = kind.and_then(|kind| kind.detection_seconds);
            demand(
                detection.is_some_and(|detection| detection.max <= *max),
                format!("{label}: detection took {detection:?}; allowed: {max} s"),
            );
        }
        if let Some(max) = check.deaths_max {
            let deaths = self.deaths;
            demand(
                deaths <= max,
                format!("{deaths} processes ended or were taken for dead; allowed: {max}"),
            );
        }
        if let Some(min) = check.step_efficiency_min {
            let efficiency = self
                .goodput
                .as_ref()
                .and_then(|goodput| goodput.step_efficiency);
            demand(
                efficiency.is_some_and(|efficiency| efficiency >= min),
                format!("step efficiency {efficiency:?}; allowed: at least {min}"),
            );
        }
        if let Some(wanted) = &check.quarantined {
            let quarantined = &self.quarantined;
            demand(
                quarantined == wanted,
                format!("quarantined: {quarantined:?}; allowed: {wanted:?} and nobody else"),
            );
        }
        for (kind, min) in &check.events {
            let count = self.events.get(kind).copied().unwrap_or(0);
            demand(
                count >= *min,
                format!("{count} events {kind}; allowed: at least {min}"),
            );
        }
        for (kind, max) in &check.events_max {
            let count = self.events.get(kind).copied().unwrap_or(0);
            demand(
                count <= *max,
                format!("{count} events {kind}; allowed: at most {max}"),
            );
        }
        if check.flat {
            demand(
                !self.resources.is_empty(),
                "no process lived long enough to tell whether it grows".to_owned(),
            );
            for life in self.resources.iter().filter(|life| !life.flat) {
                demand(
                    false,
                    format!("{} (pid {}) grew: see resources", life.process, life.pid),
                );
            }
        }
        self.failures.extend(failures);
        self.passed = self.failures.is_empty();
    }
}
