//! Random histories of one program against a model, and races of two programs, each repeatable from its seed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt, TryStreamExt};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult,
};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::{BlockState, Commit, CopyProgress, Retention, RunIdentity};

const NUM_BLOCKS: u32 = 4;
const RACES: u64 = 400;

type Objects = std::sync::Arc<dyn ObjectStore>;

/// What each block holds.
type Values = [u8; NUM_BLOCKS as usize];

fn state(values: &Values) -> Vec<BlockState> {
    let block = |(block, value): (u32, &u8)| BlockState {
        block,
        param: vec![f32::from(*value); 200],
        m: vec![block as f32; 200],
        v: vec![],
        ..BlockState::default()
    };
    (0..).zip(values).map(block).collect()
}

/// A program of its own: it knows nothing of what others have verified, and waits for nobody.
async fn program(objects: &Objects) -> RunStore {
    let store = RunStore::over(objects.clone(), "r");
    store.put_run("", &RunIdentity::any()).await.unwrap();
    store
}

fn manifest_of(step: u64, objects: Vec<CheckpointObject>) -> CheckpointManifest {
    CheckpointManifest::new(
        step,
        &RunIdentity::any(),
        NUM_BLOCKS,
        objects,
        BTreeMap::new(),
    )
    .unwrap()
}

/// Two writers write what changed.
async fn put(store: &RunStore, step: u64, values: &Values, cut: usize) -> CheckpointManifest {
    let state = state(values);
    let mut objects = Vec::new();
    for (writer, part) in [("a", &state[..cut]), ("b", &state[cut..])] {
        if !part.is_empty() {
            objects.extend(store.put_changed(step, writer, part).await.unwrap());
        }
    }
    manifest_of(step, objects)
}

async fn put_full(store: &RunStore, step: u64, values: &Values) -> CheckpointManifest {
    manifest_of(
        step,
        vec![
            store
                .put_blocks(step, "full", &state(values))
                .await
                .unwrap(),
        ],
    )
}

async fn load(store: &RunStore, step: u64) -> Vec<BlockState> {
    let all: Vec<u32> = (0..NUM_BLOCKS).collect();
    store.load_blocks(step, &all).await.unwrap()
}

#[derive(Clone, Debug)]
enum Operation {
    /// Each block changes if its flag is set; then a checkpoint is written by two writers.
    Commit([bool; NUM_BLOCKS as usize], usize),
    /// The same in full.
    CommitFull([bool; NUM_BLOCKS as usize]),
    /// Something of the next step is written and never committed.
    Abandon(usize),
    Prune(usize, Option<u64>),
    Discard(usize),
    Pin(usize),
    /// A byte of an object flips.
    Damage(usize, usize),
    /// All checkpoints are verified, and what is damaged is quarantined.
    Scrub,
    Copy,
}

fn operation() -> impl Strategy<Value = Operation> {
    let changed = || any::<[bool; NUM_BLOCKS as usize]>();
    let at = || 0..64usize;
    prop_oneof![
        6 => (changed(), 0..=NUM_BLOCKS as usize).prop_map(|(c, cut)| Operation::Commit(c, cut)),
        1 => changed().prop_map(Operation::CommitFull),
        1 => (0..=NUM_BLOCKS as usize).prop_map(Operation::Abandon),
        3 => (1..4usize, prop::option::of(1..4u64)).prop_map(|(k, e)| Operation::Prune(k, e)),
        1 => at().prop_map(Operation::Discard),
        1 => at().prop_map(Operation::Pin),
        1 => (at(), 0..500usize).prop_map(|(object, byte)| Operation::Damage(object, byte)),
        2 => Just(Operation::Scrub),
        1 => Just(Operation::Copy),
    ]
}

/// What must be there.
#[derive(Default)]
struct Model {
    values: Values,
    step: u64,
    committed: BTreeMap<u64, (Values, CheckpointManifest)>,
    damaged: BTreeSet<String>,
    quarantined: BTreeSet<u64>,
    shared: usize,
}

impl Model {
    fn step_at(&self, at: usize) -> Option<u64> {
        let at = at % self.committed.len().max(1);
        self.committed.keys().copied().nth(at)
    }

    fn is_damaged(&self, step: u64) -> bool {
        let objects = &self.committed[&step].1.objects;
        objects
            .iter()
            .any(|object| self.damaged.contains(&object.key))
    }

    fn named(&self) -> BTreeSet<String> {
        let manifests = self.committed.values().map(|(_, manifest)| manifest);
        let keys = manifests.flat_map(|manifest| &manifest.objects);
        keys.map(|object| object.key.clone()).collect()
    }

    fn remove(&mut self, step: u64) {
        self.committed.remove(&step);
        self.quarantined.remove(&step);
    }

