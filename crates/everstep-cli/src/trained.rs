//! What a run has learned, for the commands that use it.

use everstep_cluster::RunContext;
use everstep_model::Model;

use crate::user;

/// The flattened master parameters at a committed step, at 0, or at the last one.
pub(crate) fn parameters(run: &RunContext, step: Option<u64>) -> anyhow::Result<Vec<f32>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(run.parameters_at(step)).map_err(user)
}

/// The model with them.
pub(crate) fn model(run: &RunContext, step: Option<u64>) -> anyhow::Result<Model> {
    let parameters = parameters(run, step)?;
    let mut model = run.build_model().map_err(user)?;
    model.set_parameters_f32(0, &parameters)?;
    Ok(model)
}
