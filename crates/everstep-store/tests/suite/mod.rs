//! What every store must do.

use std::collections::BTreeMap;
use std::pin::pin;

use everstep_store::{
    BlockState, CheckpointManifest, Commit, DamageReason, Digest, ErrorKind, PutRun, RunStore,
    StoreError, combine, optimizer_digest, param_digest,
};
use futures::future::join_all;

use super::support::{Fixture, blocks, checkpoint, identity, manifest};

/// Every case, each in a run of its own.
pub(crate) async fn all(fixture: &Fixture) {
    println!("store {}", fixture.url);
    a_run_is_created_once(fixture).await;
    checks_leave_nothing_behind(fixture).await;
    a_checkpoint_comes_back(fixture).await;
    the_digest_ignores_who_wrote_what(fixture).await;
    big_objects_are_uploaded_in_parts(fixture).await;
    incomplete_checkpoints_are_not_committed(fixture).await;
    a_step_is_committed_once(fixture).await;
    interrupted_uploads_are_invisible(fixture).await;
    damage_is_found_and_the_checkpoint_before_is_used(fixture).await;
    a_damaged_step_can_be_committed_again(fixture).await;
    pruning_keeps_the_newest(fixture).await;
    an_epoch_has_one_leader(fixture).await;
}

async fn a_run_is_created_once(fixture: &Fixture) {
    let store = fixture.open("identity");
    assert_eq!(store.run().await.unwrap(), None);
    assert!(matches!(
        store.existing_run().await,
        Err(StoreError::NoRun { .. })
    ));
    assert_eq!(
        store
            .put_run("seed = 7\n", &identity("identity"))
            .await
            .unwrap(),
        PutRun::Created
    );
    assert_eq!(
        store.run_toml().await.unwrap().as_deref(),
        Some("seed = 7\n")
    );

    let mut elsewhere = identity("identity");
    elsewhere
        .environment
        .insert("device".to_owned(), "cuda".to_owned());
    let PutRun::Existing(existing) = store.put_run("# other\n", &elsewhere).await.unwrap() else {
        panic!()
    };
    let difference = elsewhere.environment_differences(&existing)[0].to_string();
    assert_eq!(difference, "device is `cpu` and not `cuda`");
    assert_eq!(
        store.run_toml().await.unwrap().as_deref(),
        Some("seed = 7\n")
    );

    let mut other = identity("identity");
    (other.seed, other.dataset) = (8, Digest::of(b"other"));
    match store.put_run("", &other).await.unwrap_err() {
        StoreError::RunMismatch { differences, .. } => {
            let fields: Vec<&str> = differences.iter().map(|d| d.field.as_str()).collect();
            assert_eq!(fields, ["seed", "dataset"]);
        }
        error => panic!("{error}"),
    }

    fixture
        .tamper("identity", "manifest.json", |bytes| bytes[30] ^= 1)
        .await;
    let error = store.run().await.unwrap_err();
    assert!(
        matches!(&error, StoreError::Document { key, .. } if key == "manifest.json"),
        "{error}"
    );
    assert_eq!(error.kind(), ErrorKind::Data);
}

async fn checks_leave_nothing_behind(fixture: &Fixture) {
    let store = fixture.open("checks");
    store.check_writable().await.unwrap();
    let report = store.probe_create_if_absent().await.unwrap();
    assert_eq!(
        (report.racers, &report.winners),
        (16, &vec![1; 8]),
        "{report:?}"
    );
    report.require().unwrap();
    assert_eq!(fixture.keys("checks").await, [""; 0]);
    assert_eq!(store.checkpoints().await.unwrap(), [0; 0]);
    assert_eq!(store.latest_intact().await.unwrap().checkpoint, None);
    assert_eq!(store.prune(1).await.unwrap(), Default::default());
    assert_eq!(store.latest_lease().await.unwrap(), None);
}

