//! `everstep checkpoint verify`.

use std::io::Write as _;
use std::time::SystemTime;

use super::{place, size};
use crate::args::checkpoint::VerifyArgs;
use crate::user;

pub(super) async fn run(args: &VerifyArgs) -> anyhow::Result<()> {
    let store = place::open(&args.place)?;
    let known = store.list_checkpoints().await.map_err(user)?;
    let steps: Vec<u64> = match args.step {
        Some(step) => vec![step],
        None if args.all => known.iter().map(|info| info.step).collect(),
        None => known.last().map(|info| info.step).into_iter().collect(),
    };
    if steps.is_empty() {
        return Err(user("no step is committed yet"));
    }
    let mut damaged = 0;
    for &step in &steps {
        let damage = store.verify(step).await.map_err(user)?;
        let info = known.iter().find(|info| info.step == step);
        if args.quarantine && info.is_some() {
            if damage.is_empty() {
                store.lift_checkpoint(step).await.map_err(user)?;
            } else {
                let now = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
                store
                    .quarantine_checkpoint(step, &damage, &now)
                    .await
                    .map_err(user)?;
            }
        }
        let mut out = std::io::stdout().lock();
        match (damage.as_slice(), info) {
            ([], Some(info)) => {
                let mark = match (info.quarantined, args.quarantine) {
                    (true, true) => "; no longer quarantined",
                    (true, false) => "; it is quarantined, which --quarantine lifts",
                    _ => "",
                };
                writeln!(
                    out,
                    "checkpoint {step} is intact: {} objects, {}{mark}",
                    info.num_objects,
                    size(info.bytes)
                )?;
            }
            ([], None) => writeln!(out, "checkpoint {step} is intact")?,
            _ => {
                damaged += 1;
                for damage in &damage {
                    writeln!(out, "{damage}")?;
                }
            }
        }
    }
    match damaged {
        0 => Ok(()),
        _ => Err(anyhow::anyhow!(
            "{damaged} of {} checkpoints are damaged",
            steps.len()
        )),
    }
}
