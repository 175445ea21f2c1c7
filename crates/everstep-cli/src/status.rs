//! `everstep status`.

use std::io::Write as _;

use everstep_cluster::RunDir;

use crate::args::RunArgs;
use crate::user;

pub(crate) fn run(args: RunArgs) -> anyhow::Result<()> {
    let run_dir = RunDir::new(&args.run_dir);
    let status = everstep_cluster::read_status(&run_dir).map_err(|error| {
        user(format!(
            "{}: no status of a run here: {error}",
            run_dir.path().display()
        ))
    })?;
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&status)?)?;
        return Ok(());
    }
    writeln!(
        out,
        "leader {}  epoch {}  step {}",
        status.leader.leader, status.leader.epoch, status.leader.step
    )?;
    writeln!(
        out,
        "{:<18} {:<12} {:<28} {:>8} {:<11} {:>8}",
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
            "{:<18} {:<12} {:<28} {:>8} {:<11} {:>8}",
            process.name, process.node, roles, pid, state, process.restarts
        )?;
    }
    Ok(())
}
