//! Checkpoints are compared with each other and copied from store to store.

use everstep_store::{
    CheckpointManifest, CopyProgress, DamageReason, RunStore, StoreError, ValueDifference,
};

use crate::support::{Fixture, blocks, checkpoint, identity, manifest};

pub(super) async fn differences_are_found(fixture: &Fixture) {
    let store = fixture.run("differ").await;
    let other = fixture.run("differ-too").await;
    let commit = async |store: &RunStore, step: u64, state| {
        let object = store.put_blocks(step, "w", state).await.unwrap();
        let manifest = manifest(store.name(), step, 4, vec![object]);
        store.commit(&manifest).await.unwrap();
    };
    let state = blocks(1, 0..4, 50);
    commit(&store, 10, &state).await;
    commit(&other, 10, &state).await;
    let mut changed = state.clone();
    changed[1].param[3] += 2.5;
    changed[1].param[4] += 0.5;
    changed[3].v[0] = f32::NAN;
    commit(&store, 20, &changed).await;

    let same = store.diff(10, &other, 10).await.unwrap();
    assert_eq!((same.num_blocks, same.blocks.len()), (4, 0));
    let diff = store.diff(20, &other, 10).await.unwrap();
    let found: Vec<u32> = diff.blocks.iter().map(|block| block.block).collect();
    assert_eq!(found, [1, 3]);
    let (count, max_abs) = (2, 2.5);
    assert_eq!(diff.blocks[0].param, ValueDifference { count, max_abs });
    assert_eq!(diff.blocks[0].m, ValueDifference::default());
    let (count, max_abs) = (1, f64::INFINITY);
    assert_eq!(diff.blocks[1].v, ValueDifference { count, max_abs });
    assert!(matches!(
        store.diff(10, &other, 20).await,
        Err(StoreError::NoCheckpoint { step: 20 })
    ));
}

/// Copies `run` from one store to another, is cut off on the way, and goes on.
pub(crate) async fn between(from: &Fixture, to: &Fixture, run: &str) {
    let source = from.run(run).await;
    let mut manifests: Vec<CheckpointManifest> = Vec::new();
    for step in [10, 20, 30] {
        manifests.push(checkpoint(&source, step).await);
    }
    // 21 MB: an object in three parts, beside a small one.
    let state = blocks(40, 0..3, 600_001);
    let objects = vec![
        source.put_blocks(40, "a", &state[..2]).await.unwrap(),
        source.put_blocks(40, "b", &state[2..]).await.unwrap(),
    ];
    let big = manifest(run, 40, 3, objects);
    source.commit(&big).await.unwrap();
    source.pin(10).await.unwrap();
    // One that is damaged is told and left out; the others are copied.
    let damaged = manifests[1].objects[1].key.clone();
    from.tamper(run, &damaged, |bytes| bytes[700] ^= 1).await;

    // The first attempt is dropped after it has moved so many bytes.
    let target = to.open(run);
    let progress = CopyProgress::default();
    let cut_off = async {
        loop {
            if progress.done_bytes() >= big.objects[1].bytes {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        biased;
        () = cut_off => {}
        report = source.copy_to(&target, Some(&[40]), &progress) => panic!("was not cut off: {report:?}"),
    }
    assert!(progress.done_bytes() < big.bytes());
    assert_eq!(target.checkpoints().await.unwrap(), [0; 0]);
    // As if one of the two objects had arrived.
    let arrived = target.put_blocks(40, "b", &state[2..]).await.unwrap();
    assert_eq!(arrived, big.objects[1]);

    let progress = CopyProgress::default();
    let report = source.copy_to(&target, None, &progress).await.unwrap();
    assert_eq!(
        (&report.copied, &report.there),
        (&vec![10, 30, 40], &vec![])
    );
    assert_eq!((report.objects_sent, report.objects_there), (5, 1));
    let small = manifests[0].bytes() + manifests[2].bytes();
    assert_eq!(report.bytes_sent, big.objects[0].bytes + small);
    assert_eq!(report.damage.len(), 1);
    assert_eq!(report.damage[0].object, damaged);
    assert!(matches!(
        &report.damage[0].reason,
        DamageReason::Digest { blocks, .. } if blocks == &[4]
    ));
    assert_eq!(progress.done_bytes(), progress.total_bytes());
    let keys = to.keys(run).await;
    assert!(
        !keys.iter().any(|key| key.contains("checkpoints/20/")),
        "{keys:?}"
    );
    for manifest in [&manifests[0], &manifests[2], &big] {
        assert_eq!(
            &target.load_manifest(manifest.step).await.unwrap(),
            manifest
        );
        assert_eq!(target.verify(manifest.step).await.unwrap(), []);
    }
    assert_eq!(
        target.run_toml().await.unwrap(),
        source.run_toml().await.unwrap()
    );
    assert_eq!(target.pinned_steps().await.unwrap(), [10].into());

    // What is there is not sent again; what was damaged there is.
    to.tamper(run, &big.objects[0].key, |bytes| bytes.truncate(99))
        .await;
    let report = source
        .copy_to(&target, Some(&[10, 40]), &CopyProgress::default())
        .await
        .unwrap();
    assert_eq!((report.copied, report.there), (vec![40], vec![10]));
    assert_eq!(report.bytes_sent, big.objects[0].bytes);
    assert_eq!(target.verify(40).await.unwrap(), []);

    // Another run under the same name is left as it is.
    let name = format!("{run}-other");
    let other = from.run(&name).await;
    checkpoint(&other, 10).await;
    let mut foreign = identity(&name);
    foreign.tokenizer = everstep_store::Digest::of(b"another tokenizer");
    to.open(&name).put_run("", &foreign).await.unwrap();
    let before = to.keys(&name).await;
    let error = other
        .copy_to(&to.open(&name), None, &CopyProgress::default())
        .await
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("exists with another identity: tokenizer is"),
        "{error}"
    );
    assert_eq!(to.keys(&name).await, before);
    let error = other
        .copy_to(&target, None, &CopyProgress::default())
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("a run keeps its name"),
        "{error}"
    );
}
