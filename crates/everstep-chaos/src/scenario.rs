//! A scenario file: which run is disturbed on which cluster, by what, and what must hold in the end.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use everstep_cluster::Topology;

mod check;
mod fault;
mod raw;
mod storm;

pub use check::{Check, DigestCheck};
pub use fault::{Action, Damage, Direction, Fault, Moment, Phase, Target, Weather};
pub use storm::{Spacing, Storm};

/// What is wrong with a scenario file; one line that names the file, the field and what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// The file cannot be read.
    #[error("{file}: cannot be read: {source}")]
    Read {
        /// The file.
        file: String,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, or a field that does not exist.
    #[error("{file}: {message}")]
    Parse {
        /// The file.
        file: String,
        /// What the parser says, in one line.
        message: String,
    },
    /// A field's value is not allowed.
    #[error("{file}: {field}: {message}")]
    Field {
        /// The file.
        file: String,
        /// The field.
        field: String,
        /// What is allowed.
        message: String,
    },
    /// The topology that the file names is wrong.
    #[error("{file}: workload.topology: {source}")]
    Topology {
        /// The file.
        file: String,
        /// What is wrong with it.
        source: everstep_cluster::TopologyError,
    },
}

/// A scenario, checked.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// The file.
    pub file: PathBuf,
    /// What it is called; the file's name without its ending.
    pub name: String,
    /// What is disturbed.
    pub workload: Workload,
    /// Single faults, each with its moment.
    pub faults: Vec<Fault>,
    /// Random faults one after the other.
    pub storm: Option<Storm>,
    /// What must hold in the end.
    pub check: Check,
    /// Bounds of the real run.
    pub limits: Limits,
}

/// What is disturbed.
#[derive(Debug, Clone)]
pub struct Workload {
    /// The run file.
    pub run: PathBuf,
    /// The topology file.
    pub topology: PathBuf,
    /// `field=value` overrides of the run file.
    pub set: Vec<String>,
}

/// When a real run is given up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// It may take this long in all.
    pub seconds: f64,
    /// It may commit no step for so long. Preparing data and the first step take longest.
    pub stall_seconds: f64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            seconds: 7_200.0,
            stall_seconds: 120.0,
        }
    }
}

impl Scenario {
    /// Reads and checks a scenario file.
    ///
    /// # Errors
    /// One line that names the file, the field and what is allowed.
    pub fn read(path: &Path) -> Result<Self, ScenarioError> {
        let text = std::fs::read_to_string(path).map_err(|source| ScenarioError::Read {
            file: path.display().to_string(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// Checks the text of a scenario file.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(text: &str, path: &Path) -> Result<Self, ScenarioError> {
        let raw: raw::Scenario = toml::from_str(text).map_err(|error| ScenarioError::Parse {
            file: path.display().to_string(),
            message: one_line(text, &error),
        })?;
        raw.check(path)
            .map_err(|(field, message)| ScenarioError::Field {
                file: path.display().to_string(),
                field,
                message,
            })
    }

    /// Reads the topology and checks that it has every target.
    ///
    /// # Errors
    /// One line that names the file, the field and what is allowed.
    pub fn topology(&self) -> Result<Topology, ScenarioError> {
        let topology =
            Topology::read(&self.workload.topology).map_err(|source| ScenarioError::Topology {
                file: self.file.display().to_string(),
                source,
            })?;
        for fault in self.all_faults() {
            fault
                .target
                .check(&topology)
                .map_err(|message| ScenarioError::Field {
                    file: self.file.display().to_string(),
                    field: fault.place.clone(),
                    message,
                })?;
        }
        Ok(topology)
    }

    /// Whether a fault strikes inside a process, which the run file must allow.
    pub fn injects(&self) -> bool {
        self.all_faults().any(|fault| fault.action.is_injected())
    }

    /// Whether a fault strikes links between processes, which must go through proxies then.
    pub fn needs_udp_proxy(&self) -> bool {
        self.all_faults()
            .any(|fault| fault.action.needs_udp_proxy())
    }

    /// Single faults and those of the storm.
    pub(crate) fn all_faults(&self) -> impl Iterator<Item = &Fault> {
        let storm = self.storm.iter().flat_map(|storm| &storm.faults);
        self.faults.iter().chain(storm.map(|(_, fault)| fault))
    }

    /// How many single faults are planned, repetitions counted.
    pub fn num_planned(&self) -> usize {
        self.faults.len()
            + self
                .storm
                .as_ref()
                .and_then(|storm| storm.count_max)
                .unwrap_or(0)
    }

    /// How often each kind of fault is planned among the single ones.
    pub fn kinds(&self) -> BTreeMap<String, usize> {
        let mut kinds = BTreeMap::new();
        for fault in &self.faults {
            *kinds.entry(fault.label()).or_default() += 1;
        }
        kinds
    }
}

fn one_line(text: &str, error: &toml::de::Error) -> String {
    let message = error
        .message()
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    match error.span().and_then(|span| text.get(..span.start)) {
        Some(before) => format!("line {}: {message}", before.matches('\n').count() + 1),
        None => message,
    }
}

#[cfg(test)]
mod tests;
