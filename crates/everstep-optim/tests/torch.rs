//! Ten steps agree with `torch.optim.AdamW`, `clip_grad_norm_` and nanoGPT's schedule (fixtures/make_adamw.py), and ten with
//! `torch.optim.Muon` (fixtures/make_muon.py).

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use everstep_optim::{
    BlockState, ComputeDtype, Gradient, Init, Layout, MomentDtype, MuonConfig, OptimizerConfig,
    ParameterSpec, Schedule, TrainingNumerics, Update,
};
use everstep_protocol::{Decision, Numerics, Step};
use safetensors::SafeTensors;

const NUM_STEPS: u64 = 10;
const TOKENS: u64 = 48;

fn numbers<const BYTES: usize>(fixture: &SafeTensors<'_>, name: &str) -> Vec<[u8; BYTES]> {
    fixture
        .tensor(name)
        .unwrap()
        .data()
        .chunks_exact(BYTES)
        .map(|bytes| bytes.try_into().unwrap())
        .collect()
}

/// The named tensors of the fixture, as one vector in the layout's order.
fn vector(fixture: &SafeTensors<'_>, names: &[&str], suffix: &str) -> Vec<f32> {
    names
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

fn read(fixture: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    std::fs::read(folder.join(fixture)).unwrap()
}

fn parameter(fixture: &SafeTensors<'_>, name: &str, update: Update) -> ParameterSpec {
    let initial = fixture.tensor(&format!("{name}.initial")).unwrap();
    ParameterSpec {
        name: name.into(),
        shape: initial.shape().to_vec(),
        init: Init::Zeros,
        update,
        group: 0,
    }
}

/// A vector's blocks.
fn cut(layout: &Layout, values: Vec<f32>) -> Vec<Vec<f32>> {
    let blocks = layout.blocks().iter();
    blocks
        .map(|block| values[block.offset..block.offset + block.len].to_vec())
        .collect()
}

/// A part of all blocks' states, as one vector.
fn joined(part: fn(&BlockState) -> &[f32], states: &[BlockState]) -> Vec<f32> {
    states
        .iter()
        .flat_map(|state| part(state).to_vec())
        .collect()
}

/// The layout of `adamw.safetensors`, and its run with these moments and a mean of the weights.
fn adamw(fixture: &SafeTensors<'_>, moments: MomentDtype) -> TrainingNumerics {
    let parameters = vec![
        parameter(fixture, "matrix", Update::Decayed),
        parameter(fixture, "bias", Update::Plain),
    ];
    // Small, so that the matrix has several blocks; odd, so that a word of bfloat16 is half used.
    let layout = Arc::new(Layout::new(parameters, 31).unwrap());
    let config = OptimizerConfig {
        min_lr: 1e-3,
        betas: [0.9, 0.99],
        schedule: Schedule::Cosine,
        warmup_steps: 3,
        moments,
        ema_decay: Some(0.9),
        ..OptimizerConfig::new(1e-2, NUM_STEPS)
    };
    TrainingNumerics::new(layout, config, ComputeDtype::Float32).unwrap()
}

/// Runs all steps, and looks at each.
fn train(
    numerics: &TrainingNumerics,
    fixture: &SafeTensors<'_>,
    names: &[&str],
    mut look: impl FnMut(u64, &Decision, &[BlockState]),
) -> Vec<BlockState> {
    let cut = |values| cut(numerics.layout(), values);
    let mut states: Vec<BlockState> = cut(vector(fixture, names, "initial"))
        .into_iter()
        .map(|values| numerics.first_state(values))
        .collect();
    for step in 0..NUM_STEPS {
        let gradients: Vec<Gradient> = cut(vector(fixture, names, &format!("gradient_sum.{step}")))
            .into_iter()
            .map(|values| Gradient::new(values, 1.0, TOKENS))
            .collect();
        let reports: Vec<_> = (0..)
            .zip(&gradients)
            .map(|(block, gradient)| numerics.report(block, gradient))
            .collect();
        let decision = numerics.decide(Step(step), &reports);
        for (block, (gradient, state)) in gradients.iter().zip(&mut states).enumerate() {
            numerics.apply(block as u32, Step(step), &decision, gradient, state);
        }
        look(step, &decision, &states);
    }
    states
}

#[test]
fn ten_steps_agree_with_pytorch() {
    let bytes = read("adamw.safetensors");
    let fixture = SafeTensors::deserialize(&bytes).unwrap();
    let names = ["matrix", "bias"];
    let numerics = adamw(&fixture, MomentDtype::Float32);
    let norms = doubles(&fixture, "gradient_norms");
    let rates = doubles(&fixture, "learning_rates");
    assert!(
        norms.iter().any(|&norm| norm < 1.0) && norms.iter().any(|&norm| norm > 1.0),
        "{norms:?}"
    );
    let states = train(&numerics, &fixture, &names, |step, decision, states| {
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
        let actual = joined(|state| state.parameters.as_slice(), states);
        let expected = vector(&fixture, &names, &step.to_string());
        assert_close(&actual, &expected, &format!("parameters after step {step}"));
    });
    let first = joined(|state| state.first_moment.as_slice(), &states);
    let second = joined(|state| state.second_moment.as_slice(), &states);
    let average = joined(|state| state.average.as_slice(), &states);
    for (actual, name) in [
        (first, "first_moment"),
        (second, "second_moment"),
        (average, "average"),
    ] {
        assert_close(&actual, &vector(&fixture, &names, name), name);
    }
}

/// PyTorch rounds as it stores, too; where a moment is near a tie, one last bit of bfloat16 may differ.
#[test]
fn moments_in_bfloat16_agree_with_pytorch() {
    let bytes = read("adamw.safetensors");
    let fixture = SafeTensors::deserialize(&bytes).unwrap();
    let names = ["matrix", "bias"];
    let numerics = adamw(&fixture, MomentDtype::Bfloat16);
    let states = train(&numerics, &fixture, &names, |_, _, _| {});
    let actual = joined(|state| state.parameters.as_slice(), &states);
    let expected = vector(&fixture, &names, "bfloat16_moments");
    assert_close(&actual, &expected, "parameters");
    let in_float32 = vector(&fixture, &names, "9");
    let differs = |(a, b): (&f32, &f32)| (a - b).abs() > 1e-5;
    assert!(
        actual.iter().zip(&in_float32).any(differs),
        "nothing was rounded"
    );

    let halves = names
        .iter()
        .flat_map(|name| numbers(&fixture, &format!("{name}.bfloat16_first_moment")));
    let expected: Vec<u16> = halves.map(u16::from_le_bytes).collect();
    let blocks = numerics.layout().blocks().iter().zip(&states);
    let actual: Vec<u16> = blocks
        .flat_map(|(block, state)| {
            let words = state.first_moment.as_bytes();
            assert_eq!(words.len(), 4 * block.len.div_ceil(2));
            let halves = words.chunks_exact(2).take(block.len);
            halves.map(|half| u16::from_le_bytes(half.try_into().unwrap()))
        })
        .collect();
    let near = |(a, b): (&u16, &u16)| a.abs_diff(*b) <= 1;
    assert!(actual.iter().zip(&expected).all(near));
    assert_eq!(actual.len(), expected.len());
}

#[test]
fn ten_steps_of_muon_agree_with_pytorch() {
    let bytes = read("muon.safetensors");
    let fixture = SafeTensors::deserialize(&bytes).unwrap();
    let names = ["wide", "tall", "square"];
    let parameters = names
        .iter()
        .map(|name| parameter(&fixture, name, Update::Muon))
        .collect();
    // Blocks are whole matrices even if they are larger.
    let layout = Arc::new(Layout::new(parameters, 32).unwrap());
    assert_eq!(layout.num_blocks(), 3);
    let config = OptimizerConfig {
        schedule: Schedule::Constant,
        grad_clip: 0.0,
        muon: Some(MuonConfig::default()),
        ..OptimizerConfig::new(1e-2, NUM_STEPS)
    };
    let numerics =
        TrainingNumerics::new(Arc::clone(&layout), config, ComputeDtype::Float32).unwrap();
    let states = train(&numerics, &fixture, &names, |step, _, states| {
        let actual = joined(|state| state.parameters.as_slice(), states);
        let expected = vector(&fixture, &names, &step.to_string());
        assert_close(&actual, &expected, &format!("parameters after step {step}"));
    });
    let first = joined(|state| state.first_moment.as_slice(), &states);
    let expected = vector(&fixture, &names, "first_moment");
    assert_close(&first, &expected, "first moment");
}
