//! How many slots the workers of a process have computed, over all its lives: what step efficiency is measured with.
//!
//! `DIR/status/<process>.slots` holds two lines of one fixed width, replaced in place by one `pwrite` per slot: a process that is killed
//! loses no count, and a reader never sees half of one.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::sync::{Mutex, PoisonError};

use everstep_telemetry::SlotCounts;

use crate::rundir::RunDir;

const SUFFIX: &str = ".slots";

/// Counts of one process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    computed: u64,
    audited: u64,
}

impl Counts {
    fn to_text(self) -> String {
        format!(
            "computed {:020}\naudited  {:020}\n",
            self.computed, self.audited
        )
    }

    /// What a file says; a file that is something else counts nothing.
    fn parse(text: &str) -> Self {
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|value| value.trim().parse().ok())
                .unwrap_or(0)
        };
        Self {
            computed: value("computed "),
            audited: value("audited "),
        }
    }
}

/// Counts the slots that this process computes. Shared by its workers.
#[derive(Debug)]
pub(crate) struct SlotCounter {
    file: File,
    counts: Mutex<Counts>,
}

impl SlotCounter {
    /// Goes on from what earlier lives of process `name` counted.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub(crate) fn open(run_dir: &RunDir, name: &str) -> std::io::Result<Self> {
        fs::create_dir_all(run_dir.status())?;
        let path = run_dir.status().join(format!("{name}{SUFFIX}"));
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)?;
        let counts = Counts::parse(&fs::read_to_string(&path).unwrap_or_default());
        Ok(Self {
            file,
            counts: Mutex::new(counts),
        })
    }

    /// One more slot is computed; `is_audit` if it was computed a second time on purpose.
    pub(crate) fn count(&self, is_audit: bool) {
        // A count is right between any two instructions, so poisoning carries no information.
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts.computed += 1;
        counts.audited += u64::from(is_audit);
        if let Err(error) = self.file.write_all_at(counts.to_text().as_bytes(), 0) {
            tracing::warn!(%error, "the count of slots cannot be written");
        }
    }
}

/// What all processes of the run directory have computed so far.
///
/// # Errors
/// The status folder cannot be read.
pub(crate) fn read(run_dir: &RunDir, per_step: u64) -> std::io::Result<SlotCounts> {
    let mut slots = SlotCounts {
        per_step,
        ..SlotCounts::default()
    };
    for counts in fs::read_dir(run_dir.status())?
        .flatten()
        .filter_map(counts_of)
    {
        slots.computed += counts.computed;
        slots.audited += counts.audited;
    }
    Ok(slots)
}

fn counts_of(entry: fs::DirEntry) -> Option<Counts> {
    let path = entry.path();
    let is_counter = entry.file_name().to_string_lossy().ends_with(SUFFIX);
    is_counter.then(|| Counts::parse(&fs::read_to_string(path).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_survive_their_process_and_add_up() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(folder.path());
        let first = SlotCounter::open(&run_dir, "worker-0").unwrap();
        first.count(false);
        first.count(true);
        let other = SlotCounter::open(&run_dir, "worker-1").unwrap();
        other.count(false);
        // No close, no flush: as after a SIGKILL.
        let second = SlotCounter::open(&run_dir, "worker-0").unwrap();
        second.count(false);
        let slots = read(&run_dir, 8).unwrap();
        assert_eq!(
            slots,
            SlotCounts {
                per_step: 8,
                computed: 4,
                audited: 1
            }
        );
    }

    #[test]
    fn a_damaged_file_counts_nothing() {
        for text in ["", "computed", "computed x\naudited -1\n", "\0\0\0"] {
            assert_eq!(Counts::parse(text), Counts::default(), "{text:?}");
        }
    }
}
