//! What did not change is not sent again, and lives as long as somebody names it.

use everstep_store::{
    BlockState, CheckpointManifest, CheckpointObject, Commit, CopyProgress, Damage, DamageReason,
    Retention, RunStore, StoreError,
};

use crate::support::{Fixture, blocks, manifest};

const NUM_BLOCKS: u32 = 6;
const FROZEN: std::ops::Range<u32> = 0..4;
const TRAINED: std::ops::Range<u32> = 4..6;

/// The state of a run whose first blocks are frozen.
fn state(step: u64) -> Vec<BlockState> {
    [blocks(1, FROZEN, 100), blocks(step, TRAINED, 100)].concat()
}

async fn put(store: &RunStore, step: u64) -> Vec<CheckpointObject> {
    store.put_changed(step, "w", &state(step)).await.unwrap()
}

fn whole(store: &RunStore, step: u64, objects: &[CheckpointObject]) -> CheckpointManifest {
    manifest(store.name(), step, NUM_BLOCKS, objects.to_vec())
}

async fn commit(store: &RunStore, step: u64) -> CheckpointManifest {
    let manifest = whole(store, step, &put(store, step).await);
    assert_eq!(store.commit(&manifest).await.unwrap(), Commit::Created);
    manifest
}

async fn is_intact(store: &RunStore, step: u64) {
    assert_eq!(store.verify(step).await.unwrap(), [], "step {step}");
    let all: Vec<u32> = (0..NUM_BLOCKS).collect();
    assert_eq!(store.load_blocks(step, &all).await.unwrap(), state(step));
}

fn keys(objects: &[CheckpointObject]) -> Vec<String> {
    objects.iter().map(|object| object.key.clone()).collect()
}

pub(super) async fn unchanged_blocks_are_not_sent_again(fixture: &Fixture) {
    let store = fixture.run("share").await;
    let first = commit(&store, 10).await;
    assert_eq!(first.objects.len(), 1);
    assert_eq!(first.new_bytes(), first.bytes());
    // Four of the six blocks are worth keeping their object, so only two are sent.
    let second = commit(&store, 20).await;
    assert_eq!(keys(&second.objects)[0], first.objects[0].key);
    assert_eq!(second.objects.len(), 2);
    assert_eq!(second.shared_objects().count(), 1);
    assert!(second.new_bytes() < first.bytes() / 2);
    let third = commit(&store, 30).await;
    assert_eq!(third.objects[0].key, first.objects[0].key);
    for step in [10, 20, 30] {
        is_intact(&store, step).await;
    }
    // The digest does not say how it was written.
    let full = store.put_blocks(30, "w", &state(30)).await.unwrap();
    let full = whole(&store, 30, &[full]);
    assert_eq!(full.digest, third.digest);
    assert_eq!(store.commit(&full).await.unwrap(), Commit::AlreadyCommitted);

    let listed = store.list_checkpoints().await.unwrap();
    assert_eq!(listed[2].bytes, third.bytes());
    assert_eq!(listed[2].new_bytes, third.new_bytes());
    assert!(listed.iter().all(|info| info.damage.is_empty()));

    // The checkpoint that wrote the frozen blocks goes, and they stay.
    let plan = store.plan_prune(&Retention::last(2)).await.unwrap();
    assert_eq!(plan.remove[&10].keys, ["checkpoints/10/MANIFEST.json"]);
    assert_eq!(store.prune(1).await.unwrap().removed, [10, 20]);
    is_intact(&store, 30).await;
    assert!(matches!(
        store.verify(10).await,
        Err(StoreError::NoCheckpoint { step: 10 })
    ));
    commit(&store, 40).await;
    assert_eq!(store.prune(1).await.unwrap().removed, [30]);
    is_intact(&store, 40).await;

    // Where little of an object is needed, what did not change moves to an object of its own; then nobody names the first one.
    let thawed = [blocks(1, 0..2, 100), blocks(50, 2..6, 100)].concat();
    let objects = store.put_changed(50, "w", &thawed).await.unwrap();
    let ids = |object: &CheckpointObject| -> Vec<u32> {
        object.blocks.iter().map(|entry| entry.block).collect()
    };
    let all: Vec<Vec<u32>> = objects.iter().map(ids).collect();
    assert_eq!(all, [vec![0, 1], vec![2, 3, 4, 5]]);
    store.commit(&whole(&store, 50, &objects)).await.unwrap();
    assert_eq!(store.prune(1).await.unwrap().garbage, [10]);
    assert_eq!(store.verify(50).await.unwrap(), []);
    let keys = fixture.keys("share").await;
    assert!(
        keys.iter()
            .filter(|key| key.contains("checkpoints/"))
            .all(|key| key.contains("checkpoints/50/")),
        "{keys:?}"
    );
}

