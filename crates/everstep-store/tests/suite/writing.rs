//! Checkpoints are written whole or not at all, and come back bit for bit.

use std::collections::BTreeMap;
use std::pin::pin;

use everstep_store::{
    BlockState, CheckpointManifest, CheckpointObject, Commit, DamageReason, ErrorKind, StoreError,
    combine, optimizer_digest, param_digest,
};

use crate::support::{Fixture, blocks, checkpoint, identity, manifest};

pub(super) async fn a_checkpoint_comes_back(fixture: &Fixture) {
    let store = fixture.run("round").await;
    let written = checkpoint(&store, 1000).await;
    checkpoint(&store, 200).await;
    assert_eq!(store.checkpoints().await.unwrap(), [200, 1000]);
    assert_eq!(store.load_manifest(1000).await.unwrap(), written);
    assert_eq!(written.metadata["tokens"], "12");
    assert_eq!(
        store.latest_intact(&[]).await.unwrap().checkpoint,
        Some(written)
    );

    let all = blocks(1000, 0..6, 100);
    assert_eq!(
        store.load_blocks(1000, &[0, 1, 2, 3, 4, 5]).await.unwrap(),
        all
    );
    let some = store.load_blocks(1000, &[5, 0, 5]).await.unwrap();
    assert_eq!(some, [all[5].clone(), all[0].clone(), all[5].clone()]);
    assert_eq!(store.load_blocks(1000, &[]).await.unwrap(), []);

    let error = store.load_blocks(1000, &[2, 6]).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "checkpoint 1000 has no block 6, it has blocks 0 to 5"
    );
    let error = store.load_blocks(300, &[0]).await.unwrap_err();
    assert!(
        matches!(error, StoreError::NoCheckpoint { step: 300 }),
        "{error}"
    );
}

pub(super) async fn the_digest_ignores_who_wrote_what(fixture: &Fixture) {
    // Values whose bits a detour over text or f64 would not keep, and an optimizer without second moments.
    let odd = |bits: u32| f32::from_bits(bits);
    let state = |block: u32| BlockState {
        block,
        param: vec![
            odd(0x8000_0000),
            odd(0x0000_0001),
            odd(0x7fc0_1234),
            block as f32,
        ],
        m: vec![0.1; 4],
        extra: format!("of block {block}"),
        ..BlockState::default()
    };
    let all: Vec<BlockState> = (0..5).map(state).collect();
    let layout = identity("x").layout;
    let expected = (
        combine(layout, all.iter().map(|b| param_digest(&b.param))),
        combine(
            layout,
            all.iter().map(|b| optimizer_digest(&b.m, &b.v, &b.ema)),
        ),
    );
    for (run, cuts) in [
        ("digest-1", vec![5]),
        ("digest-2", vec![2, 5]),
        ("digest-3", vec![1, 2, 3, 4, 5]),
    ] {
        let store = fixture.run(run).await;
        let mut objects = Vec::new();
        let mut from = 0;
        for (writer, to) in cuts.into_iter().enumerate() {
            // Writers hand their blocks over in any order.
            let mut part = all[from..to].to_vec();
            part.reverse();
            objects.push(
                store
                    .put_blocks(8, &format!("w{writer}"), &part)
                    .await
                    .unwrap(),
            );
            from = to;
        }
        objects.reverse();
        store.commit(&manifest(run, 8, 5, objects)).await.unwrap();
        let digest = store.digest(8).await.unwrap();
        assert_eq!((digest.parameters, digest.optimizer), expected);
        let bits = |blocks: &[BlockState]| -> Vec<u32> {
            blocks
                .iter()
                .flat_map(|b| b.param.iter().map(|v| v.to_bits()))
                .collect()
        };
        assert_eq!(
            bits(&store.load_blocks(8, &[0, 1, 2, 3, 4]).await.unwrap()),
            bits(&all)
        );
    }
}

pub(super) async fn big_objects_are_uploaded_in_parts(fixture: &Fixture) {
    let store = fixture.run("big").await;
    // 21 MB and a bit: three parts, the last one short.
    let state = blocks(3, 0..3, 600_001);
    let object = store.put_blocks(3, "shard-0", &state).await.unwrap();
    assert!(object.bytes > 2 * (8 << 20) && object.bytes % (8 << 20) != 0);
    store
        .commit(&manifest("big", 3, 3, vec![object]))
        .await
        .unwrap();
    assert_eq!(store.verify(3).await.unwrap(), []);
    assert_eq!(store.load_blocks(3, &[1]).await.unwrap(), state[1..2]);
    assert_eq!(store.load_blocks(3, &[0, 1, 2]).await.unwrap(), state);
}

