//! Scenarios that break a run on purpose, on real processes, and measure what it cost.
//!
//! - `scenario`: the file: workload, faults, storm, checks
//! - `run`: a scenario from beginning to end
//! - `simulate`: the same file in the simulator
//! - `driver`: strikes a run on real processes when a fault is due
//! - `store`: the disturbed run's object store, and how it is spoilt
//! - `process`: what the system says of a process
//! - `proxy`: bad links between processes
//! - `record`: what really happened
//! - `measure`, `resources`: what it cost, as pure functions of the records
//! - `report`: verdict, table, JSON, picture

#![cfg_attr(test, allow(clippy::unwrap_used))]

use std::path::{Path, PathBuf};

mod driver;
pub mod measure;
pub mod process;
pub mod proxy;
pub mod record;
pub mod report;
pub mod resources;
mod run;
pub mod scenario;
mod simulate;
mod store;

pub use driver::{Observed, TrainCommand};
pub use run::{RunOptions, run};
pub use simulate::{SimulatedKind, SimulationReport, simulate};

/// Why a scenario could not be run.
#[derive(Debug, thiserror::Error)]
pub enum ChaosError {
    /// The scenario file.
    #[error(transparent)]
    Scenario(#[from] scenario::ScenarioError),
    /// Anything else that the user can mend, in one line.
    #[error("{0}")]
    User(String),
    /// The system refused something.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Something else went wrong.
    #[error("{0}")]
    Failed(String),
}

impl ChaosError {
    pub(crate) fn io(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }

    /// Whether the user made a mistake.
    #[must_use]
    pub fn is_users(&self) -> bool {
        matches!(self, Self::Scenario(_) | Self::User(_))
    }
}
