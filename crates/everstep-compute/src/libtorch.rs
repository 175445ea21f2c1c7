//! libtorch as a [`Backend`].

use std::collections::BTreeMap;

use everstep_model::Model;
use everstep_torch::{DeviceKind, Platform, TorchError};
use everstep_train::{Backend, ComputeError, Replica, ReplicaPlan, RunConfig};
use tch::Device;

use crate::pretraining::Pretraining;

/// Models of `everstep-model`.
#[derive(Clone, Copy, Debug)]
pub struct Libtorch;

impl Backend for Libtorch {
    fn is_accelerated(&self, config: &RunConfig) -> Result<bool, ComputeError> {
        Ok(DeviceKind::of(device(config)?) != DeviceKind::Cpu)
    }

    fn environment(&self, config: &RunConfig) -> Result<BTreeMap<String, String>, ComputeError> {
        let platform = Platform::current(device(config)?);
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

fn device(config: &RunConfig) -> Result<Device, TorchError> {
    everstep_torch::load_cuda();
    everstep_torch::select_device(&config.compute.device)
}

/// The run's model on its device, without parameters yet.
///
/// # Errors
/// The device is not there, or the model cannot be built.
pub fn build_model(plan: &ReplicaPlan<'_>) -> Result<Model, ComputeError> {
    let config = plan.config;
    let device = device(config)?;
    everstep_torch::pin_threads(plan.threads)?;
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
