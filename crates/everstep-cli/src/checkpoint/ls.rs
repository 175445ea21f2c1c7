//! `everstep checkpoint ls`.

use std::io::Write as _;

use everstep_store::CheckpointInfo;
use serde_json::json;

use super::{place, size};
use crate::args::checkpoint::LsArgs;
use crate::user;

/// Hex digits of a digest that are shown to people.
const DIGITS: usize = 16;

pub(super) async fn run(args: &LsArgs) -> anyhow::Result<()> {
    let store = place::open(&args.place)?;
    let checkpoints = store.list_checkpoints().await.map_err(user)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        let all: Vec<_> = checkpoints.iter().map(to_json).collect();
        writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
        return Ok(());
    }
    if checkpoints.is_empty() {
        writeln!(std::io::stderr(), "no step is committed yet")?;
        return Ok(());
    }
    writeln!(
        out,
        "{:>9}  {:20}  {:>11}  {:>7}  {:DIGITS$}  notes",
        "step", "committed", "size", "objects", "parameters"
    )?;
    for info in &checkpoints {
        let digest = info.digest.map_or_else(
            || "?".to_owned(),
            |digest| format!("{:.DIGITS$}", digest.parameters.to_string()),
        );
        let line = format!(
            "{:>9}  {:20}  {:>11}  {:>7}  {digest:DIGITS$}  {}",
            info.step,
            time(info),
            size(info.bytes),
            info.num_objects,
            notes(info)
        );
        writeln!(out, "{}", line.trim_end())?;
        for damage in &info.damage {
            writeln!(out, "           {damage}")?;
        }
    }
    Ok(())
}

fn time(info: &CheckpointInfo) -> String {
    humantime::format_rfc3339_seconds(info.committed).to_string()
}

fn notes(info: &CheckpointInfo) -> String {
    let loss = info
        .evaluation_loss
        .map(|loss| format!("evaluation loss {loss:.4}"));
    [
        info.pinned.then(|| "pinned".to_owned()),
        loss,
        info.quarantined.then(|| "QUARANTINED".to_owned()),
        (!info.quarantined && !info.damage.is_empty()).then(|| "DAMAGED".to_owned()),
    ]
    .into_iter()
    .flatten()
    .collect::<Vec<_>>()
    .join(", ")
}

fn to_json(info: &CheckpointInfo) -> serde_json::Value {
    let damage: Vec<_> = info
        .damage
        .iter()
        .map(|damage| json!({ "object": damage.object, "reason": damage.reason.to_string() }))
        .collect();
    json!({
        "step": info.step,
        "committed": time(info),
        "bytes": info.bytes,
        "new_bytes": info.new_bytes,
        "objects": info.num_objects,
        "parameters": info.digest.map(|digest| digest.parameters.to_string()),
        "optimizer": info.digest.map(|digest| digest.optimizer.to_string()),
        "evaluation_loss": info.evaluation_loss,
        "pinned": info.pinned,
        "quarantined": info.quarantined,
        "damage": damage,
    })
}
