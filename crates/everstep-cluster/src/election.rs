//! Who leads: an epoch is won by creating its lease in the object store, or, in a static election, by counting in the ledger.

use std::time::Duration;

use everstep_store::LatestIntact;
use everstep_telemetry::Event;

use crate::process::ProcessContext;

const RETRY: Duration = Duration::from_millis(300);

/// Wins the next free epoch above `at_least`, however long the store takes, and finds the newest intact checkpoint.
///
/// Returns the epoch and the checkpoint's version (0: none, initial weights).
pub(crate) async fn win(context: &ProcessContext, owner: &str, at_least: u64) -> (u64, u64) {
    let epoch = loop {
        match attempt(context, owner, at_least).await {
            Ok(Some(epoch)) => break epoch,
            Ok(None) => tracing::info!("the epoch went to another coordinator"),
            Err(error) => tracing::warn!(error, "no election now; trying again"),
        }
        tokio::time::sleep(RETRY).await;
    };
    let checkpoint = loop {
        match context.store.latest_intact().await {
            Ok(LatestIntact {
                checkpoint,
                damaged,
            }) => {
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
                break checkpoint.map_or(0, |checkpoint| checkpoint.step);
            }
            Err(error) => {
                tracing::warn!(%error, "checkpoints cannot be listed now; trying again");
                tokio::time::sleep(RETRY).await;
            }
        }
    };
    (epoch, checkpoint)
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
        let latest = context
            .store
            .latest_lease()
            .await
            .map_err(|e| text(&e))?
            .map_or(0, |lease| lease.epoch);
        let epoch = latest.max(seen) + 1;
        if !context
            .store
            .take_lease(epoch, owner)
            .await
            .map_err(|e| text(&e))?
        {
            return Ok(None);
        }
        epoch
    };
    context.ledger.see_epoch(epoch).map_err(|e| text(&e))?;
    Ok(Some(epoch))
}
