//! Sections of the run file about what is not trusted: lying devices, and faults made on purpose.

use std::path::Path;

use everstep_protocol::policy::LossPolicy;
use serde::{Deserialize, Serialize};

use crate::error::RunFileError;
use crate::sections::{Determinism, RunFile};

/// `[audit]`: slots that are computed twice, on different workers, and compared by digest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuditConfig {
    /// Share of slots that are audited, 0 to 1. 0 (off) if left out. An audit costs one more computation of its slot, so `0.02`
    /// costs 2 % of the workers' time; a device that lies in a share `f` of its slots is expected to be found after
    /// `1 / (share * f)` of them.
    pub share: f64,
}

/// `[chaos]`: faults made on purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ChaosConfig {
    /// Whether `everstep chaos inject` may make processes of this run misbehave. False if left out.
    pub allow: bool,
}

/// What is done about a step whose gradient is not finite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NonFinite {
    /// The step is committed without its update.
    #[default]
    Skip,
}

/// What is done about a step whose loss is a spike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LossSpike {
    /// Nothing is called a spike.
    #[default]
    Off,
    /// The step is committed without its update.
    Skip,
}

/// `[policy]`: steps that are not what they should be. The verdict on a step is a pure function of the committed steps before it, so it is the
/// same whatever fails. Going back to an earlier checkpoint (`rollback`) is not offered.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyConfig {
    /// A gradient or loss that is not finite: `skip`.
    pub non_finite: NonFinite,
    /// A loss that is a spike: `off` (if left out) or `skip`. Decides the numbers of a run, so it cannot change when a run goes on.
    pub loss_spike: LossSpike,
    /// A mean loss this many standard deviations above the mean of earlier ones is a spike. The deviation counts as at least a thousandth
    /// of the mean. 6 if left out.
    pub spike_sd: f64,
    /// Steps over which mean and variance are taken: losses are weighted exponentially, by `2 / (spike_window + 1)`, those of skipped steps
    /// not at all, and before so many steps nothing is a spike. 100 if left out.
    pub spike_window: u32,
    /// The run ends with an error after this many skipped steps in a row; 0: it never does. 100 if left out.
    pub skip_limit: u32,
}

impl Default for PolicyConfig {
    fn default() -> Self {
        Self {
            non_finite: NonFinite::Skip,
            loss_spike: LossSpike::Off,
            spike_sd: 6.0,
            spike_window: 100,
            skip_limit: 100,
        }
    }
}

impl PolicyConfig {
    /// The policy as the shards' arithmetic takes it.
    pub fn losses(&self) -> LossPolicy {
        match self.loss_spike {
            LossSpike::Off => LossPolicy::default(),
            LossSpike::Skip => LossPolicy {
                spike_sd: self.spike_sd,
                window: self.spike_window,
            },
        }
    }
}

pub(crate) fn check(file: &Path, sections: &RunFile) -> Result<(), RunFileError> {
    let wrong = |field: &str, reason: String| Err(RunFileError::field(file, field, reason));
    let share = sections.audit.share;
    if !(0.0..=1.0).contains(&share) {
        return wrong("audit.share", format!("is {share}; allowed: 0 (off) to 1"));
    }
    if share > 0.0 && sections.run.determinism == Determinism::Relaxed {
        return wrong(
            "audit.share",
            format!(
                "is {share} in a run of relaxed determinism, where honest devices differ; allowed: 0, or run.determinism = \"strict\""
            ),
        );
    }
    let PolicyConfig {
        spike_sd,
        spike_window,
        ..
    } = sections.policy;
    if !(spike_sd.is_finite() && spike_sd > 0.0) {
        return wrong(
            "policy.spike_sd",
            format!("is {spike_sd}; allowed: a number above 0"),
        );
    }
    if spike_window < 2 {
        return wrong(
            "policy.spike_window",
            format!("is {spike_window}; allowed: 2 or more"),
        );
    }
    Ok(())
}
