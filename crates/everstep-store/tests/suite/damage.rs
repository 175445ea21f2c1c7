//! Damage is found, and what is left over goes away.

use everstep_store::{DamageReason, ErrorKind, StoreError};

use crate::support::{Fixture, blocks, checkpoint};

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
