//! Tensors that peers send are measured before a state machine sees them: it adds and applies without looking.

use everstep_optim::{BufferError, TrainingNumerics};
use everstep_protocol::{Member, Message};

use crate::message::StepMessage;
use crate::process::ProcessContext;

/// Whether a message's tensor has the size of its block; tells the log of one that has not, which is then to be dropped.
pub(super) fn fit(context: &ProcessContext, from: Member, message: &StepMessage) -> bool {
    match check(&context.run.numerics, message) {
        Ok(()) => true,
        Err((block, error)) => {
            tracing::error!(%from, block, %error, "a peer sent a tensor of another size");
            false
        }
    }
}

fn check(numerics: &TrainingNumerics, message: &StepMessage) -> Result<(), (u32, BufferError)> {
    let (block, checked) = match message {
        Message::Partial {
            block, gradient, ..
        }
        | Message::Replicate {
            block, gradient, ..
        } => (*block, numerics.check_gradient(*block, gradient)),
        Message::Parameters {
            block, parameters, ..
        } => (*block, numerics.check_parameters(*block, parameters)),
        Message::Seed { block, state, .. } => (*block, numerics.check_state(*block, state)),
        _ => return Ok(()),
    };
    checked.map_err(|error| (block, error))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use everstep_optim::{
        ComputeDtype, Gradient, Init, Layout, OptimizerConfig, ParameterSpec, Update,
    };
    use everstep_protocol::{Lineage, Step};

    use super::*;

    #[test]
    fn other_sizes_and_other_blocks_are_found() {
        let parameter = ParameterSpec {
            name: "w".to_owned(),
            shape: vec![3],
            init: Init::Ones,
            update: Update::Plain,
            group: 0,
        };
        let layout = Arc::new(Layout::new(vec![parameter], 8).unwrap());
        let config = OptimizerConfig {
            ema_decay: Some(0.9),
            ..OptimizerConfig::new(0.1, 1)
        };
        let numerics = TrainingNumerics::new(layout, config, ComputeDtype::Float32).unwrap();
        let replicate = |block, values: Vec<f32>| Message::Replicate {
            lineage: Lineage(1),
            step: Step(0),
            block,
            gradient: Gradient::new(values, 0.0, 1),
            testimonies: Vec::new(),
        };
        let seed = |state| Message::Seed {
            lineage: Lineage(1),
            block: 0,
            version: Step(0),
            last: None,
            state,
        };
        let state = numerics.initial_state(1, 0);
        let mut without_mean = state.clone();
        without_mean.average = Vec::new().into();
        assert_eq!(check(&numerics, &replicate(0, vec![1.0; 3])), Ok(()));
        assert_eq!(check(&numerics, &seed(state)), Ok(()));
        for wrong in [
            replicate(0, vec![1.0; 2]),
            replicate(1, vec![1.0; 3]),
            seed(without_mean),
        ] {
            assert!(check(&numerics, &wrong).is_err(), "{wrong:?}");
        }
    }
}
