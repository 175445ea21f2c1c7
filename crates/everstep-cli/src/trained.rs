//! What a run has learned, for the commands that use it.

use everstep_cluster::{RunContext, Weights};

use crate::user;

/// The flattened master parameters, or the running mean of them, at a committed step, at 0, or at the last one.
///
/// # Errors
/// The step is not committed, or its checkpoint cannot be read.
pub fn parameters(run: &RunContext, step: Option<u64>, is_mean: bool) -> anyhow::Result<Vec<f32>> {
    let weights = match is_mean {
        true => Weights::Averaged,
        false => Weights::Trained,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime
        .block_on(run.parameters_at(step, weights))
        .map_err(user)
}
