//! The report for a terminal.

use std::fmt::Write as _;

use everstep_telemetry::Goodput;

use super::Report;
use crate::measure::Spread;

/// The report as text.
#[must_use]
pub fn table(report: &Report) -> String {
    let mut out = String::new();
    write(&mut out, report).unwrap_or_default();
    out
}

fn write(out: &mut String, report: &Report) -> std::fmt::Result {
    let width = report.by_kind.keys().map(String::len).max().unwrap_or(0);
    let width = width.max("fault".len());
    writeln!(
        out,
        "\n{:<width$}  {:>8}  {:>9}  {:>6}  {:>15}  {:>15}  {:>15}",
        "fault", "injected", "recovered", "missed", "detection s", "recovery s", "commit gap s"
    )?;
    for (label, kind) in &report.by_kind {
        writeln!(
            out,
            "{label:<width$}  {:>8}  {:>9}  {:>6}  {:>15}  {:>15}  {:>15}",
            kind.injected,
            kind.recovered,
            kind.missed,
            spread(kind.detection_seconds),
            spread(kind.recovery_seconds),
            spread(kind.gap_seconds),
        )?;
    }
    writeln!(out, "{:>1$}", "(median, max)", width + 85)?;
    let share = |share: Option<f64>| {
        share.map_or_else(|| "-".to_owned(), |share| format!("{:.2} %", share * 100.0))
    };
    let seconds = |seconds: Option<f64>| {
        seconds.map_or_else(|| "-".to_owned(), |seconds| format!("{seconds:.3} s"))
    };
    writeln!(
        out,
        "steps {} in {:.1} s, a step {}, longest gap {}",
        report.steps,
        report.seconds,
        seconds(report.step_seconds),
        seconds(report.longest_gap_seconds)
    )?;
    writeln!(
        out,
        "steps recomputed {}, participation {}, step efficiency {}",
        report.steps_recomputed,
        share(report.participation),
        share(
            report
                .goodput
                .as_ref()
                .and_then(|goodput| goodput.step_efficiency)
        ),
    )?;
    for line in report.goodput.iter().flat_map(Goodput::table) {
        writeln!(out, "{line}")?;
    }
    let flat = report.resources.iter().filter(|life| life.flat).count();
    if !report.resources.is_empty() {
        writeln!(
            out,
            "lives watched for growth {}, flat {flat}",
            report.resources.len()
        )?;
    }
    let verdict = match report.digest_equal {
        Some(true) => "equal to the undisturbed run, bit for bit",
        Some(false) => "DIFFERENT from the undisturbed run",
        None => "not compared",
    };
    writeln!(out, "weights and losses: {verdict}")?;
    for failure in &report.failures {
        writeln!(out, "failed: {failure}")?;
    }
    let passed = if report.passed { "passed" } else { "FAILED" };
    writeln!(
        out,
        "{} (seed {}): {passed}, {} faults, {} recoveries",
        report.scenario, report.seed, report.faults_injected, report.faults_recovered
    )
}

fn spread(spread: Option<Spread>) -> String {
    spread.map_or_else(
        || "-".to_owned(),
        |spread| format!("{:.2}, {:.2}", spread.median, spread.max),
    )
}
