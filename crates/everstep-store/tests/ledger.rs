//! The ledger across real processes.

#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use everstep_store::{Ledger, LedgerError};

/// Starts a process that opens the ledger and counts incarnations, one line each, until it is killed.
fn counter(dir: &Path) -> (Child, impl Iterator<Item = u64> + use<>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_counter", "--nocapture"])
        .env("EVERSTEP_TEST_LEDGER", dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok);
    let numbers = lines.filter_map(|line| line.split("incarnation ").nth(1)?.parse().ok());
    (child, numbers)
}

/// Not a test by itself: what the others start and kill.
#[test]
fn child_counter() {
    let Ok(dir) = std::env::var("EVERSTEP_TEST_LEDGER") else {
        return;
    };
    let ledger = Ledger::open(Path::new(&dir)).unwrap();
    loop {
        println!("incarnation {}", ledger.next_incarnation().unwrap());
    }
}

#[test]
fn no_incarnation_is_handed_out_twice_however_often_the_process_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let mut last = 0;
    for lines in [1, 7, 30, 3, 60] {
        let (mut child, mut numbers) = counter(dir.path());
        for _ in 0..lines {
            let number = numbers.next().unwrap();
            assert!(number > last, "{number} after {last}");
            last = number;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // What it printed before it was killed counts too.
        last = numbers.last().unwrap_or(last).max(last);
    }
    let ledger = Ledger::open(dir.path()).unwrap();
    assert!(ledger.incarnation().unwrap() >= last);
    assert!(ledger.next_incarnation().unwrap() > last);
}

#[test]
fn a_second_process_is_told_which_one_holds_the_ledger() {
    let dir = tempfile::tempdir().unwrap();
    let (mut child, mut numbers) = counter(dir.path());
    assert_eq!(numbers.next(), Some(1));
    let error = Ledger::open(dir.path()).unwrap_err();
    assert!(
        matches!(&error, LedgerError::InUse { holder, .. } if *holder == child.id().to_string()),
        "{error}"
    );
    child.kill().unwrap();
    child.wait().unwrap();
    Ledger::open(dir.path()).unwrap();
}
