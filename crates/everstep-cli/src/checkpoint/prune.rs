//! `everstep checkpoint prune`.

use std::io::Write as _;

use everstep_store::Retention;

use super::{place, size};
use crate::args::checkpoint::PruneArgs;
use crate::user;

pub(super) async fn run(args: &PruneArgs) -> anyhow::Result<()> {
    if args.keep == 0 {
        return Err(user("--keep 0: at least 1 checkpoint must stay"));
    }
    if args.keep_every == Some(0) {
        return Err(user(
            "--keep-every 0: allowed are numbers of steps from 1 on",
        ));
    }
    let store = place::open(&args.place)?;
    store.existing_run().await.map_err(user)?;
    let retention = Retention {
        last: args.keep,
        every_steps: args.keep_every,
        best: args.keep_best,
    };
    let plan = store.plan_prune(&retention).await.map_err(user)?;
    if !args.dry_run {
        store.carry_out(&plan).await.map_err(user)?;
    }
    let verb = if args.dry_run {
        "would remove"
    } else {
        "removed"
    };
    let mut out = std::io::stdout().lock();
    for (step, reasons) in &plan.keep {
        let reasons: Vec<String> = reasons.iter().map(ToString::to_string).collect();
        writeln!(out, "kept: checkpoint {step} ({})", reasons.join(", "))?;
    }
    for step in &plan.live {
        writeln!(
            out,
            "kept: objects of step {step}, which may be on their way to a commit"
        )?;
    }
    for (step, removal) in &plan.remove {
        writeln!(out, "{verb}: checkpoint {step} ({})", size(removal.bytes))?;
    }
    for (step, removal) in &plan.garbage {
        for key in &removal.keys {
            writeln!(out, "{verb}: `{key}`, left by a dead upload of step {step}")?;
        }
    }
    writeln!(
        out,
        "{verb}: {} checkpoints, {} orphans, {}",
        plan.remove.len(),
        plan.garbage
            .values()
            .map(|removal| removal.keys.len())
            .sum::<usize>(),
        size(plan.bytes())
    )?;
    Ok(())
}