pub(super) async fn incomplete_checkpoints_are_not_committed(fixture: &Fixture) {
    let store = fixture.run("incomplete").await;
    let a = store
        .put_blocks(4, "a", &blocks(4, 0..2, 10))
        .await
        .unwrap();
    let b = store
        .put_blocks(4, "b", &blocks(4, 1..4, 10))
        .await
        .unwrap();
    let c = store
        .put_blocks(5, "c", &blocks(4, 2..4, 10))
        .await
        .unwrap();
    let new = |objects: &[&CheckpointObject]| {
        let objects = objects.iter().map(|object| (*object).clone()).collect();
        CheckpointManifest::new(4, &identity("incomplete"), 4, objects, BTreeMap::new())
    };
    let reason = |objects: &[&CheckpointObject]| new(objects).unwrap_err().to_string();
    assert_eq!(reason(&[&a]), "checkpoint 4: block 2 of 4 is missing");
    assert_eq!(reason(&[]), "checkpoint 4: block 0 of 4 is missing");
    assert_eq!(reason(&[&a, &b]), "checkpoint 4: block 1 is there twice");
    assert!(reason(&[&a, &c]).contains("does not belong to it"));

    let error = store
        .put_blocks(4, "a", &[] as &[BlockState; 0])
        .await
        .unwrap_err();
    assert!(
        matches!(error, StoreError::InvalidCheckpoint { .. }),
        "{error}"
    );
    let twice = [blocks(4, 0..1, 10), blocks(4, 0..1, 10)].concat();
    assert!(store.put_blocks(4, "a", &twice).await.is_err());
    assert!(matches!(
        store.put_blocks(4, "../a", &twice).await,
        Err(StoreError::BadName { .. })
    ));

    // Objects that have vanished or were cut before the commit.
    let d = store
        .put_blocks(4, "d", &blocks(4, 2..4, 10))
        .await
        .unwrap();
    let whole = new(&[&a, &d]).unwrap();
    fixture
        .tamper("incomplete", &d.key, |bytes| bytes.truncate(50))
        .await;
    match store.commit(&whole).await.unwrap_err() {
        StoreError::Damaged(damage) => {
            assert_eq!(damage.object, d.key);
            assert!(
                matches!(damage.reason, DamageReason::Size { found: 50, .. }),
                "{damage}"
            );
        }
        error => panic!("{error}"),
    }
    fixture.remove("incomplete", &d.key).await;
    assert!(
        matches!(store.commit(&whole).await, Err(StoreError::Damaged(d)) if d.reason == DamageReason::Missing)
    );

    let mut foreign = identity("incomplete");
    foreign.seed = 99;
    let objects = vec![
        a.clone(),
        store
            .put_blocks(4, "d", &blocks(4, 2..4, 10))
            .await
            .unwrap(),
    ];
    let foreign = CheckpointManifest::new(4, &foreign, 4, objects, BTreeMap::new()).unwrap();
    assert!(matches!(
        store.commit(&foreign).await,
        Err(StoreError::ForeignCheckpoint {
            field: "run_digest",
            ..
        })
    ));
    assert_eq!(store.checkpoints().await.unwrap(), [0; 0]);
}

pub(super) async fn a_step_is_committed_once(fixture: &Fixture) {
    let store = fixture.run("once").await;
    let first = checkpoint(&store, 6).await;
    assert_eq!(
        store.commit(&first).await.unwrap(),
        Commit::AlreadyCommitted
    );
    // The same bits in one object.
    let object = store
        .put_blocks(6, "other", &blocks(6, 0..6, 100))
        .await
        .unwrap();
    assert_eq!(
        store
            .commit(&manifest("once", 6, 6, vec![object]))
            .await
            .unwrap(),
        Commit::AlreadyCommitted
    );
    // Other bits.
    let object = store
        .put_blocks(6, "other", &blocks(7, 0..6, 100))
        .await
        .unwrap();
    let error = store
        .commit(&manifest("once", 6, 6, vec![object]))
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            StoreError::CommitConflict {
                field: "parameters",
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(error.kind(), ErrorKind::Fenced);
    assert_eq!(store.load_manifest(6).await.unwrap(), first);
}

pub(super) async fn interrupted_uploads_are_invisible(fixture: &Fixture) {
    let store = fixture.run("interrupted").await;
    let state = blocks(50, 0..2, 1_500_000);
    for polls in [1, 40, 60, 80, 120] {
        let mut upload = pin!(store.put_blocks(50, "shard-0", &state));
        for _ in 0..polls {
            if futures::poll!(&mut upload).is_ready() {
                break;
            }
            tokio::task::yield_now().await;
        }
        // Dropped here, in the middle.
    }
    assert_eq!(store.checkpoints().await.unwrap(), [0; 0]);
    assert_eq!(store.latest_intact(&[]).await.unwrap().checkpoint, None);
    assert!(matches!(
        store.load_blocks(50, &[0]).await,
        Err(StoreError::NoCheckpoint { .. })
    ));
    // What lies around is in nobody's way, and goes with the next pruning.
    let object = store
        .put_blocks(50, "other", &blocks(50, 1..2, 10))
        .await
        .unwrap();
    checkpoint(&store, 60).await;
    assert_eq!(store.prune(3).await.unwrap().garbage, [50]);
    let keys = fixture.keys("interrupted").await;
    assert!(
        !keys.iter().any(|key| key.contains("checkpoints/50")),
        "{keys:?} {object:?}"
    );
    assert_eq!(store.checkpoints().await.unwrap(), [60]);
}
