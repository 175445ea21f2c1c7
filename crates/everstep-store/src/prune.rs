//! Removing checkpoints: the manifest goes first, so that what is half removed is no checkpoint.
//!
//! What goes is planned first and can be looked at before it is carried out. An object goes with the last manifest that names it, which
//! need not be that of its own folder.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use futures::{FutureExt, StreamExt, TryStreamExt};

use crate::error::StoreError;
use crate::listing::{ListedFile, ListedStep};
use crate::manifest::{CheckpointManifest, CheckpointObject, folder, manifest_key};
use crate::retention::{KeepReason, Retention, RetentionInfo};
use crate::run_store::RunStore;

/// Manifests read in parallel.
const MANIFESTS_IN_FLIGHT_MAX: usize = 16;

/// What [`RunStore::plan_prune`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrunePlan {
    /// The committed steps that stay, and why.
    pub keep: BTreeMap<u64, BTreeSet<KeepReason>>,
    /// The committed steps that go. Objects that others share stay.
    pub remove: BTreeMap<u64, Removal>,
    /// Steps whose uncommitted objects go: left by uploads that died.
    pub garbage: BTreeMap<u64, Removal>,
    /// Steps with uncommitted objects that stay, since they may be on their way to a commit.
    pub live: BTreeSet<u64>,
    /// When the newest manifest was written: what is younger may be on its way.
    newest_written: Option<SystemTime>,
}

impl PrunePlan {
    /// Size of everything that goes.
    pub fn bytes(&self) -> u64 {
        let all = self.remove.values().chain(self.garbage.values());
        all.map(|removal| removal.bytes).sum()
    }
}

/// What goes of one step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removal {
    /// Keys inside the run; the manifest, if it goes, is the first.
    pub keys: Vec<String>,
    /// Size of all of them.
    pub bytes: u64,
}

impl Removal {
    fn of<'a>(step: u64, files: impl Iterator<Item = &'a ListedFile>) -> Self {
        let mut removal = Self::default();
        let manifest = manifest_key(step);
        for file in files {
            removal.bytes += file.bytes;
            let at = if file.key == manifest {
                0
            } else {
                removal.keys.len()
            };
            removal.keys.insert(at, file.key.clone());
        }
        removal
    }
}

/// What [`RunStore::prune`] removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PruneReport {
    /// Committed steps that are gone, ascending.
    pub removed: Vec<u64>,
    /// Steps older than the newest committed one from which uncommitted objects were removed, ascending.
    pub garbage: Vec<u64>,
}

impl RunStore {
    /// Keeps the newest `keep` committed checkpoints (at least one) and pinned ones, and removes older ones and garbage.
    ///
    /// # Errors
    /// As [`RunStore::plan_prune`] and [`RunStore::carry_out`].
    pub async fn prune(&self, keep: usize) -> Result<PruneReport, StoreError> {
        let plan = self.plan_prune(&Retention::last(keep)).await?;
        self.carry_out(&plan).await
    }