async fn a_checkpoint_comes_back(fixture: &Fixture) {
    let store = fixture.run("round").await;
    let written = checkpoint(&store, 1000).await;
    checkpoint(&store, 200).await;
    assert_eq!(store.checkpoints().await.unwrap(), [200, 1000]);
    assert_eq!(store.load_manifest(1000).await.unwrap(), written);
    assert_eq!(written.metadata["tokens"], "12");
    assert_eq!(
        store.latest_intact().await.unwrap().checkpoint,
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

async fn the_digest_ignores_who_wrote_what(fixture: &Fixture) {
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
        v: Vec::new(),
    };
    let all: Vec<BlockState> = (0..5).map(state).collect();
    let layout = identity("x").layout;
    let expected = (
        combine(layout, all.iter().map(|b| param_digest(&b.param))),
        combine(layout, all.iter().map(|b| optimizer_digest(&b.m, &b.v))),
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

async fn big_objects_are_uploaded_in_parts(fixture: &Fixture) {
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

async fn incomplete_checkpoints_are_not_committed(fixture: &Fixture) {
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
    let new = |objects: &[&everstep_store::CheckpointObject]| {
        let objects = objects.iter().map(|object| (*object).clone()).collect();
        CheckpointManifest::new(4, &identity("incomplete"), 4, objects, BTreeMap::new())
    };
    let reason =
        |objects: &[&everstep_store::CheckpointObject]| new(objects).unwrap_err().to_string();
    assert_eq!(reason(&[&a]), "checkpoint 4: block 2 of 4 is missing");
    assert_eq!(reason(&[]), "checkpoint 4: block 0 of 4 is missing");
    assert_eq!(reason(&[&a, &b]), "checkpoint 4: block 1 is there twice");
    assert!(reason(&[&a, &c]).contains("does not belong to it"));

    let error = store.put_blocks(4, "a", &[]).await.unwrap_err();
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

async fn a_step_is_committed_once(fixture: &Fixture) {
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

async fn interrupted_uploads_are_invisible(fixture: &Fixture) {
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
    assert_eq!(store.latest_intact().await.unwrap().checkpoint, None);
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

async fn damage_is_found_and_the_checkpoint_before_is_used(fixture: &Fixture) {
    let store = fixture.run("damage").await;
    let mut manifests = Vec::new();
    for step in [10, 20, 30, 40, 50] {
        manifests.push(checkpoint(&store, step).await);
    }
    let object = |at: usize| &manifests[at].objects[1];
    fixture
        .tamper("damage", "checkpoints/50/MANIFEST.json", |bytes| {
            bytes[200] ^= 1
        })
        .await;
    fixture
        .tamper("damage", &object(3).key, |bytes| {
            *bytes.last_mut().unwrap() ^= 1
        })
        .await;
    fixture
        .tamper("damage", &object(2).key, |bytes| bytes.truncate(100))
        .await;
    fixture.remove("damage", &object(1).key).await;

    let found = store.latest_intact().await.unwrap();
    assert_eq!(found.checkpoint, Some(manifests[0].clone()));
    let steps: Vec<u64> = found.damaged.iter().map(|damage| damage.step).collect();
    assert_eq!(steps, [50, 40, 30, 20]);
    assert!(matches!(found.damaged[0].reason, DamageReason::Manifest(_)));
    assert!(
        matches!(found.damaged[1].reason, DamageReason::Digest { expected, .. } if expected == object(3).blake3)
    );
    assert!(matches!(
        found.damaged[2].reason,
        DamageReason::Size { found: 100, .. }
    ));
    assert_eq!(found.damaged[3].reason, DamageReason::Missing);
    assert_eq!(found.damaged[1].object, object(3).key);

    // The last byte belongs to the second moments of block 5; block 4 in the same object is intact.
    assert_eq!(
        store.load_blocks(40, &[4]).await.unwrap(),
        blocks(40, 4..5, 100)
    );
    match store.load_blocks(40, &[5]).await.unwrap_err() {
        StoreError::Damaged(damage) => {
            assert_eq!(damage.object, object(3).key);
            assert!(
                matches!(
                    damage.reason,
                    DamageReason::Block {
                        block: 5,
                        part: "optimizer",
                        ..
                    }
                ),
                "{damage}"
            );
            assert!(
                damage
                    .to_string()
                    .contains(&object(3).blocks[1].optimizer_digest.to_string())
            );
        }
        error => panic!("{error}"),
    }
    for (step, blocks) in [(50, [0]), (30, [4]), (20, [4])] {
        let error = store.load_blocks(step, &blocks).await.unwrap_err();
        assert!(
            matches!(error, StoreError::Damaged(_)) && error.kind() == ErrorKind::Data,
            "{error}"
        );
    }
    assert_eq!(
        store.load_blocks(10, &[5]).await.unwrap(),
        blocks(10, 5..6, 100)
    );
}

async fn a_damaged_step_can_be_committed_again(fixture: &Fixture) {
    let store = fixture.run("again").await;
    let first = checkpoint(&store, 10).await;
    fixture
        .tamper("again", &first.objects[0].key, |bytes| bytes[1000] ^= 1)
        .await;
    assert_eq!(store.verify(10).await.unwrap().len(), 1);
    store.discard(10).await.unwrap();
    store.discard(10).await.unwrap();
    assert_eq!(store.checkpoints().await.unwrap(), [0; 0]);
    assert_eq!(checkpoint(&store, 10).await, first);
    assert_eq!(store.verify(10).await.unwrap(), []);
}

async fn pruning_keeps_the_newest(fixture: &Fixture) {
    let store = fixture.run("prune").await;
    for step in [10, 20, 30, 40] {
        checkpoint(&store, step).await;
    }
    // Left behind by writers that died: below, beside and above committed ones.
    for step in [15, 30, 45] {
        store
            .put_blocks(step, "dead", &blocks(99, 0..1, 10))
            .await
            .unwrap();
    }
    let report = store.prune(2).await.unwrap();
    assert_eq!(
        (report.removed, report.garbage),
        (vec![10, 20], vec![15, 30])
    );
    assert_eq!(store.checkpoints().await.unwrap(), [30, 40]);
    let keys = fixture.keys("prune").await;
    let dead: Vec<&String> = keys.iter().filter(|key| key.contains("dead")).collect();
    assert!(
        dead.len() == 1 && dead[0].starts_with("prune/checkpoints/45/"),
        "{keys:?}"
    );
    assert_eq!(store.verify(30).await.unwrap(), []);
    assert_eq!(store.prune(0).await.unwrap().removed, [30]);
    assert_eq!(store.prune(1).await.unwrap(), Default::default());
    assert_eq!(store.checkpoints().await.unwrap(), [40]);
}

async fn an_epoch_has_one_leader(fixture: &Fixture) {
    let stores: Vec<RunStore> = (0..16).map(|_| fixture.open("lead")).collect();
    for epoch in [1, 2, 9, 10] {
        let owners: Vec<String> = (0..16).map(|i| format!("node-{i}:{epoch}")).collect();
        let taken = join_all(
            stores
                .iter()
                .zip(&owners)
                .map(|(store, owner)| store.take_lease(epoch, owner)),
        )
        .await;
        let winners: Vec<&String> = owners
            .iter()
            .zip(&taken)
            .filter(|(_, t)| *t.as_ref().unwrap())
            .map(|(o, _)| o)
            .collect();
        assert_eq!(winners.len(), 1);
        // Numbers and not names decide what is latest: 10 comes after 9.
        let lease = stores[0].latest_lease().await.unwrap().unwrap();
        assert_eq!((lease.epoch, &lease.owner), (epoch, winners[0]));
        assert!(stores[1].take_lease(epoch, winners[0]).await.unwrap());
        assert!(!stores[1].take_lease(epoch, "somebody").await.unwrap());
    }
    assert_eq!(stores[0].lease(5).await.unwrap(), None);
    assert!(!stores[0].lease(2).await.unwrap().unwrap().owner.is_empty());
}
