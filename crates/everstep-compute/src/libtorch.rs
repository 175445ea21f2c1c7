//! libtorch as a [`Backend`].

use std::collections::BTreeMap;

use everstep_model::Model;
use everstep_torch::{DeviceKind, Platform};
use everstep_train::{Backend, ComputeError, Replica, ReplicaPlan, RunConfig};

use crate::pretraining::Pretraining;

/// Models of `everstep-model`.
#[derive(Clone, Copy, Debug)]
pub struct Libtorch;

/// The only backend.
pub static LIBTORCH: Libtorch = Libtorch;

impl Backend for Libtorch {
    fn is_accelerated(&self, config: &RunConfig) -> Result<bool, ComputeError> {
        everstep_torch::load_cuda();
        let device = everstep_torch::select_device(&config.compute.device)?;
        Ok(DeviceKind::of(device) != DeviceKind::Cpu)
    }

    fn environment(&self, config: &RunConfig) -> Result<BTreeMap<String, String>, ComputeError> {
        everstep_torch::load_cuda();
        let device = everstep_torch::select_device(&config.compute.device)?;
        let platform = Platform::current(device);
        Ok(BTreeMap::from([
            (
                "device_kind".to_owned(),
                format!("{:?}", platform.device_kind),
            ),
            ("libtorch_version".to_owned(), platform.libtorch_version),
            ("instructions".to_owned(), platform.instructions),
        ]))
    }

    fn replica(&self, plan: &ReplicaPlan<'_>) -> Result<Box<dyn Replica>, ComputeError> {
        Ok(Box::new(Pretraining::new(plan.config, build_model(plan)?)))
    }
}

/// The run's model on its device, without parameters yet.
///
/// # Errors
/// The device is not there, or the model cannot be built.
pub fn build_model(plan: &ReplicaPlan<'_>) -> Result<Model, ComputeError> {
    let config = plan.config;
    everstep_torch::load_cuda();
    everstep_torch::pin_threads(plan.threads)?;
    let device = everstep_torch::select_device(&config.compute.device)?;
    let model = match config.compute.fp8 {
        true => Model::new_fp8(&config.model, device),
        false => Model::new(&config.model, device, config.compute.dtype),
    }?;
    let model = match plan.end_of_text.filter(|_| config.data.document_mask) {
        Some(end) => model.with_document_end(end),
        None => model,
    };
    let model = model.with_blocks(plan.layout.blocks().iter().map(|block| block.len));
    let model = match config.compute.recompute {
        true => model.with_recomputation(),
        false => model,
    };
    Ok(model.with_z_loss(config.optimizer_extras().z_loss)?)
}
