//! `everstep status`.

use std::io::Write as _;

use everstep_cluster::{CadenceStatus, RunDir, RunStatus};
use everstep_telemetry::{Event, EventLog, EventRecord, Goodput};
use serde::Serialize;

use crate::args::RunArgs;
use crate::user;

/// Recoveries that are shown, the last ones.
const RECOVERIES_MAX: usize = 8;

#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    status: RunStatus,
    goodput: Goodput,
    /// The last `recovered` events, oldest first.
    recoveries: Vec<EventRecord>,
}

/// The status of the run in `run_dir`; a folder without one is the user's mistake.
pub(crate) fn read(run_dir: &RunDir) -> anyhow::Result<RunStatus> {
    everstep_cluster::read_status(run_dir).map_err(|error| {
        user(format!(
            "{}: no status of a run here: {error}",
            run_dir.path().display()
        ))
    })
}

pub(crate) fn run(args: RunArgs) -> anyhow::Result<()> {
    let run_dir = RunDir::new(&args.run_dir);
    let status = read(&run_dir)?;
    let goodput = everstep_cluster::goodput(&run_dir).map_err(user)?;
    let recoveries = recoveries(&EventLog::read(run_dir.events())?);
    let mut out = std::io::stdout().lock();
    if args.json {
        let shown = Shown {
            status,
            goodput,
            recoveries,
        };
        writeln!(out, "{}", serde_json::to_string_pretty(&shown)?)?;
        return Ok(());
    }
    writeln!(
        out,
        "leader {}  epoch {}  step {}",
        status.leader.leader, status.leader.epoch, status.leader.step
    )?;
    if let Some(store) = &status.store {
        let state = format!("{:?}", store.state).to_lowercase();
        let (checkpoint, lag) = (store.checkpoint, store.lag_steps);
        let mut line = format!("store {state}  checkpoint {checkpoint}  {lag} steps behind");
        if let (Some(since), Some(reason)) = (&store.since, &store.reason) {
            line += &format!("  since {since}: {reason}");
        }
        writeln!(out, "{line}")?;
        if let Some(waiting) = &store.waiting {
            writeln!(out, "waiting: {waiting}")?;
        }
        writeln!(out, "{}", cadence_line(&store.cadence))?;
    }
    for quarantine in &status.leader.quarantined {
        writeln!(out, "quarantined {}", crate::audit::line_of(quarantine))?;
    }
    writeln!(
        out,
        "{:<18} {:<12} {:<28} {:>8} {:<11} {:>8}  last died",
        "process", "node", "roles", "pid", "state", "restarts"
    )?;
    for process in status.processes {
        let pid = process
            .pid
            .map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        let state = format!("{:?}", process.state).to_lowercase();
        let roles = process.roles.join(", ");
        writeln!(
            out,
            "{:<18} {:<12} {:<28} {:>8} {:<11} {:>8}  {}",
            process.name,
            process.node,
            roles,
            pid,
            state,
            process.restarts,
            process.last_reason.unwrap_or_default()
        )?;
    }
    for record in &recoveries {
        if let Some(line) = crate::progress::line_of(&record.event) {
            writeln!(out, "{}  {line}", record.time)?;
        }
    }
    for line in goodput.table() {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

/// How often checkpoints are taken, and what that follows from.
fn cadence_line(cadence: &CadenceStatus) -> String {
    let mut line = format!("checkpoints every {}", cadence.every);
    if let Some(seconds) = cadence.interval_seconds {
        line = format!("checkpoints {}: one in {seconds:.1} s", cadence.every);
    }
    let measured = [
        (cadence.cost_seconds, "one costs training"),
        (cadence.upload_seconds, "is on its way for"),
        (cadence.mtbf_seconds, "something fails every"),
    ];
    let known = measured
        .into_iter()
        .filter_map(|(seconds, what)| Some(format!("{what} {:.2} s", seconds?)));
    let known: Vec<String> = known.collect();
    if !known.is_empty() {
        line += &format!(" ({})", known.join(", "));
    }
    line
}

fn recoveries(events: &[EventRecord]) -> Vec<EventRecord> {
    let recovered = |record: &&EventRecord| matches!(record.event, Event::Recovered { .. });
    let all: Vec<&EventRecord> = events.iter().filter(recovered).collect();
    let shown = all.len().saturating_sub(RECOVERIES_MAX);
    all[shown..]
        .iter()
        .map(|record| (*record).clone())
        .collect()
}
