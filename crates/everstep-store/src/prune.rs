//! Removing checkpoints: the manifest goes first, so that what is half removed is no checkpoint.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::StoreError;
use crate::manifest::{folder, manifest_key};
use crate::run_store::RunStore;

/// What [`RunStore::prune`] removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PruneReport {
    /// Committed steps that are gone, ascending.
    pub removed: Vec<u64>,
    /// Steps older than the newest committed one from which uncommitted objects were removed, ascending.
    pub garbage: Vec<u64>,
}

impl RunStore {
    /// Keeps the newest `keep` committed checkpoints (at least one), and removes older ones and garbage.
    ///
    /// Garbage are objects below the newest committed step that no manifest names. What is above it may be the next
    /// checkpoint and is left alone. Only the leader may prune. With `keep = 1` nothing is left to fall back to when
    /// the newest one turns out damaged.
    ///
    /// # Errors
    /// [`StoreError::Io`]; what was removed until then stays removed, and pruning again goes on.
    pub async fn prune(&self, keep: usize) -> Result<PruneReport, StoreError> {
        let mut report = PruneReport::default();
        let keys = self.checkpoint_keys().await?;
        let committed: Vec<u64> = keys
            .iter()
            .filter(|(step, keys)| keys.contains(&manifest_key(**step)))
            .map(|(step, _)| *step)
            .collect();
        let Some(&newest) = committed.last() else {
            return Ok(report);
        };
        let kept: BTreeSet<u64> = committed.iter().rev().take(keep.max(1)).copied().collect();
        for (&step, keys) in keys.range(..newest) {
            if kept.contains(&step) {
                if self.remove_unnamed(step, keys).await? {
                    report.garbage.push(step);
                }
                continue;
            }
            self.remove_step(step, keys).await?;
            let list = if committed.contains(&step) {
                &mut report.removed
            } else {
                &mut report.garbage
            };
            list.push(step);
        }
        self.remove_staging(newest, &keys, &mut report).await;
        Ok(report)
    }

    /// Removes one checkpoint, committed or not: a damaged one must go before its step can be committed again.
    ///
    /// # Errors
    /// [`StoreError::Io`]; discarding again goes on.
    pub async fn discard(&self, step: u64) -> Result<(), StoreError> {
        let keys = self
            .checkpoint_keys()
            .await?
            .remove(&step)
            .unwrap_or_default();
        self.remove_step(step, &keys).await
    }

    async fn remove_step(&self, step: u64, keys: &[String]) -> Result<(), StoreError> {
        let manifest = manifest_key(step);
        if keys.contains(&manifest) {
            self.delete(&manifest).await?;
        }
        for key in keys.iter().filter(|key| **key != manifest) {
            self.delete(key).await?;
        }
        self.remove_folder(step).await;
        Ok(())
    }

    /// Removes what an interrupted attempt left beside a committed checkpoint.
    async fn remove_unnamed(&self, step: u64, keys: &[String]) -> Result<bool, StoreError> {
        let manifest = match self.load_manifest(step).await {
            Ok(manifest) => manifest,
            // Without a readable manifest nothing can be told apart; a damaged checkpoint is kept for inspection.
            Err(StoreError::Damaged(_)) => return Ok(false),
            Err(error) => return Err(error),
        };
        let mut named: BTreeSet<&str> = manifest
            .objects
            .iter()
            .map(|object| object.key.as_str())
            .collect();
        let manifest = manifest_key(step);
        named.insert(&manifest);
        let mut any = false;
        for key in keys.iter().filter(|key| !named.contains(key.as_str())) {
            self.delete(key).await?;
            any = true;
        }
        Ok(any)
    }

    async fn remove_folder(&self, step: u64) {
        let Some(root) = &self.backend.folder else {
            return;
        };
        let path = root.join(folder(step));
        match tokio::fs::remove_dir_all(&path).await {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "a removed checkpoint's folder stays");
            }
            _ => {}
        }
    }

    /// In a folder, killed writers leave half-written staging files (`name#1`), which the store does not list.
    async fn remove_staging(
        &self,
        newest: u64,
        keys: &BTreeMap<u64, Vec<String>>,
        report: &mut PruneReport,
    ) {
        let Some(root) = &self.backend.folder else {
            return;
        };
        let Ok(mut steps) = tokio::fs::read_dir(root.join("checkpoints")).await else {
            return;
        };
        while let Ok(Some(entry)) = steps.next_entry().await {
            let name = entry.file_name().to_string_lossy().into_owned();
            let step = name
                .parse()
                .ok()
                .filter(|step: &u64| step.to_string() == name && *step < newest);
            let Some(step) = step else { continue };
            if !keys.contains_key(&step) {
                self.remove_folder(step).await;
                report.garbage.push(step);
                continue;
            }
            let Ok(mut files) = tokio::fs::read_dir(entry.path()).await else {
                continue;
            };
            while let Ok(Some(file)) = files.next_entry().await {
                if file.file_name().to_string_lossy().contains('#') {
                    // Only tidiness: what cannot be removed now is tried again next time.
                    let _ = tokio::fs::remove_file(file.path()).await;
                }
            }
        }
        report.garbage.sort_unstable();
    }
}