    /// Says what [`RunStore::carry_out`] would remove; changes nothing.
    ///
    /// Checkpoints that are quarantined, or whose manifest cannot be used, count as damaged. Garbage are objects below the
    /// newest committed step that no manifest names. A step of which something was written after the newest manifest may be on
    /// its way still and is left alone, and so is whatever lies above. What a manifest names that cannot be read is not known: it keeps
    /// only its own folder.
    ///
    /// # Errors
    /// [`StoreError::Io`]; [`StoreError::NewerVersion`] if a newer program has written here: it knows what is needed.
    pub async fn plan_prune(&self, retention: &Retention) -> Result<PrunePlan, StoreError> {
        let mut plan = PrunePlan::default();
        let steps = self.listed_steps().await?;
        let committed: Vec<u64> = steps
            .iter()
            .filter(|(_, listed)| listed.manifest().is_some())
            .map(|(step, _)| *step)
            .collect();
        let Some(&newest) = committed.last() else {
            plan.live.extend(steps.keys());
            return Ok(plan);
        };
        let newest_written = steps[&newest].manifest().map(|file| file.modified);
        plan.newest_written = newest_written;
        let manifests = self.readable_manifests(&committed).await?;
        let pinned = self.pinned_steps().await?;
        let quarantined = self.quarantined_steps().await?;
        let infos: Vec<RetentionInfo> = committed
            .iter()
            .map(|step| RetentionInfo {
                step: *step,
                evaluation_loss: manifests.get(step).and_then(|m| m.evaluation_loss()),
                pinned: pinned.contains(step),
                damaged: quarantined.contains(step) || !manifests.contains_key(step),
            })
            .collect();
        plan.keep = retention.kept(&infos);
        let named: BTreeSet<&str> = manifests
            .iter()
            .filter(|(step, _)| plan.keep.contains_key(step))
            .flat_map(|(_, manifest)| &manifest.objects)
            .map(|object| object.key.as_str())
            .collect();
        for (&step, listed) in &steps {
            let is_committed = listed.manifest().is_some();
            let unnamed = |file: &&ListedFile| !named.contains(file.key.as_str());
            if is_committed && !plan.keep.contains_key(&step) {
                let removal = Removal::of(step, listed.files.iter().filter(unnamed));
                plan.remove.insert(step, removal);
                continue;
            }
            if is_committed && !manifests.contains_key(&step) {
                // Without a readable manifest nothing can be told apart.
                continue;
            }
            let manifest = manifest_key(step);
            let left_over = |file: &&ListedFile| unnamed(file) && file.key != manifest;
            let removal = Removal::of(step, listed.files.iter().filter(left_over));
            if removal.keys.is_empty() {
                continue;
            }
            if step > newest || is_live(listed, is_committed, newest_written) {
                plan.live.insert(step);
            } else {
                plan.garbage.insert(step, removal);
            }
        }
        Ok(plan)
    }

    /// Removes what a plan says, but for objects that have been named since. Only the leader may do that, or somebody when there is none.
    ///
    /// # Errors
    /// [`StoreError::Io`]; what was removed until then stays removed, and pruning again goes on. [`StoreError::NewerVersion`].
    pub async fn carry_out(&self, plan: &PrunePlan) -> Result<PruneReport, StoreError> {
        let _no_commits = self.removals.write().await;
        // All manifests first, then a look at who names what: a commit that this look misses finds them gone.
        for step in plan.remove.keys() {
            self.delete(&manifest_key(*step)).await?;
        }
        let staying = self.committed_steps().await?;
        let named = self.named_by(&staying).await?;
        let mut gone: BTreeSet<&str> = BTreeSet::new();
        for (step, removal) in plan.remove.iter().chain(&plan.garbage) {
            let manifest = manifest_key(*step);
            for key in &removal.keys {
                if *key != manifest && !named.contains(key) {
                    self.delete(key).await?;
                    gone.insert(key);
                }
            }
            if plan.remove.contains_key(step) {
                // They are about a checkpoint that is no more.
                self.unpin(*step).await?;
                self.lift_checkpoint(*step).await?;
            }
        }
        if !gone.is_empty() {
            // A commit that died before it could take its manifest back.
            let mut new = self.committed_steps().await?;
            new.retain(|step| !staying.contains(step));
            for (step, manifest) in self.readable_manifests(&new).await? {
                let is_gone = |object: &CheckpointObject| gone.contains(object.key.as_str());
                if manifest.objects.iter().any(is_gone) {
                    self.delete(&manifest_key(step)).await?;
                }
            }
        }
        let mut report = PruneReport {
            removed: plan.remove.keys().copied().collect(),
            garbage: plan.garbage.keys().copied().collect(),
        };
        if let Some(newest) = plan.keep.keys().next_back() {
            self.remove_staging(*newest, plan.newest_written, &mut report)
                .await;
        }
        Ok(report)
    }

