//! A process's ledger as it starts, and what becomes of one that cannot be trusted: it is set aside, and the process joins as a new one under
//! an incarnation that it cannot have had before. Nobody has to come and delete a folder.

use std::time::{SystemTime, UNIX_EPOCH};

use everstep_store::{Ledger, LedgerError};

use crate::life::Life;
use crate::rundir::RunDir;

/// An open ledger, and what this start of its process is called.
#[derive(Debug)]
pub(crate) struct LocalState {
    pub(crate) ledger: Ledger,
    pub(crate) incarnation: u64,
    /// What was wrong with the ledger before this one, if it was set aside.
    pub(crate) damage: Option<String>,
}

/// Opens the ledger of process `name` and counts this start. `may_replace` is false where the ledger holds what nobody else knows.
///
/// # Errors
/// It is in use, the disk fails or is full, or it is damaged and may not be replaced.
pub(crate) fn open(
    run_dir: &RunDir,
    name: &str,
    may_replace: bool,
) -> Result<LocalState, LedgerError> {
    let dir = run_dir.ledger(name);
    let start = || {
        let ledger = Ledger::open(&dir)?;
        let incarnation = ledger.next_incarnation()?;
        Ok(LocalState {
            ledger,
            incarnation,
            damage: None,
        })
    };
    let reason = match start() {
        Err(LedgerError::Corrupt { reason, .. }) if may_replace => reason,
        other => return other,
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let seconds = now.map_or(0, |now| now.as_secs());
    let names = (0..).map(|number| format!("{name}.damaged-{seconds}-{number}"));
    let mut aside = names.map(|name| dir.with_file_name(name));
    let aside = aside.find(|aside| !aside.exists()).unwrap_or_default();
    std::fs::rename(&dir, &aside).map_err(|source| LedgerError::Io {
        dir: dir.clone(),
        source,
    })?;
    tracing::error!(
        reason,
        aside = %aside.display(),
        "the ledger is damaged and was set aside; the process joins as a new one"
    );
    let ledger = Ledger::open(&dir)?;
    // Starts are counted from 1, so no count comes near the clock; a ledger that was lost after another one began at the clock.
    let known = Life::read(run_dir, name).map_or(0, |life| life.incarnation);
    let incarnation = ledger.next_incarnation_above(known.max(seconds))?;
    Ok(LocalState {
        ledger,
        incarnation,
        damage: Some(reason),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_damaged_ledger_is_set_aside_and_no_incarnation_comes_twice() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(folder.path());
        let mut seen = Vec::new();
        for round in 0..3 {
            for _ in 0..2 {
                let state = open(&run_dir, "worker-0", true).unwrap();
                assert_eq!(state.damage, None);
                seen.push(state.incarnation);
                Life::own(state.incarnation)
                    .write(&run_dir, "worker-0")
                    .unwrap();
            }
            // Another kind of damage each time: lost, torn, and wrong bytes.
            let dir = run_dir.ledger("worker-0");
            let database = dir.join("db/db");
            match round {
                0 => fs::remove_dir_all(dir.join("db")).unwrap(),
                1 => fs::write(dir.join("generation"), "7").unwrap(),
                _ => fs::write(&database, vec![0x5a; 4096]).unwrap(),
            }
            assert!(matches!(
                open(&run_dir, "worker-0", false),
                Err(LedgerError::Corrupt { .. })
            ));
            let state = open(&run_dir, "worker-0", true).unwrap();
            assert!(state.damage.is_some(), "round {round}");
            seen.push(state.incarnation);
            Life::own(state.incarnation)
                .write(&run_dir, "worker-0")
                .unwrap();
        }
        assert!(seen.is_sorted_by(|a, b| a < b), "{seen:?}");
    }
}
