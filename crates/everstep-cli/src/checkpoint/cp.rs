//! `everstep checkpoint cp`.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use everstep_store::CopyProgress;
use indicatif::{ProgressBar, ProgressStyle};

use super::{place, size};
use crate::args::checkpoint::CpArgs;
use crate::user;

const REFRESH: Duration = Duration::from_millis(100);

pub(super) async fn run(args: &CpArgs) -> anyhow::Result<()> {
    let from = place::open_source(&args.from)?;
    let to = place::open_any(&args.to)?;
    let steps = (!args.step.is_empty()).then_some(args.step.as_slice());
    let started = Instant::now();
    let progress = CopyProgress::default();
    let copy = from.copy_to(&to, steps, &progress);
    let report = with_bar(copy, &progress).await.map_err(user)?;

    let mut out = std::io::stdout().lock();
    for step in &report.there {
        writeln!(out, "there already: checkpoint {step}")?;
    }
    for step in &report.copied {
        writeln!(out, "copied: checkpoint {step}")?;
    }
    for damage in &report.damage {
        writeln!(out, "not copied: {damage}")?;
    }
    writeln!(
        out,
        "{} checkpoints copied, {} there already: {} objects sent, {} of an earlier copy kept, {} in {:.1} s",
        report.copied.len(),
        report.there.len(),
        report.objects_sent,
        report.objects_there,
        size(report.bytes_sent),
        started.elapsed().as_secs_f64()
    )?;
    match report.damage.as_slice() {
        [] => Ok(()),
        damage => Err(anyhow::anyhow!(
            "{} objects are damaged at the source; their checkpoints were not copied",
            damage.len()
        )),
    }
}

/// Shows a bar while `work` goes on, on a terminal.
async fn with_bar<T>(work: impl Future<Output = T>, progress: &CopyProgress) -> T {
    if !std::io::stderr().is_terminal() {
        return work.await;
    }
    let template =
        "{bar:30} {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {elapsed}<{eta}";
    let style =
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(0).with_style(style);
    let mut refresh = tokio::time::interval(REFRESH);
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            outcome = &mut work => {
                bar.finish_and_clear();
                return outcome;
            }
            _ = refresh.tick() => {
                bar.set_length(progress.total_bytes());
                bar.set_position(progress.done_bytes());
            }
        }
    }
}
