//! The model of a run with what it has learned.

use everstep_cli::{trained, user};
use everstep_cluster::RunContext;
use everstep_model::Model;

/// With the master parameters, or the running mean of them, at a committed step, at 0, or at the last one.
pub(crate) fn open(run: &RunContext, step: Option<u64>, is_mean: bool) -> anyhow::Result<Model> {
    let parameters = trained::parameters(run, step, is_mean)?;
    let mut model = everstep_compute::build_model(&run.replica_plan()).map_err(user)?;
    model.set_parameters_f32(0, &parameters)?;
    Ok(model)
}
