//! Stores to run the suite against, and real servers.

pub(crate) mod servers;

use std::collections::BTreeMap;
use std::sync::Arc;

use everstep_store::{
    BlockState, CheckpointManifest, CheckpointObject, Digest, RunIdentity, RunStore,
};
use futures::TryStreamExt;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, ObjectStoreExt};

/// A store of some kind, and a way to look at it and damage it behind the crate's back.
pub(crate) struct Fixture {
    pub(crate) url: String,
    pub(crate) options: BTreeMap<String, String>,
    pub(crate) raw: Arc<dyn ObjectStore>,
}

impl Fixture {
    pub(crate) fn file(dir: &std::path::Path) -> Self {
        let raw = Arc::new(LocalFileSystem::new_with_prefix(dir).unwrap());
        Self {
            url: format!("file://{}", dir.display()),
            options: BTreeMap::new(),
            raw,
        }
    }

    pub(crate) fn s3(bucket: &str, options: BTreeMap<String, String>) -> Self {
        let url = format!("s3://{bucket}");
        // Opening a store also installs the crypto provider that the raw client below needs.
        RunStore::open_with(&url, "any", &options).unwrap();
        let mut builder = AmazonS3Builder::new().with_bucket_name(bucket);
        for (key, value) in &options {
            builder = builder.with_config(key.to_ascii_lowercase().parse().unwrap(), value);
        }
        Self {
            url,
            options,
            raw: Arc::new(builder.build().unwrap()),
        }
    }

    pub(crate) fn azure(container: &str, options: BTreeMap<String, String>) -> Self {
        let url = format!("az://{container}/below");
        RunStore::open_with(&url, "any", &options).unwrap();
        let mut builder = MicrosoftAzureBuilder::new().with_container_name(container);
        for (key, value) in &options {
            builder = builder.with_config(key.to_ascii_lowercase().parse().unwrap(), value);
        }
        Self {
            url,
            options,
            raw: Arc::new(PrefixStore::new(builder.build().unwrap(), "below")),
        }
    }

    pub(crate) fn open(&self, run: &str) -> RunStore {
        RunStore::open_with(&self.url, run, &self.options).unwrap()
    }

    /// Opens and creates the run.
    pub(crate) async fn run(&self, run: &str) -> RunStore {
        let store = self.open(run);
        store.put_run("seed = 7\n", &identity(run)).await.unwrap();
        store
    }

    pub(crate) async fn keys(&self, run: &str) -> Vec<String> {
        let listed: Vec<_> = self
            .raw
            .list(Some(&Path::from(run)))
            .try_collect()
            .await
            .unwrap();
        let mut keys: Vec<String> = listed
            .into_iter()
            .map(|meta| meta.location.to_string())
            .collect();
        keys.sort();
        keys
    }

    /// Replaces the bytes of an object of `run`.
    pub(crate) async fn tamper(&self, run: &str, key: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let path = Path::from(format!("{run}/{key}"));
        let mut bytes = self
            .raw
            .get(&path)
            .await
            .unwrap()
            .bytes()
            .await
            .unwrap()
            .to_vec();
        change(&mut bytes);
        self.raw.put(&path, bytes.into()).await.unwrap();
    }

    pub(crate) async fn remove(&self, run: &str, key: &str) {
        self.raw
            .delete(&Path::from(format!("{run}/{key}")))
            .await
            .unwrap();
    }
}

pub(crate) fn identity(run: &str) -> RunIdentity {
    RunIdentity {
        run: run.to_owned(),
        seed: 7,
        configuration: Digest::of(b"configuration"),
        dataset: Digest::of(b"dataset"),
        tokenizer: Digest::of(b"tokenizer"),
        layout: Digest::of(b"layout"),
        determinism: "strict".to_owned(),
        environment: BTreeMap::from([("device".to_owned(), "cpu".to_owned())]),
    }
}

/// Blocks of a given length whose values depend on the step.
pub(crate) fn blocks(step: u64, ids: std::ops::Range<u32>, len: usize) -> Vec<BlockState> {
    let values = |block: u32, part: u32| -> Vec<f32> {
        (0..len)
            .map(|i| (step as f32) + (block * 4 + part) as f32 / 64.0 + i as f32)
            .collect()
    };
    ids.map(|block| BlockState {
        block,
        param: values(block, 0),
        m: values(block, 1),
        v: values(block, 2),
        // Some blocks have a mean, and some have none.
        ema: if block % 2 == 1 {
            values(block, 3)
        } else {
            Vec::new()
        },
        ..BlockState::default()
    })
    .collect()
}

pub(crate) fn manifest(
    run: &str,
    step: u64,
    num_blocks: u32,
    objects: Vec<CheckpointObject>,
) -> CheckpointManifest {
    let metadata = BTreeMap::from([("tokens".to_owned(), "12".to_owned())]);
    CheckpointManifest::new(step, &identity(run), num_blocks, objects, metadata).unwrap()
}

/// Writes and commits a checkpoint of six small blocks in two objects.
pub(crate) async fn checkpoint(store: &RunStore, step: u64) -> CheckpointManifest {
    let a = store
        .put_blocks(step, "shard-0", &blocks(step, 0..4, 100))
        .await
        .unwrap();
    let b = store
        .put_blocks(step, "shard-1", &blocks(step, 4..6, 100))
        .await
        .unwrap();
    let manifest = manifest(store.name(), step, 6, vec![a, b]);
    store.commit(&manifest).await.unwrap();
    manifest
}
