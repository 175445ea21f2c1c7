//! What every store must do.

mod copying;
mod corruption;
mod damage;
mod sharing;
mod writing;

use everstep_store::{Digest, ErrorKind, PutRun, Quarantine, RunStore, StoreError};
use futures::future::join_all;

use super::support::{Fixture, identity};

pub(crate) use copying::between;
pub(crate) use sharing::copied;

/// Every case, each in a run of its own.
pub(crate) async fn all(fixture: &Fixture) {
    for_one_writer(fixture).await;
    checks_leave_nothing_behind(fixture).await;
    a_run_is_created_once(fixture).await;
    writing::a_step_is_committed_once(fixture).await;
    sharing::unchanged_blocks_are_not_sent_again(fixture).await;
    sharing::what_is_damaged_is_written_again(fixture).await;
    sharing::what_is_gone_is_not_committed(fixture).await;
    sharing::older_programs_are_told(fixture).await;
    damage::a_newer_version_stops_everybody(fixture).await;
    an_epoch_has_one_leader(fixture).await;
}

/// The cases that need no condition on a write, each in a run of its own.
pub(crate) async fn for_one_writer(fixture: &Fixture) {
    println!("store {}", fixture.url);
    writing::a_checkpoint_comes_back(fixture).await;
    writing::the_digest_ignores_who_wrote_what(fixture).await;
    writing::big_objects_are_uploaded_in_parts(fixture).await;
    writing::incomplete_checkpoints_are_not_committed(fixture).await;
    writing::interrupted_uploads_are_invisible(fixture).await;
    damage::damage_is_found_and_the_checkpoint_before_is_used(fixture).await;
    damage::a_damaged_step_can_be_committed_again(fixture).await;
    damage::pruning_keeps_the_newest(fixture).await;
    damage::a_quarantined_checkpoint_is_read_by_nobody(fixture).await;
    damage::retention_keeps_pinned_and_best_ones(fixture).await;
    copying::differences_are_found(fixture).await;
    quarantines_last_until_they_are_lifted(fixture).await;
}

async fn quarantines_last_until_they_are_lifted(fixture: &Fixture) {
    let store = fixture.open("quarantines");
    assert!(store.quarantines(3).await.unwrap().is_empty());
    let known = Quarantine {
        worker: 1,
        process: "worker-1".to_owned(),
        node: "a".to_owned(),
        step: 7,
        slot: Some(2),
        ..Quarantine::default()
    };
    store.put_quarantine(&known).await.unwrap();
    store.put_quarantine(&known).await.unwrap();
    let found = fixture.open("quarantines").quarantines(3).await.unwrap();
    assert_eq!(found.into_values().collect::<Vec<_>>(), [known]);

    // Damage lifts nothing.
    let key = "quarantine/worker-1.json";
    fixture
        .tamper("quarantines", key, |bytes| bytes.truncate(9))
        .await;
    let found = store.quarantines(3).await.unwrap();
    assert_eq!(found.keys().copied().collect::<Vec<_>>(), [1]);

    store.lift_quarantine(1).await.unwrap();
    store.lift_quarantine(1).await.unwrap();
    assert!(store.quarantines(3).await.unwrap().is_empty());
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
    // A store without the run is taken for one that is away, not for one without checkpoints.
    let error = store.latest_intact(&[]).await.unwrap_err();
    assert!(error.is_outage(), "{error}");
    assert_eq!(store.prune(1).await.unwrap(), Default::default());
    assert_eq!(store.latest_lease(0).await.unwrap(), None);
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
        let lease = stores[0].latest_lease(0).await.unwrap().unwrap();
        assert_eq!((lease.epoch, &lease.owner), (epoch, winners[0]));
        assert!(stores[1].take_lease(epoch, winners[0]).await.unwrap());
        assert!(!stores[1].take_lease(epoch, "somebody").await.unwrap());
    }
    assert_eq!(stores[0].lease(5).await.unwrap(), None);
    assert!(!stores[0].lease(2).await.unwrap().unwrap().owner.is_empty());
}
