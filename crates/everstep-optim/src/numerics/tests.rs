use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::buffer::FloatBuffer;
use crate::config::GroupConfig;
use crate::digest::StateDigest;
use crate::layout::{Init, ParameterSpec};

fn layout(block_elements: usize) -> Arc<Layout> {
    let spec = |name: &str, shape: &[usize], init, update| ParameterSpec {
        name: name.into(),
        shape: shape.into(),
        init,
        update,
        group: 0,
    };
    let parameters = vec![
        spec("a", &[37, 11], Init::Normal { std: 0.5 }, Update::Decayed),
        spec("b", &[90], Init::Normal { std: 0.1 }, Update::Decayed),
        spec("c", &[53], Init::Ones, Update::Plain),
    ];
    Arc::new(Layout::new(parameters, block_elements).unwrap())
}

fn numerics(layout: &Arc<Layout>, grad_clip: f64) -> TrainingNumerics {
    let config = OptimizerConfig {
        grad_clip,
        warmup_steps: 2,
        ..OptimizerConfig::new(1e-2, 20)
    };
    TrainingNumerics::new(Arc::clone(layout), config, ComputeDtype::Float32).unwrap()
}

/// Gradient of a slot, made up from its key and cut into blocks.
fn gradients(layout: &Layout, step: u64, slot: u64) -> Vec<Gradient> {
    let source = self::layout(usize::MAX);
    let whole: Vec<f32> = (0..2)
        .flat_map(|block| source.initial_values(1 + step * 100 + slot, block))
        .collect();
    let blocks = layout.blocks().iter();
    blocks
        .map(|block| {
            let values = whole[block.offset..block.offset + block.len].to_vec();
            Gradient::new(values, 2.5 + slot as f64, 10 + slot)
        })
        .collect()
}

fn received(gradient: &Gradient) -> Gradient {
    let bytes = Bytes::copy_from_slice(gradient.values.as_bytes());
    Gradient {
        values: FloatBuffer::from_bytes(bytes).unwrap(),
        ..gradient.clone()
    }
}

