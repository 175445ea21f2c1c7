//! A scenario in the simulator: the same file, the same protocol machines, virtual time, a toy objective.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use everstep_sim::{Digest, Outcome, run_plan};
use everstep_train::RunConfig;
use serde::Serialize;

use crate::ChaosError;
use crate::measure::Spread;
use crate::scenario::Scenario;

mod plan;

/// What a simulated run of a scenario showed. Times are virtual.
#[derive(Debug, Clone, Serialize)]
pub struct SimulationReport {
    /// Name of the scenario.
    pub scenario: String,
    /// The seed.
    pub seed: u64,
    /// Whether every planned fault struck, every invariant held and the result is the undisturbed one.
    pub passed: bool,
    /// What does not hold, one sentence each.
    pub failures: Vec<String>,
    /// Whether the last checkpoint has the bits of the undisturbed run; none if the run did not get there.
    pub digest_equal: Option<bool>,
    /// Faults of the simulator that had to happen; a fault of the file may be several.
    pub faults_planned: u64,
    /// Those that found their moment and their target.
    pub faults_injected: u64,
    /// Faults of the file that nothing of the simulator notices.
    pub left_out: Vec<String>,
    /// Faults that happened, by the simulator's kinds.
    pub faults: BTreeMap<String, SimulatedKind>,
    /// Recoveries that happened, by the simulator's kinds.
    pub recoveries: BTreeMap<String, u64>,
    /// Steps of the run; a long one is shortened.
    pub steps: u64,
    /// Steps decided, repeats included.
    pub decisions: u64,
    /// Slots that were leased again.
    pub slots_recomputed: u64,
    /// How long the run took.
    pub seconds: f64,
}

/// Faults of one kind.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct SimulatedKind {
    /// How often it happened.
    pub injected: u64,
    /// Until a leader gave the victim up.
    pub detection_seconds: Option<Spread>,
    /// Until the next step was decided.
    pub recovery_seconds: Option<Spread>,
}

/// Runs a scenario in the simulator; the same file and seed run the same way. `set` are more overrides of the run file.
///
/// # Errors
/// A user's mistake, or a fault that the simulator does not know, in one line.
pub fn simulate(
    scenario: &Scenario,
    seed: u64,
    set: &[String],
) -> Result<SimulationReport, ChaosError> {
    let topology = scenario.topology()?;
    let set: Vec<String> = scenario.workload.set.iter().chain(set).cloned().collect();
    let run = RunConfig::read(&scenario.workload.run, &set)
        .map_err(|error| ChaosError::User(error.to_string()))?;
    let planned = plan::plan(scenario, &topology, &run, seed)
        .map_err(|wrong| ChaosError::User(format!("{}: {wrong}", scenario.file.display())))?;
    let outcome = run_plan(&planned.plan, seed);
    Ok(report(scenario, &outcome, &planned))
}

fn report(scenario: &Scenario, outcome: &Outcome, planned: &plan::Planned) -> SimulationReport {
    let mut failures: Vec<String> = outcome.violation.iter().cloned().collect();
    if outcome.num_struck < planned.num_demanded {
        failures.push(format!(
            "{} faults happened; at least {} were planned",
            outcome.num_struck, planned.num_demanded
        ));
    }
    let digest_equal = match outcome.digest {
        Digest::Unfinished => None,
        Digest::Undisturbed => Some(true),
        Digest::Differs => Some(false),
    };
    match digest_equal {
        Some(true) => {}
        Some(false) => failures.push("the result differs from the undisturbed run's".to_owned()),
        None => failures.push("the run did not get to its end".to_owned()),
    }
    let kinds = outcome.faults.iter().map(|(fault, count)| {
        let strikes = || outcome.strikes.iter().filter(|one| one.fault == *fault);
        let seconds = |ms: u64| ms as f64 / 1_000.0;
        let kind = SimulatedKind {
            injected: *count,
            detection_seconds: Spread::of(
                strikes()
                    .filter_map(|one| one.detected_ms.map(seconds))
                    .collect(),
            ),
            recovery_seconds: Spread::of(
                strikes()
                    .filter_map(|one| one.recovered_ms.map(seconds))
                    .collect(),
            ),
        };
        (fault.to_string(), kind)
    });
    let recoveries = outcome.recoveries.iter();
    SimulationReport {
        scenario: scenario.name.clone(),
        seed: outcome.seed,
        passed: failures.is_empty(),
        failures,
        digest_equal,
        faults_planned: planned.num_demanded,
        faults_injected: outcome.num_struck,
        left_out: planned.left_out.clone(),
        faults: kinds.collect(),
        recoveries: recoveries
            .map(|(kind, count)| (kind.to_string(), *count))
            .collect(),
        steps: planned.plan.workload.num_steps,
        decisions: outcome.num_decisions,
        slots_recomputed: outcome.slots_recomputed,
        seconds: outcome.virtual_ms as f64 / 1_000.0,
    }
}

impl SimulationReport {
    /// The report for a terminal.
    #[must_use]
    pub fn table(&self) -> String {
        let mut out = String::new();
        self.write(&mut out).unwrap_or_default();
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let names = self.faults.keys().chain(self.recoveries.keys());
        let width = names.map(String::len).max().unwrap_or(0).max(20);
        let spread = |spread: Option<Spread>| {
            spread.map_or_else(
                || "-".to_owned(),
                |spread| format!("{:.2}, {:.2}", spread.median, spread.max),
            )
        };
        writeln!(
            out,
            "{:<width$}  {:>8}  {:>15}  {:>15}",
            "simulated fault", "injected", "detection s", "recovery s"
        )?;
        for (name, kind) in &self.faults {
            writeln!(
                out,
                "{name:<width$}  {:>8}  {:>15}  {:>15}",
                kind.injected,
                spread(kind.detection_seconds),
                spread(kind.recovery_seconds)
            )?;
        }
        writeln!(out, "{:>1$}", "(median, max)", width + 44)?;
        writeln!(out, "{:<width$}  {:>8}", "recovery", "times")?;
        for (name, count) in &self.recoveries {
            writeln!(out, "{name:<width$}  {count:>8}")?;
        }
        for line in &self.left_out {
            writeln!(out, "left out: {line}")?;
        }
        writeln!(
            out,
            "steps {} in {:.1} virtual seconds, {} decisions, {} slots leased again",
            self.steps, self.seconds, self.decisions, self.slots_recomputed
        )?;
        for failure in &self.failures {
            writeln!(out, "failed: {failure}")?;
        }
        let passed = if self.passed { "passed" } else { "FAILED" };
        writeln!(
            out,
            "{} (simulated, seed {}): {passed}, {} faults",
            self.scenario, self.seed, self.faults_injected
        )
    }
}

#[cfg(test)]
mod tests;
