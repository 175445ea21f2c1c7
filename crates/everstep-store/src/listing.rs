//! What lies below `checkpoints/`, as the store lists it, and what can be told from that.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use futures::TryStreamExt;
use object_store::ObjectMeta;
use object_store::path::Path;

use crate::error::{Damage, DamageReason, StoreError, io};
use crate::manifest::{CheckpointDigest, manifest_key, parse_key};
use crate::run_store::RunStore;

/// One object as the store lists it.
#[derive(Clone, Debug)]
pub(crate) struct ListedFile {
    pub(crate) key: String,
    pub(crate) bytes: u64,
    /// By the store's clock.
    pub(crate) modified: SystemTime,
}

/// What is there of one step, committed or not.
#[derive(Clone, Debug, Default)]
pub(crate) struct ListedStep {
    pub(crate) files: Vec<ListedFile>,
}

impl ListedStep {
    /// The manifest; without one the step is not committed.
    pub(crate) fn manifest(&self) -> Option<&ListedFile> {
        let is_manifest = |key: &str| parse_key(key).is_some_and(|(_, file)| file == MANIFEST);
        self.files.iter().find(|file| is_manifest(&file.key))
    }

    /// When the last of it was written.
    pub(crate) fn modified(&self) -> Option<SystemTime> {
        self.files.iter().map(|file| file.modified).max()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

const MANIFEST: &str = "MANIFEST.json";

/// A committed checkpoint, as far as it can be told without reading its objects.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckpointInfo {
    /// The step.
    pub step: u64,
    /// When the manifest was written, by the store's clock.
    pub committed: SystemTime,
    /// Size of all its objects, those too that it shares with older checkpoints.
    pub bytes: u64,
    /// Size of the objects that were written for it.
    pub new_bytes: u64,
    /// How many objects it has.
    pub num_objects: usize,
    /// Its digests; `None` if the manifest is damaged.
    pub digest: Option<CheckpointDigest>,
    /// The loss of its evaluation, if recorded.
    pub evaluation_loss: Option<f64>,
    /// Whether it is pinned.
    pub pinned: bool,
    /// Whether it is quarantined: nobody reads it.
    pub quarantined: bool,
    /// What is known to be damaged: what a list shows (a manifest that cannot be used; objects that are missing or of another size), and
    /// what it was quarantined for.
    pub damage: Vec<Damage>,
}

impl RunStore {
    /// Everything below `checkpoints/`, by step.
    pub(crate) async fn listed_steps(&self) -> Result<BTreeMap<u64, ListedStep>, StoreError> {
        let mut steps: BTreeMap<u64, ListedStep> = BTreeMap::new();
        let mut objects = self.small().list(Some(&Path::from("checkpoints")));
        while let Some(meta) = objects
            .try_next()
            .await
            .map_err(io("list", "checkpoints"))?
        {
            let key = meta.location.to_string();
            if let Some((step, _)) = parse_key(&key) {
                let file = ListedFile {
                    key,
                    bytes: meta.size,
                    modified: modified(&meta),
                };
                steps.entry(step).or_default().files.push(file);
            }
        }
        // If the folder went away meanwhile, the list is not whole.
        self.demand_folder("list")?;
        Ok(steps)
    }

    /// The steps that have a manifest, ascending, quarantined ones too.
    pub(crate) async fn committed_steps(&self) -> Result<Vec<u64>, StoreError> {
        let listed = self.listed_steps().await?;
        let committed = listed
            .iter()
            .filter(|(_, files)| files.manifest().is_some());
        Ok(committed.map(|(step, _)| *step).collect())
    }

    /// The numbers of `<folder>/<number>.json`.
    pub(crate) async fn listed_numbers(&self, folder: &str) -> Result<BTreeSet<u64>, StoreError> {
        let objects = self.small().list(Some(&Path::from(folder)));
        let number = |meta: ObjectMeta| {
            let key = meta.location.to_string();
            let digits = key
                .strip_prefix(folder)?
                .strip_prefix('/')?
                .strip_suffix(".json")?;
            let number: u64 = digits.parse().ok()?;
            (number.to_string() == digits).then_some(number)
        };
        let numbers = objects
            .try_filter_map(|meta| std::future::ready(Ok(number(meta))))
            .try_collect()
            .await
            .map_err(io("list", folder))?;
        self.demand_folder("list")?;
        Ok(numbers)
    }

    /// The committed checkpoints, ascending by step, quarantined ones too.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::NoRun`], [`StoreError::NewerVersion`].
    pub async fn list_checkpoints(&self) -> Result<Vec<CheckpointInfo>, StoreError> {
        self.existing_run().await?;
        let pinned = self.pinned_steps().await?;
        let quarantined = self.quarantined_steps().await?;
        let mut infos = Vec::new();
        let steps = self.listed_steps().await?;
        let files = steps.values().flat_map(|listed| &listed.files);
        let sizes: BTreeMap<&str, u64> =
            files.map(|file| (file.key.as_str(), file.bytes)).collect();
        for (&step, listed) in &steps {
            let Some(file) = listed.manifest() else {
                continue;
            };
            let mut info = CheckpointInfo {
                step,
                committed: file.modified,
                bytes: listed.bytes() - file.bytes,
                new_bytes: listed.bytes() - file.bytes,
                num_objects: listed.files.len() - 1,
                digest: None,
                evaluation_loss: None,
                pinned: pinned.contains(&step),
                quarantined: quarantined.contains(&step),
                damage: Vec::new(),
            };
            match self.load_manifest(step).await {
                Ok(manifest) => {
                    info.bytes = manifest.bytes();
                    info.new_bytes = manifest.new_bytes();
                    info.num_objects = manifest.objects.len();
                    info.digest = Some(manifest.digest);
                    info.evaluation_loss = manifest.evaluation_loss();
                    for object in &manifest.objects {
                        let reason = match sizes.get(object.key.as_str()) {
                            Some(&found) if found == object.bytes => continue,
                            Some(&found) => DamageReason::Size {
                                expected: object.bytes,
                                found,
                            },
                            None => DamageReason::Missing,
                        };
                        info.damage.push(Damage {
                            step,
                            object: object.key.clone(),
                            reason,
                        });
                    }
                }
                Err(StoreError::Damaged(damage)) => info.damage.push(*damage),
                // Removed since the list was made.
                Err(StoreError::NoCheckpoint { .. }) => continue,
                Err(error @ StoreError::ForeignCheckpoint { .. }) => info.damage.push(Damage {
                    step,
                    object: manifest_key(step),
                    reason: DamageReason::Manifest(error.to_string()),
                }),
                Err(error) => return Err(error),
            }
            if info.quarantined {
                info.damage.extend(self.quarantined_damage(step).await?);
            }
            infos.push(info);
        }
        Ok(infos)
    }
}

fn modified(meta: &ObjectMeta) -> SystemTime {
    let seconds = u64::try_from(meta.last_modified.timestamp()).unwrap_or(0);
    SystemTime::UNIX_EPOCH
        + Duration::new(
            seconds,
            meta.last_modified.timestamp_subsec_nanos() % 1_000_000_000,
        )
}
