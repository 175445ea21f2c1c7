//! Sections of the run file about what is not trusted: lying devices, bad gradients, and faults made on purpose.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::RunFileError;
use crate::sections::{Determinism, RunFile};

/// Windows beyond this are slips of the keyboard.
const WINDOW_STEPS_MAX: u64 = 1 << 20;

/// `[audit]`: slots that are computed twice, on different workers, and compared by digest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuditConfig {
    /// Share of slots that are audited, 0 to 1. 0 (off) if left out. An audit costs one more computation of its slot, so `0.02`
    /// costs 2 % of the workers' time; a device that lies in a share `f` of its slots is expected to be found after
    /// `1 / (share * f)` of them.
    pub share: f64,
}

/// `[policy]`: what becomes of a step whose gradient or loss is bad.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyConfig {
    /// A gradient or loss that is not finite: `skip` the step (if left out) or `stop` the run.
    pub non_finite: NonFinite,
    /// Skips steps whose loss is far above those before; off if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_spike: Option<LossSpike>,
    /// The run stops when this many steps in a row were skipped. 10 if left out.
    pub max_skips: u64,
}

impl Default for PolicyConfig {
    fn default() -> Self {
        Self {
            non_finite: NonFinite::Skip,
            loss_spike: None,
            max_skips: 10,
        }
    }
}

/// What to do with a step whose gradient or loss is not finite.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NonFinite {
    /// Leave the parameters as they are and go on.
    #[default]
    Skip,
    /// End the run.
    Stop,
}

/// `policy.loss_spike`: a step is skipped if its loss is above `factor` times the running mean of the losses of applied steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossSpike {
    /// Above 1.
    pub factor: f64,
    /// Steps that the running mean spans; nothing is skipped before as many were applied. 100 if left out.
    #[serde(default = "default_window")]
    pub window: u64,
}

fn default_window() -> u64 {
    100
}

/// `[chaos]`: faults made on purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ChaosConfig {
    /// Whether `everstep chaos inject` may make processes of this run misbehave. False if left out.
    pub allow: bool,
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
    if sections.policy.max_skips == 0 {
        return wrong("policy.max_skips", "is 0; allowed: at least 1".into());
    }
    if let Some(LossSpike { factor, window }) = sections.policy.loss_spike {
        if !(factor.is_finite() && factor > 1.0) {
            return wrong(
                "policy.loss_spike.factor",
                format!("is {factor}; allowed: above 1"),
            );
        }
        if !(1..=WINDOW_STEPS_MAX).contains(&window) {
            return wrong(
                "policy.loss_spike.window",
                format!("is {window}; allowed: 1 to {WINDOW_STEPS_MAX} steps"),
            );
        }
    }
    Ok(())
}
