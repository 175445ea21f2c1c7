use std::collections::BTreeMap;
use std::path::Path;

use super::*;

fn identity(seed: u64) -> RunIdentity {
    RunIdentity {
        run: "r1".into(),
        seed,
        configuration: Digest::of(b"c"),
        dataset: Digest::of(b"d"),
        tokenizer: Digest::of(b"t"),
        layout: Digest::of(b"l"),
        determinism: "strict".into(),
        environment: BTreeMap::new(),
    }
}

/// A ledger with something of everything, closed again.
fn filled(dir: &Path) {
    let ledger = Ledger::open(dir).unwrap();
    ledger.bind_run(&identity(1)).unwrap();
    assert_eq!(ledger.next_incarnation().unwrap(), 1);
    assert_eq!(ledger.next_incarnation().unwrap(), 2);
    assert_eq!(ledger.see_epoch(4).unwrap(), 4);
    assert_eq!(ledger.see_epoch(2).unwrap(), 4);
    assert_eq!(ledger.count_restart("worker-0").unwrap(), 1);
    assert_eq!(ledger.count_restart("worker-0").unwrap(), 2);
    assert_eq!(ledger.count_restart("shard-1").unwrap(), 1);
    ledger.record_commit(100, Digest::of(b"m")).unwrap();
}

fn assert_filled(ledger: &Ledger) {
    assert_eq!(ledger.run().unwrap(), Some(identity(1)));
    assert_eq!(ledger.incarnation().unwrap(), 2);
    assert_eq!(ledger.epoch().unwrap(), 4);
    assert_eq!(
        ledger.restarts().unwrap(),
        BTreeMap::from([("worker-0".into(), 2), ("shard-1".into(), 1)])
    );
    assert_eq!(
        ledger.last_commit().unwrap(),
        Some(LastCommit {
            step: 100,
            manifest: Digest::of(b"m")
        })
    );
}

#[test]
fn everything_survives_reopening() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path());
    let ledger = Ledger::open(dir.path()).unwrap();
    assert_filled(&ledger);
    assert_eq!(ledger.next_incarnation().unwrap(), 3);
}

#[test]
fn an_empty_ledger_knows_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(&dir.path().join("deep/er")).unwrap();
    assert_eq!(
        (ledger.incarnation().unwrap(), ledger.epoch().unwrap()),
        (0, 0)
    );
    assert!(ledger.run().unwrap().is_none() && ledger.last_commit().unwrap().is_none());
}

#[test]
fn another_run_and_a_step_backwards_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    filled(dir.path());
    let ledger = Ledger::open(dir.path()).unwrap();
    ledger.bind_run(&identity(1)).unwrap();
    let error = ledger.bind_run(&identity(2)).unwrap_err().to_string();
    assert!(
        error.ends_with("belongs to another run: seed is `1` and not `2`"),
        "{error}"
    );
    let error = ledger.record_commit(99, Digest::of(b"x")).unwrap_err();
    assert!(
        matches!(
            error,
            LedgerError::Regressed {
                step: 99,
                last: 100,
                ..
            }
        ),
        "{error}"
    );
    assert_filled(&ledger);
    ledger.record_rollback(50, Digest::of(b"o")).unwrap();
    ledger.record_commit(60, Digest::of(b"p")).unwrap();
    assert_eq!(ledger.last_commit().unwrap().unwrap().step, 60);
}

#[test]
fn a_second_opener_is_told_who_holds_it() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(dir.path()).unwrap();
    match Ledger::open(dir.path()).unwrap_err() {
        LedgerError::InUse { holder, .. } => assert_eq!(holder, std::process::id().to_string()),
        error => panic!("{error}"),
    }
    drop(ledger);
    Ledger::open(dir.path()).unwrap();
}

#[test]
fn a_file_in_place_of_the_folder_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "x").unwrap();
    assert!(matches!(
        Ledger::open(&file.join("under")),
        Err(LedgerError::Io { .. })
    ));
}

/// Every file of the ledger except the lock.
fn files(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut found = vec![dir.join("generation")];
    let mut folders = vec![dir.join("db")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path)
            } else {
                found.push(path)
            }
        }
    }
    found.sort();
    found
}

fn copy(from: &Path, to: &Path) {
    for path in files(from) {
        let target = to.join(path.strip_prefix(from).unwrap());
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::copy(&path, &target).unwrap();
    }
}

/// Opens a damaged copy: either everything is as it was, or the error is typed. Returns whether it was refused.
fn refused_or_intact(original: &Path, damage: impl FnOnce(&Path)) -> bool {
    let dir = tempfile::tempdir().unwrap();
    copy(original, dir.path());
    damage(dir.path());
    match Ledger::open(dir.path()) {
        Ok(ledger) => {
            assert_filled(&ledger);
            assert_eq!(ledger.next_incarnation().unwrap(), 3);
            false
        }
        Err(LedgerError::Corrupt { .. } | LedgerError::Io { .. }) => true,
        Err(error) => panic!("unexpected kind: {error}"),
    }
}

#[test]
fn truncation_never_brings_an_older_state_back() {
    let original = tempfile::tempdir().unwrap();
    filled(original.path());
    let mut refused = 0;
    for path in files(original.path()) {
        let name = path.strip_prefix(original.path()).unwrap();
        let len = std::fs::metadata(&path).unwrap().len();
        let mut cuts = vec![0, 1, len / 2, len.saturating_sub(1)];
        // sled's log is mostly padding: the interesting cuts are in front.
        cuts.extend((0..len.min(4096)).step_by(257));
        for cut in cuts {
            refused += usize::from(refused_or_intact(original.path(), |dir| {
                let file = std::fs::OpenOptions::new()
                    .write(true)
                    .open(dir.join(name))
                    .unwrap();
                file.set_len(cut).unwrap();
            }));
        }
    }
    assert!(refused > 10, "{refused}");
}

#[test]
fn flipped_bytes_never_panic_and_never_change_a_value() {
    let original = tempfile::tempdir().unwrap();
    filled(original.path());
    let mut refused = 0;
    for path in files(original.path()) {
        let name = path.strip_prefix(original.path()).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let used: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at] != 0).collect();
        for at in used.iter().step_by(used.len() / 60 + 1) {
            refused += usize::from(refused_or_intact(original.path(), |dir| {
                let mut damaged = bytes.clone();
                damaged[*at] ^= 0x55;
                std::fs::write(dir.join(name), damaged).unwrap();
            }));
        }
    }
    assert!(refused > 10, "{refused}");
}

#[test]
fn a_database_without_its_generation_file_is_refused() {
    let original = tempfile::tempdir().unwrap();
    filled(original.path());
    assert!(refused_or_intact(original.path(), |dir| {
        std::fs::remove_file(dir.join("generation")).unwrap()
    }));
    assert!(refused_or_intact(original.path(), |dir| {
        std::fs::remove_dir_all(dir.join("db")).unwrap()
    }));
}
