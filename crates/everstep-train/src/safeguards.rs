//! Sections of the run file about what is not trusted: lying devices, and faults made on purpose.

use std::path::Path;

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
    Ok(())
}