    async fn run(&mut self, operation: &Operation, objects: &Objects) {
        let store = program(objects).await;
        match operation {
            Operation::Commit(changed, _) | Operation::CommitFull(changed) => {
                self.step += 1;
                for (value, _) in self.values.iter_mut().zip(changed).filter(|(_, c)| **c) {
                    *value = value.wrapping_add(1);
                }
                let manifest = match operation {
                    Operation::Commit(_, cut) => put(&store, self.step, &self.values, *cut).await,
                    _ => put_full(&store, self.step, &self.values).await,
                };
                self.shared += manifest.shared_objects().count();
                assert_eq!(store.commit(&manifest).await.unwrap(), Commit::Created);
                self.committed.insert(self.step, (self.values, manifest));
                // Nothing that is damaged was shared, whether or not anybody had noticed.
                assert!(!self.is_damaged(self.step));
            }
            Operation::Abandon(cut) => {
                put(&store, self.step + 1, &self.values, *cut).await;
                self.step += 1;
            }
            Operation::Prune(last, every_steps) => {
                let retention = Retention {
                    last: *last,
                    every_steps: *every_steps,
                    best: 0,
                };
                let plan = store.plan_prune(&retention).await.unwrap();
                let before = store.listed_steps().await.unwrap();
                let report = store.carry_out(&plan).await.unwrap();
                for step in &report.removed {
                    self.remove(*step);
                }
                // What was planned is what went.
                let size = |steps: BTreeMap<u64, crate::listing::ListedStep>| -> u64 {
                    steps.values().map(crate::listing::ListedStep::bytes).sum()
                };
                let after = store.listed_steps().await.unwrap();
                assert_eq!(size(before) - size(after), plan.bytes());
            }
            Operation::Discard(at) => {
                if let Some(step) = self.step_at(*at) {
                    store.discard(step).await.unwrap();
                    self.committed.remove(&step);
                }
            }
            Operation::Pin(at) => {
                if let Some(step) = self.step_at(*at) {
                    store.pin(step).await.unwrap();
                }
            }
            Operation::Damage(at, byte) => {
                let named = self.named();
                let Some(key) = named.iter().nth(at % named.len().max(1)) else {
                    return;
                };
                if self.damaged.insert(key.clone()) {
                    let path = Path::from(key.as_str());
                    let bytes = objects.get(&path).await.unwrap().bytes().await.unwrap();
                    let mut bytes = bytes.to_vec();
                    bytes[*byte] ^= 1;
                    objects.put(&path, bytes.into()).await.unwrap();
                }
            }
            Operation::Scrub => {
                for step in self.committed.keys().copied().collect::<Vec<u64>>() {
                    let damage = store.verify(step).await.unwrap();
                    assert_eq!(!damage.is_empty(), self.is_damaged(step), "step {step}");
                    if !damage.is_empty() {
                        store
                            .quarantine_checkpoint(step, &damage, "now")
                            .await
                            .unwrap();
                        self.quarantined.insert(step);
                    }
                }
            }
            Operation::Copy => {
                let target: Objects = std::sync::Arc::new(InMemory::new());
                let to = RunStore::over(target.clone(), "r");
                let progress = CopyProgress::default();
                let report = store.copy_to(&to, None, &progress).await.unwrap();
                let intact: Vec<u64> = self.intact().collect();
                assert_eq!(report.copied, intact);
                for step in intact {
                    assert_eq!(load(&to, step).await, state(&self.committed[&step].0));
                }
            }
        }
    }

    fn intact(&self) -> impl Iterator<Item = u64> {
        let steps = self.committed.keys().copied();
        steps.filter(|step| !self.is_damaged(*step) && !self.quarantined.contains(step))
    }

    async fn check(&self, objects: &Objects) {
        let store = program(objects).await;
        let committed: Vec<u64> = self.committed.keys().copied().collect();
        assert_eq!(store.committed_steps().await.unwrap(), committed);
        for (step, (values, manifest)) in &self.committed {
            assert_eq!(&store.load_manifest(*step).await.unwrap(), manifest);
            if !self.is_damaged(*step) {
                assert_eq!(load(&store, *step).await, state(values), "step {step}");
            }
        }
        let newest = store.latest_intact(&[]).await.unwrap().checkpoint;
        assert_eq!(newest.map(|manifest| manifest.step), self.intact().last());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn every_checkpoint_that_stays_comes_back_and_nothing_else_does(
        operations in vec(operation(), 1..24),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let objects: Objects = std::sync::Arc::new(InMemory::new());
            let mut model = Model::default();
            for operation in &operations {
                model.run(operation, &objects).await;
                model.check(&objects).await;
            }
            // A last pruning with one more checkpoint leaves what is named and nothing else.
            model.run(&Operation::CommitFull([true; 4]), &objects).await;
            model.run(&Operation::Prune(2, None), &objects).await;
            model.check(&objects).await;
            let store = program(&objects).await;
            let steps = store.listed_steps().await.unwrap();
            let files = steps.values().flat_map(|listed| &listed.files);
            let left: BTreeSet<String> = files
                .map(|file| file.key.clone())
                .filter(|key| !key.ends_with("MANIFEST.json"))
                .collect();
            assert_eq!(left, model.named());
        });
    }
}

