//! `everstep checkpoint diff`.

use std::io::Write as _;

use everstep_store::{RunStore, ValueDifference};
use serde_json::{Value, json};

use super::place;
use crate::args::checkpoint::{DiffArgs, PlaceArgs};
use crate::user;

pub(super) async fn run(args: &DiffArgs) -> anyhow::Result<()> {
    let (a, a_step) = open(args, &args.a)?;
    let (b, b_step) = open(args, &args.b)?;
    let diff = a.diff(a_step, &b, b_step).await.map_err(user)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        let blocks: Vec<Value> = diff
            .blocks
            .iter()
            .map(|block| {
                json!({
                    "block": block.block,
                    "parameters": to_json(block.param),
                    "first_moments": to_json(block.m),
                    "second_moments": to_json(block.v),
                    "averages": to_json(block.ema),
                    "other": block.extra,
                })
            })
            .collect();
        let all = json!({ "num_blocks": diff.num_blocks, "blocks": blocks });
        writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
        return Ok(());
    }
    for block in &diff.blocks {
        let parts = [
            ("parameters", block.param),
            ("first moments", block.m),
            ("second moments", block.v),
            ("averages", block.ema),
        ];
        let mut texts: Vec<String> = parts
            .iter()
            .filter(|(_, difference)| difference.count > 0)
            .map(|(part, ValueDifference { count, max_abs })| {
                format!("{count} {part} differ, by at most {max_abs:.3e}")
            })
            .collect();
        if block.extra {
            texts.push("history differs".to_owned());
        }
        writeln!(out, "block {}: {}", block.block, texts.join("; "))?;
    }
    writeln!(
        out,
        "{} of {} blocks differ",
        diff.blocks.len(),
        diff.num_blocks
    )?;
    Ok(())
}

fn open(args: &DiffArgs, text: &str) -> anyhow::Result<(RunStore, u64)> {
    let (run, step) = place::split_step(text)?;
    let store = match run {
        Some(run) => place::open_source(run)?,
        None => {
            let run_dir = args.run_dir.clone().ok_or_else(|| {
                user(format!(
                    "`{text}`: which run? Give --run-dir DIR, or write RUN@{step}"
                ))
            })?;
            place::open(&PlaceArgs {
                run: None,
                run_dir: Some(run_dir),
            })?
        }
    };
    Ok((store, step))
}

/// An infinite difference is none that JSON can say: `null`.
fn to_json(difference: ValueDifference) -> Value {
    json!({ "count": difference.count, "max_abs": difference.max_abs })
}
