//! Ten steps agree with `torch.optim.AdamW`, `clip_grad_norm_` and nanoGPT's schedule (fixtures/make_adamw.py).

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use everstep_optim::{
    BlockState, ComputeDtype, Gradient, Init, Layout, OptimizerConfig, ParameterSpec, Schedule,
    TrainingNumerics, Update,
};
use everstep_protocol::{Numerics, Step};
use safetensors::SafeTensors;

const NUM_STEPS: u64 = 10;
const TOKENS: u64 = 48;
const NAMES: [&str; 2] = ["matrix", "bias"];

fn numbers<const BYTES: usize>(fixture: &SafeTensors<'_>, name: &str) -> Vec<[u8; BYTES]> {
    fixture
        .tensor(name)
        .unwrap()
        .data()
        .chunks_exact(BYTES)
        .map(|bytes| bytes.try_into().unwrap())
        .collect()
}

/// Both tensors of the fixture, as one vector in the layout's order.
fn vector(fixture: &SafeTensors<'_>, suffix: &str) -> Vec<f32> {
    NAMES
        .iter()
        .flat_map(|name| numbers(fixture, &format!("{name}.{suffix}")))
        .map(f32::from_le_bytes)
        .collect()
}

fn doubles(fixture: &SafeTensors<'_>, name: &str) -> Vec<f64> {
    numbers(fixture, name)
        .into_iter()
        .map(f64::from_le_bytes)
        .collect()
}

/// Relative to the value, with a floor of a hundredth for values that are differences of larger ones.
fn assert_close(actual: &[f32], expected: &[f32], what: &str) {
    assert_eq!(actual.len(), expected.len());
    for (index, (&actual, &expected)) in actual.iter().zip(expected).enumerate() {
        let error = (f64::from(actual) - f64::from(expected)).abs();
        assert!(
            error <= 1e-5 * f64::from(expected.abs()).max(1e-2),
            "{what}[{index}]: {actual} is not {expected}"
        );
    }
}

#[test]
fn ten_steps_agree_with_pytorch() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/adamw.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let fixture = SafeTensors::deserialize(&bytes).unwrap();
    let parameters = NAMES
        .iter()
        .map(|&name| ParameterSpec {
            name: name.into(),
            shape: fixture
                .tensor(&format!("{name}.initial"))
                .unwrap()
                .shape()
                .to_vec(),
            init: Init::Zeros,
            update: if name == "matrix" {
                Update::Decayed
            } else {
                Update::Plain
            },
        })
        .collect();
    // Small, so that the matrix has several blocks.
    let layout = Arc::new(Layout::new(parameters, 32).unwrap());
    let config = OptimizerConfig {
        min_lr: 1e-3,
        betas: [0.9, 0.99],
        schedule: Schedule::Cosine,
        warmup_steps: 3,
        ..OptimizerConfig::new(1e-2, NUM_STEPS)
    };
    let numerics =
        TrainingNumerics::new(Arc::clone(&layout), config, ComputeDtype::Float32).unwrap();
    let cut = |values: Vec<f32>| -> Vec<Vec<f32>> {
        layout
            .blocks()
            .iter()
            .map(|block| values[block.offset..block.offset + block.len].to_vec())
            .collect()
    };
    let joined = |part: fn(&BlockState) -> &[f32], states: &[BlockState]| -> Vec<f32> {
        states
            .iter()
            .flat_map(|state| part(state).to_vec())
            .collect()
    };

    let mut states: Vec<BlockState> = cut(vector(&fixture, "initial"))
        .into_iter()
        .map(BlockState::new)
        .collect();
    let norms = doubles(&fixture, "gradient_norms");
    let rates = doubles(&fixture, "learning_rates");
    assert!(
        norms.iter().any(|&norm| norm < 1.0) && norms.iter().any(|&norm| norm > 1.0),
        "{norms:?}"
    );
    for step in 0..NUM_STEPS {
        let gradients: Vec<Gradient> = cut(vector(&fixture, &format!("gradient_sum.{step}")))
            .into_iter()
            .map(|values| Gradient::new(values, 1.0, TOKENS))
            .collect();
        let reports: Vec<_> = gradients
            .iter()
            .zip(0..)
            .map(|(gradient, block)| numerics.report(block, gradient))
            .collect();
        let decision = numerics.decide(Step(step), &reports);
        let norm = norms[step as usize];
        assert!(
            (decision.gradient_norm - norm).abs() <= 1e-6 * norm,
            "{} is not {norm}",
            decision.gradient_norm
        );
        let rate = rates[step as usize];
        assert!(
            (numerics.config().learning_rate(Step(step)) - rate).abs() <= 1e-15 * rate.max(1.0)
        );
        for (block, (gradient, state)) in gradients.iter().zip(&mut states).enumerate() {
            numerics.apply(block as u32, Step(step), &decision, gradient, state);
        }
        let actual = joined(|state| state.parameters.as_slice(), &states);
        assert_close(
            &actual,
            &vector(&fixture, &step.to_string()),
            &format!("parameters after step {step}"),
        );
    }
    let first = joined(|state| state.first_moment.as_slice(), &states);
    assert_close(&first, &vector(&fixture, "first_moment"), "first moment");
    let second = joined(|state| state.second_moment.as_slice(), &states);
    assert_close(&second, &vector(&fixture, "second_moment"), "second moment");
}