/// Lets others go first before each request, as often as its seed says.
struct Yielding {
    inner: Objects,
    draw: AtomicU64,
}

impl Yielding {
    /// SplitMix64.
    fn draw(&self) -> u64 {
        let mut z = self
            .draw
            .fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    async fn give_way(&self) {
        for _ in 0..self.draw() % 12 {
            tokio::task::yield_now().await;
        }
    }
}

impl fmt::Debug for Yielding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Yielding")
    }
}

impl fmt::Display for Yielding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Yielding")
    }
}

#[async_trait]
impl ObjectStore for Yielding {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        self.give_way().await;
        self.inner.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(
        &self,
        location: &Path,
        options: GetOptions,
    ) -> object_store::Result<GetResult> {
        self.give_way().await;
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        let yields = self.draw() % 12;
        let give_way = async move {
            for _ in 0..yields {
                tokio::task::yield_now().await;
            }
        };
        let inner = self.inner.clone();
        give_way
            .map(move |()| inner.delete_stream(locations))
            .flatten_stream()
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        let yields = self.draw() % 12;
        let (inner, prefix) = (self.inner.clone(), prefix.cloned());
        let listed = async move {
            for _ in 0..yields {
                tokio::task::yield_now().await;
            }
            inner.list(prefix.as_ref()).try_collect::<Vec<_>>().await
        };
        listed
            .map(|listed| match listed {
                Ok(all) => all.into_iter().map(Ok).collect(),
                Err(error) => vec![Err(error)],
            })
            .map(futures::stream::iter)
            .flatten_stream()
            .boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(
        &self,
        from: &Path,
        to: &Path,
        options: CopyOptions,
    ) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

fn values(step: u64) -> Values {
    [1, 1, 1, step as u8]
}

/// A trainer that commits steps 2 to 5, of which three blocks never change; what is refused is written in full. Says how often that was.
async fn train(store: &RunStore) -> usize {
    let mut refused = 0;
    for step in 2..6 {
        let manifest = put(store, step, &values(step), 4).await;
        match store.commit(&manifest).await {
            Ok(outcome) => assert_eq!(outcome, Commit::Created),
            Err(StoreError::Damaged(_)) => {
                refused += 1;
                let full = put_full(store, step, &values(step)).await;
                assert_eq!(store.commit(&full).await.unwrap(), Commit::Created);
            }
            Err(error) => panic!("{error}"),
        }
    }
    refused
}

/// Another program that prunes what the trainer builds upon.
async fn remove(store: &RunStore, seed: u64) {
    for round in 0..4 {
        if (seed + round).is_multiple_of(3) {
            let steps = store.checkpoints().await.unwrap();
            if let [old @ .., _] = steps.as_slice() {
                for step in old {
                    store.discard(*step).await.unwrap();
                }
            }
        } else {
            store.prune(1).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_commit_and_a_removal_in_two_programs_never_miss_each_other() {
    let (mut refused, mut shared) = (0, 0);
    for seed in 0..RACES {
        let objects: Objects = std::sync::Arc::new(InMemory::new());
        let first = put_full(&program(&objects).await, 1, &values(1)).await;
        program(&objects).await.commit(&first).await.unwrap();
        let yielding = |seed: u64| -> Objects {
            let draw = AtomicU64::new(seed.wrapping_mul(0x2545_f491_4f6c_dd1d));
            std::sync::Arc::new(Yielding {
                inner: objects.clone(),
                draw,
            })
        };
        let trainer = program(&yielding(2 * seed + 1)).await;
        let remover = program(&yielding(2 * seed + 2)).await;
        let (times, ()) = futures::join!(train(&trainer), remove(&remover, seed));
        refused += times;

        let store = program(&objects).await;
        let left = store.checkpoints().await.unwrap();
        // Nobody removes the newest one.
        assert_eq!(left.last(), Some(&5), "seed {seed}: {left:?}");
        for step in left {
            let manifest = store.load_manifest(step).await.unwrap();
            shared += manifest.shared_objects().count();
            assert_eq!(
                store.verify(step).await.unwrap(),
                [],
                "seed {seed}, step {step}"
            );
            assert_eq!(
                load(&store, step).await,
                state(&values(step)),
                "seed {seed}"
            );
        }
    }
    assert!(refused > 10 && shared > 10, "{refused} {shared}");
}
