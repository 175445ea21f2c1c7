//! Reads committed checkpoints again, in the background and slowly, for as long as this process leads: what is damaged shall be known
//! before it is needed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use everstep_store::StoreError;
use everstep_telemetry::Event;

use crate::process::ProcessContext;
use crate::store_health::{Access, patiently};

/// How often it looks whether there is something to read.
const LOOK: Duration = Duration::from_secs(1);
/// The store is asked what it holds whenever a checkpoint was committed, and this often anyway.
const LIST: Duration = Duration::from_secs(60);
/// An intact checkpoint is not read again for so long.
const AGAIN: Duration = Duration::from_secs(3600);

/// When which checkpoint was read, by step.
type Seen = BTreeMap<u64, Instant>;

/// Scrubs for as long as the process lives, while it leads.
pub(crate) async fn scrub(context: Arc<ProcessContext>) {
    let bytes_per_s = context.run.config.checkpoint.scrub_bytes_per_s;
    if bytes_per_s == 0 {
        return;
    }
    let mut seen = Seen::new();
    let mut listed: Option<(u64, Instant)> = None;
    loop {
        tokio::time::sleep(LOOK).await;
        let committed = context.store_health.committed();
        let is_fresh = |(at, when): (u64, Instant)| at == committed && when.elapsed() < LIST;
        if !context.store_health.speaks() || listed.is_some_and(is_fresh) {
            continue;
        }
        match scrub_next(&context, &mut seen, bytes_per_s).await {
            // There may be another one.
            Ok(true) => {}
            Ok(false) => listed = Some((committed, Instant::now())),
            Err(error) => {
                tracing::warn!(%error, "the scrub could not read a checkpoint; it goes on later");
                listed = Some((committed, Instant::now()));
            }
        }
    }
}

/// The checkpoint that is read next: the newest that was not read yet, else the one that was read first, if that is long ago.
fn next(steps: &[u64], seen: &Seen, now: Instant) -> Option<u64> {
    let fresh = steps.iter().rev().find(|step| !seen.contains_key(step));
    let stale = || {
        let oldest = seen.iter().min_by_key(|(_, when)| **when)?;
        (now.duration_since(*oldest.1) >= AGAIN).then_some(oldest.0)
    };
    fresh.or_else(stale).copied()
}

/// Reads one checkpoint; whether there was one to read.
async fn scrub_next(
    context: &ProcessContext,
    seen: &mut Seen,
    bytes_per_s: u64,
) -> Result<bool, StoreError> {
    let list = || context.store.checkpoints();
    let steps = patiently(context, Access::Read, list).await?;
    seen.retain(|step, _| steps.contains(step));
    let Some(step) = next(&steps, seen, Instant::now()) else {
        return Ok(false);
    };
    seen.insert(step, Instant::now());
    let read = || context.store.scrub(step, bytes_per_s);
    let report = match patiently(context, Access::Read, read).await {
        Err(StoreError::NoCheckpoint { .. }) => return Ok(true),
        other => other?,
    };
    if report.damage.is_empty() {
        tracing::debug!(step, bytes = report.bytes, "scrubbed; intact");
        return Ok(true);
    }
    // What was pruned meanwhile is not damaged.
    let steps = patiently(context, Access::Read, list).await?;
    if !steps.contains(&step) {
        return Ok(true);
    }
    let now = everstep_telemetry::timestamp(SystemTime::now());
    let quarantine = || {
        context
            .store
            .quarantine_checkpoint(step, &report.damage, &now)
    };
    let marked = patiently(context, Access::Write, quarantine).await?;
    for damage in &report.damage {
        let (object, reason) = (damage.object.clone(), damage.reason.to_string());
        tracing::error!(step, object, reason, "the scrub found a damaged checkpoint");
        context.event(&Event::CheckpointDamaged {
            step,
            object,
            reason,
        });
    }
    // It may share the damaged object with an older one.
    if steps.last().is_some_and(|newest| marked.contains(newest)) {
        context.store_health.newest_is_damaged();
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_unread_comes_first_and_nothing_twice_within_the_hour() {
        let start = Instant::now();
        let mut seen = Seen::new();
        let mut order = Vec::new();
        for second in 0..4 {
            let now = start + Duration::from_secs(second);
            let Some(step) = next(&[10, 20, 30], &seen, now) else {
                break;
            };
            seen.insert(step, now);
            order.push(step);
        }
        assert_eq!(order, [30, 20, 10]);
        assert_eq!(next(&[10, 20, 30, 40], &seen, start), Some(40));
        let steps = [10, 20, 30];
        assert_eq!(next(&steps, &seen, start + AGAIN - LOOK), None);
        assert_eq!(next(&steps, &seen, start + AGAIN), Some(30));
        assert_eq!(next(&[], &Seen::new(), start), None);
    }
}
