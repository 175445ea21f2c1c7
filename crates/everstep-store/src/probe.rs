//! Does the store honour create-if-absent? Some S3 servers ignore it, some race.

use futures::future::try_join_all;

use crate::error::StoreError;
use crate::lease::Lease;
use crate::run_store::{RunStore, nonce};

const RACERS: usize = 16;
const ROUNDS: usize = 8;

/// What [`RunStore::probe_create_if_absent`] saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeReport {
    /// Writers that raced for one key.
    pub racers: usize,
    /// Winners of each round; all must be 1.
    pub winners: Vec<usize>,
    /// Why the store cannot decide elections; `None` if it can.
    pub refusal: Option<String>,
}

impl ProbeReport {
    /// Ok if leaders may be elected through the store.
    ///
    /// # Errors
    /// [`StoreError::ElectionUnsupported`] with the reason.
    pub fn require(&self) -> Result<(), StoreError> {
        match &self.refusal {
            None => Ok(()),
            Some(reason) => Err(StoreError::ElectionUnsupported {
                reason: reason.clone(),
            }),
        }
    }
}

impl RunStore {
    /// Tries create-if-absent, in sequence and in 8 races of 16 writers; removes what it wrote.
    ///
    /// # Errors
    /// [`StoreError::Io`] if the store fails for another reason than lacking the feature.
    pub async fn probe_create_if_absent(&self) -> Result<ProbeReport, StoreError> {
        let folder = format!("probe-{}", nonce());
        let mut keys = vec![format!("{folder}/sequence")];
        keys.extend((0..ROUNDS).map(|round| format!("{folder}/race-{round}")));
        let result = self.probe(&keys).await;
        for key in &keys {
            self.delete(key).await?;
        }
        if let Some(root) = &self.backend.folder {
            // Only tidiness: an empty folder does no harm.
            let _ = tokio::fs::remove_dir(root.join(&folder)).await;
        }
        match result {
            Err(StoreError::Io { source, .. })
                if matches!(
                    *source,
                    object_store::Error::NotImplemented { .. }
                        | object_store::Error::NotSupported { .. }
                ) =>
            {
                let refusal = Some(format!("the store has no create-if-absent ({source})"));
                Ok(ProbeReport {
                    racers: RACERS,
                    winners: Vec::new(),
                    refusal,
                })
            }
            other => other,
        }
    }

    async fn probe(&self, keys: &[String]) -> Result<ProbeReport, StoreError> {
        let mut report = ProbeReport {
            racers: RACERS,
            winners: Vec::new(),
            refusal: None,
        };
        let mut refuse = |reason: String| report.refusal.get_or_insert(reason).clone();
        let [first, second] = [claimant(0), claimant(1)];
        if !self.claim(&keys[0], &first).await? {
            refuse("a new object could not be created".to_owned());
        } else if self.claim(&keys[0], &second).await? {
            refuse("an existing object was created a second time".to_owned());
        } else if self.document(&keys[0]).await?.as_ref() != Some(&first) {
            refuse("a refused creation changed the object".to_owned());
        }
        let mut winners = Vec::with_capacity(ROUNDS);
        for (round, key) in keys[1..].iter().enumerate() {
            let claims: Vec<Lease> = (0..RACERS as u64).map(claimant).collect();
            let won = try_join_all(claims.iter().map(|claim| self.claim(key, claim))).await?;
            // Where writers overwrite each other, what is left may be a piece of each.
            let there: Option<Lease> = match self.document(key).await {
                Err(StoreError::Document { .. }) => None,
                other => other?,
            };
            let winning: Vec<&Lease> = claims
                .iter()
                .zip(&won)
                .filter(|(_, won)| **won)
                .map(|(claim, _)| claim)
                .collect();
            winners.push(winning.len());
            if winning.len() != 1 {
                refuse(format!(
                    "{} of {RACERS} writers created the same object at once (round {})",
                    winning.len(),
                    round + 1
                ));
            } else if there.as_ref() != Some(winning[0]) {
                refuse("the object holds something else than its winner wrote".to_owned());
            }
        }
        report.winners = winners;
        Ok(report)
    }
}

fn claimant(number: u64) -> Lease {
    Lease {
        epoch: number,
        owner: nonce(),
    }
}
