//! `everstep audit`: quarantines, seen and lifted.

use std::io::Write as _;

use everstep_cluster::{RunContext, RunDir, clear_quarantine, list_quarantines};
use everstep_store::Quarantine;

use crate::args::AuditCommand;
use crate::user;

pub(crate) fn run(command: AuditCommand) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let open = |run_dir| RunContext::open(&RunDir::new(run_dir)).map_err(user);
    let mut out = std::io::stdout().lock();
    match command {
        AuditCommand::List(args) => {
            let run = open(args.run_dir)?;
            let known = runtime.block_on(list_quarantines(&run)).map_err(user)?;
            if args.json {
                writeln!(out, "{}", serde_json::to_string_pretty(&known)?)?;
                return Ok(());
            }
            for quarantine in &known {
                writeln!(out, "{}", line_of(quarantine))?;
            }
        }
        AuditCommand::Clear(args) => {
            let run = open(args.run_dir)?;
            let lifted = clear_quarantine(&run, args.process.as_deref());
            for quarantine in runtime.block_on(lifted).map_err(user)? {
                writeln!(out, "lifted: {}", line_of(&quarantine))?;
            }
        }
    }
    Ok(())
}

/// One line for `status` and for `audit`.
pub(crate) fn line_of(quarantine: &Quarantine) -> String {
    let Quarantine {
        worker,
        process,
        node,
        step,
        time,
        ..
    } = quarantine;
    let mut line = format!("worker-{worker} in {process} on {node}: lied in step {step}");
    if let Some(slot) = quarantine.slot {
        line += &format!(", slot {slot}");
    }
    if let (Some(lied), Some(truth)) = (&quarantine.lied, &quarantine.truth) {
        line += &format!(" (said {lied}, others {truth})");
    }
    line + &format!("; quarantined at {time}")
}
