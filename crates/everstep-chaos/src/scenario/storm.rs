//! Random faults one after the other.

use super::fault::{Fault, Moment};

/// A storm: faults drawn by weight, at a rate.
#[derive(Debug, Clone, PartialEq)]
pub struct Storm {
    /// What may strike, with its weight.
    pub faults: Vec<(f64, Fault)>,
    /// The time between two faults.
    pub spacing: Spacing,
    /// When it begins.
    pub from: Moment,
    /// How long it lasts; to the end of the run if not given.
    pub for_seconds: Option<f64>,
    /// It ends after so many faults.
    pub count_max: Option<usize>,
}

impl Storm {
    /// Whether it ends before the run does. The run is stopped after it.
    #[must_use]
    pub fn is_limited(&self) -> bool {
        self.for_seconds.is_some() || self.count_max.is_some()
    }
}

/// How far apart the faults of a storm are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Spacing {
    /// One every so many seconds.
    EverySeconds(f64),
    /// One every so many committed steps.
    EverySteps(u64),
    /// At random, as independent failures of many machines: exponentially distributed, with this mean.
    RandomSeconds(f64),
}