/// Two slots per step; returns all parameters, then all moments.
fn train(numerics: &TrainingNumerics, num_steps: u64) -> Vec<u32> {
    let layout = numerics.layout();
    let mut states: Vec<BlockState> = (0..layout.num_blocks())
        .map(|block| numerics.initial_state(9, block))
        .collect();
    for step in 0..num_steps {
        let sums: Vec<Gradient> = gradients(layout, step, 0)
            .into_iter()
            .zip(gradients(layout, step, 1))
            .map(|(left, right)| numerics.sum(left, right))
            .collect();
        let reports: Vec<_> = (0..)
            .zip(&sums)
            .map(|(block, sum)| numerics.report(block, sum))
            .collect();
        let decision = numerics.decide(Step(step), &reports);
        assert!(decision.apply);
        for (block, (sum, state)) in sums.iter().zip(&mut states).enumerate() {
            numerics.apply(block as u32, Step(step), &decision, sum, state);
        }
    }
    let parts: [fn(&BlockState) -> &FloatBuffer; 3] = [
        |state| &state.parameters,
        |state| &state.first_moment,
        |state| &state.second_moment,
    ];
    parts
        .iter()
        .flat_map(|part| {
            states
                .iter()
                .flat_map(move |state| part(state).as_slice().to_vec())
        })
        .map(f32::to_bits)
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Without clipping nothing crosses blocks, so their size cannot matter. (With it, the norm's last bit may depend on the
    /// layout, which is part of a run's identity.)
    #[test]
    fn block_size_does_not_change_the_result(block_elements in 1usize..600) {
        let whole = train(&numerics(&layout(usize::MAX), 0.0), 5);
        prop_assert_eq!(train(&numerics(&layout(block_elements), 0.0), 5), whole);
    }
}

#[test]
fn buffers_of_any_kind_and_sharing_give_the_same_sums_and_reports() {
    let layout = layout(200);
    let numerics = numerics(&layout, 1.0);
    let slots = gradients(&layout, 0, 0)
        .into_iter()
        .zip(gradients(&layout, 0, 1));
    for (block, (left, right)) in (0..).zip(slots) {
        let expected = numerics.sum(left.clone(), right.clone());
        let report = numerics.report(block, &expected);
        assert_eq!(
            (report.loss_sum, report.tokens, report.finite),
            (6.0, 21, true)
        );
        for left in [left.clone(), received(&left)] {
            for right in [right.clone(), received(&right)] {
                let sum = numerics.sum(left.clone(), right);
                assert_eq!(sum, expected);
                assert_eq!(numerics.report(block, &received(&sum)), report);
            }
        }
    }
}

#[test]
fn sums_follow_the_tree() {
    // (a + b) + (c + d) is not ((a + b) + c) + d in floating point.
    let numerics = numerics(&layout(usize::MAX), 1.0);
    let leaf = |value: f32| Gradient::new(vec![value], f64::from(value), 1);
    let (a, b, c, d) = (leaf(1.0), leaf(2.0f32.powi(24)), leaf(1.0), leaf(1.0));
    let sum = |left: &Gradient, right: &Gradient| numerics.sum(left.clone(), right.clone());
    let tree = sum(&sum(&a, &b), &sum(&c, &d));
    let chain = sum(&sum(&sum(&a, &b), &c), &d);
    assert_eq!(tree.values.as_slice(), [16_777_218.0]);
    assert_eq!(chain.values.as_slice(), [16_777_216.0]);
    assert_eq!(tree.tokens, 4);
}

#[test]
fn snapshots_stay_as_they_were() {
    let numerics = numerics(&layout(usize::MAX), 1.0);
    let gradient = &gradients(numerics.layout(), 0, 0)[0];
    let decision = numerics.decide(Step(0), &[numerics.report(0, gradient)]);
    let mut state = numerics.initial_state(1, 0);
    let snapshot = state.clone();
    let parameters = numerics.parameters(0, &state);
    let before = StateDigest::of(&state);
    assert_eq!(
        snapshot.parameters.as_bytes().as_ptr(),
        state.parameters.as_bytes().as_ptr(),
        "costs nothing"
    );
    numerics.apply(0, Step(0), &decision, gradient, &mut state);
    assert_eq!(StateDigest::of(&snapshot), before);
    assert_eq!(parameters.as_bytes(), snapshot.parameters.as_bytes());
    let after = StateDigest::of(&state);
    assert!(after.parameters != before.parameters && after.optimizer != before.optimizer);
    let memory = state.parameters.as_bytes().as_ptr();
    numerics.apply(0, Step(1), &decision, gradient, &mut state);
    assert_eq!(
        state.parameters.as_bytes().as_ptr(),
        memory,
        "nobody holds it any more"
    );
}

#[test]
fn a_step_that_is_not_finite_is_skipped() {
    let layout = layout(200);
    let numerics = numerics(&layout, 1.0);
    let good = gradients(&layout, 0, 0);
    let reports = |gradients: &[Gradient]| -> Vec<_> {
        let blocks = (0..).zip(gradients);
        blocks
            .map(|(block, sum)| numerics.report(block, sum))
            .collect()
    };
    assert!(numerics.decide(Step(0), &reports(&good)).apply);
    let mut bad = good.clone();
    bad[1].values.make_mut()[17] = f32::NAN;
    let decision = numerics.decide(Step(0), &reports(&bad));
    assert!(!decision.apply);
    assert_eq!(
        decision,
        numerics.decide(Step(0), &reports(&bad)),
        "no NaN, which would differ from itself"
    );
    let mut state = numerics.initial_state(1, 0);
    let before = state.clone();
    numerics.apply(0, Step(0), &decision, &good[0], &mut state);
    assert_eq!(state, before);

    let bad_loss: Vec<_> = good
        .iter()
        .map(|it| Gradient {
            loss_sum: f64::NAN,
            ..it.clone()
        })
        .collect();
    let decision = numerics.decide(Step(0), &reports(&bad_loss));
    assert_eq!((decision.apply, decision.loss), (false, f64::INFINITY));
    let no_tokens: Vec<_> = good
        .iter()
        .map(|it| Gradient {
            tokens: 0,
            ..it.clone()
        })
        .collect();
    assert!(!numerics.decide(Step(0), &reports(&no_tokens)).apply);
    assert!(!numerics.decide(Step(0), &[]).apply);
}

#[test]
fn decisions_are_about_the_mean() {
    let layout = layout(usize::MAX);
    let report = |squared_norm| GradientReport {
        squared_norm,
        finite: true,
        loss_sum: 30.0,
        tokens: 10,
        load_excess: 0.0,
        history: History::default(),
    };
    let decision = numerics(&layout, 1.0).decide(Step(3), &[report(900.0), report(700.0)]);
    assert_eq!(
        (decision.gradient_norm, decision.loss, decision.tokens),
        (4.0, 3.0, 10)
    );
    assert_eq!(decision.scale, (1.0 / (4.0 + 1e-6) / 10.0) as f32);
    let decision = numerics(&layout, 0.0).decide(Step(3), &[report(900.0), report(700.0)]);
    assert_eq!(decision.scale, 0.1);
}

#[test]
fn wrong_sizes_are_refused() {
    let numerics = numerics(&layout(usize::MAX), 1.0);
    let gradient = &gradients(numerics.layout(), 0, 0)[1];
    assert_eq!(numerics.check_gradient(1, gradient), Ok(()));
    let error = BufferError::Length {
        expected: 497,
        actual: 53,
    };
    assert_eq!(numerics.check_gradient(0, gradient), Err(error));
    let state = numerics.initial_state(1, 1);
    assert_eq!(numerics.check_state(1, &state), Ok(()));
    assert_eq!(numerics.check_state(0, &state), Err(error));
    assert_eq!(
        numerics.check_parameters(0, &numerics.parameters(1, &state)),
        Err(error)
    );
}

/// Whoever changes a bit of initial values, sums, norms, decisions, schedules or updates changes every run; that must be
/// meant.
#[test]
fn bits_of_a_small_run_are_pinned() {
    let bytes: Vec<u8> = train(&numerics(&layout(100), 1.0), 12)
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect();
    assert_eq!(blake3::hash(&bytes).to_hex().as_str(), PINNED);
}
const PINNED: &str = "8c7cd7ee0d0c8cd11b4a4ad057326be6bf3e0c58cf6282b09b1564a2a45ec1fd";

#[test]
fn a_routers_bias_moves_against_the_load_and_is_no_part_of_the_norm() {
    let spec = |name: &str, update| ParameterSpec {
        name: name.into(),
        shape: vec![4],
        init: Init::Zeros,
        update,
        group: 0,
    };
    let rate = 0.25;
    let parameters = vec![
        spec("matrix", Update::Decayed),
        spec("bias", Update::Balance { rate }),
    ];
    let layout = Arc::new(Layout::new(parameters, 3).unwrap());
    let numerics = numerics(&layout, 1.0);
    let excess = [24.0, 0.0, -8.0, -16.0];
    let gradients: Vec<Gradient> = layout
        .blocks()
        .iter()
        .map(|block| match block.update {
            Update::Balance { .. } => excess[block.offset - 4..][..block.len].to_vec(),
            _ => vec![0.5; block.len],
        })
        .map(|values| Gradient::new(values, 1.0, 2))
        .collect();
    let reports: Vec<_> = (0..)
        .zip(&gradients)
        .map(|(block, gradient)| numerics.report(block, gradient))
        .collect();
    let decision = numerics.decide(Step(0), &reports);
    assert_eq!((decision.gradient_norm, decision.load_excess), (0.5, 24.0));
    let applied = |decision: &Decision| -> Vec<BlockState> {
        (0..)
            .zip(&gradients)
            .map(|(block, gradient)| {
                let mut state = numerics.initial_state(1, block);
                numerics.apply(block, Step(0), decision, gradient, &mut state);
                state
            })
            .collect()
    };
    let states = applied(&decision);
    let biases: Vec<f32> = states[2..]
        .iter()
        .flat_map(|state| state.parameters.as_slice().to_vec())
        .collect();
    assert_eq!(biases, [-rate, 0.0, rate, rate]);
    let moments = |state: &BlockState| {
        state
            .first_moment
            .as_slice()
            .iter()
            .all(|&value| value == 0.0)
    };
    assert!(!moments(&states[0]) && moments(&states[2]));
    let skipped = Decision {
        apply: false,
        ..decision
    };
    assert_eq!(applied(&skipped)[2], numerics.initial_state(1, 2));
}

#[test]
fn groups_have_rates_and_decays_of_their_own() {
    let mut parameters = layout(200).parameters().to_vec();
    for (parameter, group) in parameters.iter_mut().zip([0, 1, 2]) {
        parameter.group = group;
    }
    let layout = Arc::new(Layout::new(parameters, 1000).unwrap());
    let group = |lr_scale, weight_decay| GroupConfig {
        parameters: Vec::new(),
        lr_scale,
        weight_decay,
    };
    let config = OptimizerConfig {
        group: vec![group(0.0, None), group(0.5, Some(0.25))],
        ..OptimizerConfig::new(1e-2, 20)
    };
    let numerics = TrainingNumerics::new(layout, config, ComputeDtype::Float32).unwrap();
    // Without a gradient a step is its decay.
    let stepped = |block| {
        let mut state = numerics.initial_state(9, block);
        let before = state.parameters.as_slice().to_vec();
        let zeros = Gradient::new(vec![0.0; before.len()], 1.0, 1);
        let decision = numerics.decide(Step(0), &[numerics.report(block, &zeros)]);
        numerics.apply(block, Step(0), &decision, &zeros, &mut state);
        (before, state.parameters.as_slice().to_vec())
    };
    let decayed = |factor: f32, (before, after): (Vec<f32>, Vec<f32>)| {
        let expected: Vec<f32> = before.iter().map(|value| value * factor).collect();
        assert_eq!(after, expected);
    };
    let lr = numerics.config().learning_rate(Step(0));
    decayed((1.0 - lr * 0.1) as f32, stepped(0));
    decayed(1.0, stepped(1));
    decayed((1.0 - lr * 0.5 * 0.25) as f32, stepped(2));
}

#[test]
fn the_mean_of_parameters_stands_still_with_them() {
    let layout = layout(200);
    let config = OptimizerConfig {
        ema_decay: Some(0.75),
        moments: MomentDtype::Bfloat16,
        ..OptimizerConfig::new(1e-2, 20)
    };
    let numerics = TrainingNumerics::new(layout, config, ComputeDtype::Float32).unwrap();
    let gradients = gradients(numerics.layout(), 0, 0);
    let reports: Vec<_> = (0..)
        .zip(&gradients)
        .map(|(block, gradient)| numerics.report(block, gradient))
        .collect();
    let decision = numerics.decide(Step(0), &reports);
    let mut state = numerics.initial_state(9, 0);
    let before = state.clone();
    assert_eq!(state.average, state.parameters);
    let skipped = Decision {
        apply: false,
        ..decision
    };
    numerics.apply(0, Step(0), &skipped, &gradients[0], &mut state);
    assert_eq!(state, before);
    numerics.apply(0, Step(0), &decision, &gradients[0], &mut state);
    let parts = before.parameters.as_slice().iter();
    for ((old, new), mean) in parts
        .zip(state.parameters.as_slice())
        .zip(state.average.as_slice())
    {
        assert_eq!(*mean, old + 0.25 * (new - old));
    }
    assert_ne!(state.average, before.average);
    assert_eq!(numerics.check_state(0, &state), Ok(()));
}
