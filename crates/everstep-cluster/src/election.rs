//! Who leads: an epoch is won by creating its lease in the object store, or, in a static election, by counting in the ledger.

use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::time::Duration;

use everstep_store::{LastCommit, LatestIntact, Lease, Quarantine, StoreError};
use everstep_telemetry::Event;

use crate::process::ProcessContext;
use crate::quarantine;
use crate::store_health::{Access, patiently};

const RETRY: Duration = Duration::from_millis(300);
/// A new leader is not held up longer by a look at the checkpoints and the quarantines: those are only a hint, and these are looked for again.
const HINT_DEADLINE: Duration = Duration::from_secs(2);

/// What is known once an epoch is won.
#[derive(Debug)]
pub(crate) struct Won {
    /// The epoch.
    pub(crate) epoch: u64,
    /// The newest committed version that this process knows of (0: none).
    pub(crate) checkpoint: u64,
    /// Quarantined workers; `None` if the store did not tell in time.
    pub(crate) quarantined: Option<Vec<Quarantine>>,
}

/// Wins the next free epoch above `at_least`, however long the store takes. `hints` are steps that may have a checkpoint.
pub(crate) async fn win(
    context: &Arc<ProcessContext>,
    owner: &str,
    at_least: u64,
    hints: &[u64],
) -> Won {
    // The owner's name alone would be the same again for a process whose ledger was lost.
    let owner = format!("{owner} {:016x}", RandomState::new().hash_one(owner));
    let epoch = loop {
        match attempt(context, &owner, at_least).await {
            Ok(Some(epoch)) => break epoch,
            Ok(None) => tracing::info!("the epoch went to another coordinator"),
            Err(error) => tracing::warn!(error, "no election now; trying again"),
        }
        tokio::time::sleep(RETRY).await;
    };
    context.store_health.waiting(None);
    let recorded = match context.ledger.last_commit() {
        Ok(commit) => commit.map_or(0, |commit| commit.step),
        Err(error) => {
            tracing::warn!(%error, "the ledger does not tell the last checkpoint");
            0
        }
    };
    let (newest, quarantined) = tokio::join!(
        tokio::time::timeout(HINT_DEADLINE, context.store.latest_committed(hints)),
        tokio::time::timeout(HINT_DEADLINE, quarantine::look(context)),
    );
    let newest = match newest {
        Ok(Ok(newest)) => newest.unwrap_or(0),
        // If the run is over, or state must come from a checkpoint, the store is asked again, with more patience.
        _ => 0,
    };
    Won {
        epoch,
        checkpoint: newest.max(recorded),
        quarantined: quarantined.ok().and_then(Result::ok),
    }
}

/// The newest checkpoint that is intact, however long the store takes; 0 if there is none.
pub(crate) async fn find_checkpoint(context: &ProcessContext, hints: &[u64]) -> u64 {
    let waiting = "the state must come from a checkpoint in the store";
    context.store_health.waiting(Some(waiting.to_owned()));
    let found = loop {
        let search = || context.store.latest_intact(hints);
        match patiently(context, Access::Read, search).await {
            Ok(found) => break found,
            Err(error) => {
                tracing::error!(%error, "checkpoints cannot be used; trying again");
                tokio::time::sleep(RETRY).await;
            }
        }
    };
    context.store_health.waiting(None);
    let LatestIntact {
        checkpoint,
        damaged,
    } = found;
    for damage in damaged {
        let (object, reason) = (damage.object.clone(), damage.reason.to_string());
        tracing::error!(
            step = damage.step,
            object,
            reason,
            "a checkpoint is damaged; an older one is used"
        );
        context.event(&Event::CheckpointDamaged {
            step: damage.step,
            object,
            reason,
        });
    }
    let Some(checkpoint) = checkpoint else {
        return 0;
    };
    let is_behind = |commit: LastCommit| commit.step > checkpoint.step;
    if let Ok(Some(_)) = context
        .ledger
        .last_commit()
        .map(|last| last.filter(|last| is_behind(*last)))
        && let Err(error) = context
            .ledger
            .record_rollback(checkpoint.step, checkpoint.manifest_digest())
    {
        tracing::error!(%error, "the ledger does not take the rollback");
    }
    checkpoint.step
}

async fn attempt(
    context: &ProcessContext,
    owner: &str,
    at_least: u64,
) -> Result<Option<u64>, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let seen = context.ledger.epoch().map_err(|e| text(&e))?.max(at_least);
    let epoch = if context.run.is_static_election() {
        seen + 1
    } else {
        let next = |latest: Option<&Lease>| latest.map_or(0, |lease| lease.epoch).max(seen) + 1;
        let waiting = format!("an epoch above {seen} can only be won in the store");
        context.store_health.waiting(Some(waiting));
        let lease = || async {
            let latest = context.store.latest_lease(seen).await?;
            // A request that was answered by a time-out may have been done.
            if let Some(latest) = latest.as_ref().filter(|lease| lease.owner == owner) {
                return Ok::<_, StoreError>(Some(latest.epoch));
            }
            let epoch = next(latest.as_ref());
            let won = context.store.take_lease(epoch, owner).await?;
            Ok(won.then_some(epoch))
        };
        let won = patiently(context, Access::Write, lease).await;
        let Some(epoch) = won.map_err(|e| text(&e))? else {
            return Ok(None);
        };
        epoch
    };
    context.ledger.see_epoch(epoch).map_err(|e| text(&e))?;
    Ok(Some(epoch))
}
