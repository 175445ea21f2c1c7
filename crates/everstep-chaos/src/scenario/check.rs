//! What must hold in the end.

use std::collections::BTreeMap;

use serde::Deserialize;

/// What must hold in the end.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Check {
    /// What the weights are compared with.
    #[serde(default)]
    pub digest: DigestCheck,
    /// At least so many faults really happened; as many as are planned if not given.
    pub faults: Option<usize>,
    /// From at least so many the run recovered; as many as `faults` if not given.
    pub recoveries: Option<usize>,
    /// Longest time without a commit anywhere in the run.
    pub max_gap_seconds: Option<f64>,
    /// Longest time without a commit after a fault, less the length of an ordinary step, by kind and target (`"kill worker"`).
    #[serde(default)]
    pub gap_seconds_max: BTreeMap<String, f64>,
    /// Longest time until an event names the victim, by kind and target.
    #[serde(default)]
    pub detection_seconds_max: BTreeMap<String, f64>,
    /// Most processes that ended before the run was over, or were taken for dead (`0`: nobody may be).
    pub deaths_max: Option<usize>,
    /// Least share of slot computations that were not repeats.
    pub step_efficiency_min: Option<f64>,
    /// Workers that must have been quarantined; no other may have been.
    pub quarantined: Option<Vec<String>>,
    /// Least number of events of a kind (`rollback = 1`).
    #[serde(default)]
    pub events: BTreeMap<String, usize>,
    /// Most events of a kind (`process_lost = 0`).
    #[serde(default)]
    pub events_max: BTreeMap<String, usize>,
    /// Whether memory, threads and file descriptors of every process must stay flat.
    #[serde(default)]
    pub flat: bool,
}

/// What the digests are compared with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DigestCheck {
    /// Those of the same run in one process without faults.
    #[default]
    Undisturbed,
    /// With nothing: the fault changes the result by design, as a skipped step does.
    Any,
}