    /// Removes one checkpoint, committed or not, but for objects that others share.
    ///
    /// # Errors
    /// [`StoreError::Io`]; discarding again goes on. [`StoreError::NewerVersion`].
    pub async fn discard(&self, step: u64) -> Result<(), StoreError> {
        let _no_commits = self.removals.write().await;
        self.delete(&manifest_key(step)).await?;
        let staying = self.committed_steps().await?;
        let named = self.named_by(&staying).await?;
        let listed = self.listed_steps().await?.remove(&step).unwrap_or_default();
        let unnamed = |file: &&ListedFile| !named.contains(&file.key);
        for key in Removal::of(step, listed.files.iter().filter(unnamed)).keys {
            self.delete(&key).await?;
        }
        self.remove_folder(step, None).await;
        Ok(())
    }

    /// The manifests of `steps`, without those that are damaged.
    pub(crate) async fn readable_manifests(
        &self,
        steps: &[u64],
    ) -> Result<BTreeMap<u64, CheckpointManifest>, StoreError> {
        let read = |step: u64| {
            async move {
                let mut manifest = self.load_manifest(step).await;
                if matches!(manifest, Err(StoreError::Damaged(_))) {
                    manifest = self.load_manifest(step).await;
                }
                match manifest {
                    Ok(manifest) => Ok(Some((step, manifest))),
                    Err(StoreError::NoCheckpoint { .. } | StoreError::ForeignCheckpoint { .. }) => {
                        Ok(None)
                    }
                    Err(StoreError::Damaged(_)) => Ok(None),
                    Err(error) => Err(error),
                }
            }
            .boxed()
        };
        // Boxed and collected, so that the future of this method is `Send`.
        let reads: Vec<_> = steps.iter().copied().map(read).collect();
        futures::stream::iter(reads)
            .buffer_unordered(MANIFESTS_IN_FLIGHT_MAX)
            .try_filter_map(|read| std::future::ready(Ok(read)))
            .try_collect()
            .await
    }

    /// In a folder: removes the staging files of dead uploads, those that are not younger than `limit`, and then the folder, if nothing
    /// is left in it.
    async fn remove_folder(&self, step: u64, limit: Option<SystemTime>) {
        let Some(root) = &self.backend.folder else {
            return;
        };
        let path = root.join(folder(step));
        let Ok(mut files) = tokio::fs::read_dir(&path).await else {
            return;
        };
        while let Ok(Some(file)) = files.next_entry().await {
            let written = file.metadata().await.and_then(|file| file.modified());
            let is_dead = limit.is_none() || written.is_ok_and(|written| Some(written) <= limit);
            if is_dead && file.file_name().to_string_lossy().contains('#') {
                // Only tidiness: what cannot be removed now is tried again next time.
                let _ = tokio::fs::remove_file(file.path()).await;
            }
        }
        // Fails if it still holds something, and is right to.
        let _ = tokio::fs::remove_dir(&path).await;
    }

    /// In a folder, killed writers leave half-written staging files (`name#1`), which the store does not list.
    async fn remove_staging(
        &self,
        newest: u64,
        newest_written: Option<SystemTime>,
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
            self.remove_folder(step, newest_written).await;
            let is_gone = tokio::fs::metadata(entry.path()).await.is_err();
            if is_gone && !report.removed.contains(&step) && !report.garbage.contains(&step) {
                report.garbage.push(step);
            }
        }
        report.garbage.sort_unstable();
    }
}

/// Whether something of a step may be on its way still.
///
/// What lies beside a manifest is left over: its step is committed. Otherwise the newest of it counts: it is older than the newest
/// manifest if its writers are gone, or so late that a newer checkpoint has taken the place of theirs. Stores tell times in whole
/// seconds, so what is as old as the manifest counts as dead; if it was not, its commit finds that objects are missing and is none.
fn is_live(listed: &ListedStep, is_committed: bool, newest_written: Option<SystemTime>) -> bool {
    !is_committed && listed.modified() > newest_written
}