pub(super) async fn what_is_damaged_is_written_again(fixture: &Fixture) {
    let store = fixture.run("share-damage").await;
    let first = commit(&store, 10).await;
    commit(&store, 20).await;
    let shared = first.objects[0].key.clone();
    // Nobody knows yet: this program has read it, another one has not.
    fixture
        .tamper("share-damage", &shared, |bytes| bytes[1000] ^= 1)
        .await;
    assert_eq!(keys(&put(&store, 30).await)[0], shared);
    let other = fixture.open("share-damage");
    assert!(!keys(&put(&other, 30).await).contains(&shared));
    // It damages all that name it, and once that is known nobody names it any more.
    let damage = store.verify(20).await.unwrap();
    let named: Vec<&Damage> = damage.iter().collect();
    assert_eq!((named.len(), &named[0].object), (1, &shared));
    let time = "2026-01-01T00:00:00Z";
    let marked = store
        .quarantine_checkpoint(20, &damage, time)
        .await
        .unwrap();
    assert_eq!(marked, [10, 20].into());
    let stale = whole(&store, 30, &{
        let mut objects = vec![first.objects[0].clone()];
        objects[0].blocks.truncate(4);
        let trained = &state(30)[4..];
        objects.push(store.put_blocks(30, "w", trained).await.unwrap());
        objects
    });
    match store.commit(&stale).await.unwrap_err() {
        StoreError::Damaged(damage) => assert_eq!(damage.object, shared),
        error => panic!("{error}"),
    }
    let third = commit(&store, 30).await;
    assert!(!keys(&third.objects).contains(&shared));
    is_intact(&store, 30).await;
    assert_eq!(store.checkpoints().await.unwrap(), [30]);
    // Committing a step again in full makes it good.
    let full = store.put_blocks(20, "w", &state(20)).await.unwrap();
    let full = whole(&store, 20, &[full]);
    assert_eq!(store.commit(&full).await.unwrap(), Commit::Repaired);
    is_intact(&store, 20).await;
    assert_eq!(store.checkpoints().await.unwrap(), [20, 30]);
}

pub(super) async fn what_is_gone_is_not_committed(fixture: &Fixture) {
    let store = fixture.run("share-gone").await;
    commit(&store, 10).await;
    let objects = put(&store, 20).await;
    let manifest = whole(&store, 20, &objects);
    // Another program removes the base between the writing and the commit.
    let other = fixture.open("share-gone");
    other.discard(10).await.unwrap();
    match store.commit(&manifest).await.unwrap_err() {
        StoreError::Damaged(damage) => {
            assert_eq!(damage.object, objects[0].key);
            assert_eq!(damage.reason, DamageReason::Missing);
        }
        error => panic!("{error}"),
    }
    // It has removed the manifest, and not yet the object.
    commit(&store, 12).await;
    let objects = put(&store, 20).await;
    let manifest = whole(&store, 20, &objects);
    fixture
        .remove("share-gone", "checkpoints/12/MANIFEST.json")
        .await;
    match store.commit(&manifest).await.unwrap_err() {
        StoreError::Damaged(damage) => assert_eq!(damage.reason, DamageReason::Removed),
        error => panic!("{error}"),
    }
    assert_eq!(store.checkpoints().await.unwrap(), [0; 0]);
    // In full it works always.
    let full = store.put_blocks(20, "w", &state(20)).await.unwrap();
    store.commit(&whole(&store, 20, &[full])).await.unwrap();
    is_intact(&store, 20).await;
}

pub(super) async fn older_programs_are_told(fixture: &Fixture) {
    let store = fixture.run("share-version").await;
    commit(&store, 10).await;
    commit(&store, 20).await;
    for (step, version) in [(10, 3), (20, 3)] {
        let key = format!("checkpoints/{step}/MANIFEST.json");
        let expected = format!("{{\n  \"version\": {version},\n");
        fixture
            .tamper("share-version", &key, |bytes| {
                assert!(bytes.starts_with(expected.as_bytes()));
            })
            .await;
    }
}

/// Every object goes over once, and nothing that was pruned at the source is needed.
pub(crate) async fn copied(from: &Fixture, to: &Fixture, run: &str) {
    let source = from.run(run).await;
    let first = commit(&source, 10).await;
    for step in [20, 30] {
        commit(&source, step).await;
    }
    source.prune(2).await.unwrap();
    let target = to.open(run);
    let progress = CopyProgress::default();
    let report = source.copy_to(&target, None, &progress).await.unwrap();
    assert_eq!(report.copied, [20, 30]);
    assert_eq!(report.objects_sent, 3);
    assert_eq!(progress.done_bytes(), progress.total_bytes());
    assert_eq!(report.bytes_sent, progress.total_bytes());
    for step in [20, 30] {
        is_intact(&target, step).await;
    }
    assert_eq!(
        target.load_manifest(30).await.unwrap(),
        source.load_manifest(30).await.unwrap()
    );
    // A damaged object of one that is pruned already damages both, and neither is copied.
    let shared = first.objects[0].key.clone();
    from.tamper(run, &shared, |bytes| bytes.truncate(99)).await;
    to.tamper(run, &shared, |bytes| bytes.truncate(98)).await;
    let report = source
        .copy_to(&target, None, &CopyProgress::default())
        .await
        .unwrap();
    assert_eq!(report.copied, [0; 0]);
    let damaged: Vec<u64> = report.damage.iter().map(|damage| damage.step).collect();
    assert_eq!(damaged, [30, 20]);
}
