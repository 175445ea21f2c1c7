//! Damage is found, and what is left over goes away.

use std::collections::BTreeMap;

use everstep_store::{
    CheckpointManifest, Commit, DamageReason, EVALUATION_LOSS, ErrorKind, KeepReason, Retention,
    StoreError,
};

use crate::support::{Fixture, blocks, checkpoint, identity};

pub(super) async fn damage_is_found_and_the_checkpoint_before_is_used(fixture: &Fixture) {
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

    let found = store.latest_intact(&[]).await.unwrap();
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

pub(super) async fn a_damaged_step_can_be_committed_again(fixture: &Fixture) {
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

pub(super) async fn pruning_keeps_the_newest(fixture: &Fixture) {
    let store = fixture.run("prune").await;
    for step in [10, 20, 30] {
        checkpoint(&store, step).await;
    }
    // Left behind by writers that died: below, beside and above committed ones.
    for step in [15, 30, 45] {
        store
            .put_blocks(step, "dead", &blocks(99, 0..1, 10))
            .await
            .unwrap();
    }
    checkpoint(&store, 40).await;
    let plan = store.plan_prune(&Retention::last(2)).await.unwrap();
    assert_eq!(plan.remove.keys().copied().collect::<Vec<_>>(), [10, 20]);
    assert_eq!(plan.live, [45].into());
    assert_eq!(store.checkpoints().await.unwrap(), [10, 20, 30, 40]);
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

pub(super) async fn a_quarantined_checkpoint_is_read_by_nobody(fixture: &Fixture) {
    let store = fixture.run("marked").await;
    let manifests = [
        checkpoint(&store, 10).await,
        checkpoint(&store, 20).await,
        checkpoint(&store, 30).await,
    ];
    let key = manifests[2].objects[0].key.clone();
    fixture
        .tamper("marked", &key, |bytes| {
            // Behind the header.
            let at = bytes.len() - 1000;
            bytes[at] ^= 1;
        })
        .await;
    let report = store.scrub(30, 1 << 30).await.unwrap();
    // The damaged object is read twice.
    assert_eq!(
        report.bytes,
        manifests[2].bytes() + manifests[2].objects[0].bytes
    );
    assert_eq!(report.damage.len(), 1);
    assert_eq!(report.damage[0].object, key);
    assert!(
        matches!(&report.damage[0].reason, DamageReason::Digest { blocks, .. } if blocks.len() == 1),
        "{report:?}"
    );
    assert_eq!(store.scrub(20, 1 << 30).await.unwrap().damage, []);
    store
        .quarantine_checkpoint(30, &report.damage, "2026-01-01T00:00:00Z")
        .await
        .unwrap();

    assert_eq!(store.checkpoints().await.unwrap(), [10, 20]);
    assert_eq!(store.latest_committed(&[30]).await.unwrap(), Some(20));
    let found = store.latest_intact(&[30]).await.unwrap();
    assert_eq!(found.checkpoint.as_ref(), Some(&manifests[1]));
    assert_eq!(found.damaged.len(), 1);
    assert_eq!(found.damaged[0].object, key);
    let listed = store.list_checkpoints().await.unwrap();
    let marks: Vec<(u64, bool)> = listed.iter().map(|i| (i.step, i.quarantined)).collect();
    assert_eq!(marks, [(10, false), (20, false), (30, true)]);
    assert!(listed[2].damage[0].to_string().contains("2026-01-01"));

    // A damaged record still says that there was one.
    fixture
        .tamper("marked", "damaged/30.json", |bytes| bytes.truncate(5))
        .await;
    assert_eq!(store.checkpoints().await.unwrap(), [10, 20]);
    assert_eq!(store.latest_intact(&[]).await.unwrap().damaged.len(), 1);

    // It does not count when checkpoints are kept, and is no reason to remove the last good one.
    let plan = store.plan_prune(&Retention::last(1)).await.unwrap();
    let kept: Vec<u64> = plan.keep.keys().copied().collect();
    assert_eq!(kept, [20, 30]);
    assert!(plan.keep[&30].contains(&KeepReason::Evidence));

    // Committing the step again makes it good.
    assert_eq!(checkpoint(&store, 30).await, manifests[2]);
    assert_eq!(store.verify(30).await.unwrap(), []);
    assert_eq!(store.checkpoints().await.unwrap(), [10, 20, 30]);
    assert_eq!(store.quarantined_steps().await.unwrap(), [].into());
}

pub(super) async fn retention_keeps_pinned_and_best_ones(fixture: &Fixture) {
    let store = fixture.run("retention").await;
    for (step, loss) in [(10, "2.5"), (20, "1.5"), (30, "1.75"), (40, "nan")] {
        let object = store
            .put_blocks(step, "w", &blocks(step, 0..2, 10))
            .await
            .unwrap();
        let metadata = BTreeMap::from([(EVALUATION_LOSS.to_owned(), loss.to_owned())]);
        let manifest =
            CheckpointManifest::new(step, &identity("retention"), 2, vec![object], metadata)
                .unwrap();
        assert_eq!(store.commit(&manifest).await.unwrap(), Commit::Created);
    }
    assert!(matches!(
        store.pin(15).await,
        Err(StoreError::NoCheckpoint { step: 15 })
    ));
    store.pin(10).await.unwrap();
    store.pin(10).await.unwrap();
    let retention = Retention {
        last: 1,
        every_steps: None,
        best: 1,
    };
    let plan = store.plan_prune(&retention).await.unwrap();
    let report = store.carry_out(&plan).await.unwrap();
    assert_eq!(report.removed, [30]);
    assert_eq!(store.checkpoints().await.unwrap(), [10, 20, 40]);
    let listed = store.list_checkpoints().await.unwrap();
    assert!(listed[0].pinned && !listed[1].pinned);
    assert_eq!(listed[1].evaluation_loss, Some(1.5));
    assert_eq!(listed[2].evaluation_loss, None);
    store.unpin(10).await.unwrap();
    assert_eq!(store.prune(1).await.unwrap().removed, [10, 20]);
}

/// A checkpoint whose manifest is of a newer version than this program's: nobody may take it for damaged, and nobody may change a thing.
pub(super) async fn a_newer_version_stops_everybody(fixture: &Fixture) {
    let store = fixture.run("newer").await;
    checkpoint(&store, 10).await;
    let newest = checkpoint(&store, 20).await;
    let key = "checkpoints/20/MANIFEST.json";
    fixture
        .tamper("newer", key, |bytes| {
            let text = String::from_utf8(bytes.clone()).unwrap();
            let (_, body) = text.split_once("\"body\"").unwrap();
            *bytes = format!(
                "{{\n  \"version\": 9,\n  \"blake3\": \"{}\",\n  \"body\"{body}",
                "0".repeat(64)
            )
            .into_bytes();
        })
        .await;
    let before = fixture.keys("newer").await;
    let errors = [
        store.latest_intact(&[]).await.unwrap_err(),
        store.load_manifest(20).await.unwrap_err(),
        store.verify(20).await.unwrap_err(),
        store.prune(1).await.unwrap_err(),
        store.commit(&newest).await.unwrap_err(),
        store.list_checkpoints().await.unwrap_err(),
        store.check_versions().await.unwrap_err(),
    ];
    for error in errors {
        let text = error.to_string();
        assert!(
            text.starts_with(&format!(
                "`{key}` has version 9, this program reads up to version"
            )) && !text.contains('\n'),
            "{text}"
        );
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
    assert_eq!(fixture.keys("newer").await, before);
}
