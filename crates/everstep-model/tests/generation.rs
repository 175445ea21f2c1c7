//! Generation: the cache changes nothing, and equal draws give equal texts.

#![allow(clippy::unwrap_used)]

use std::ops::ControlFlow;

use everstep_model::generate::sampling_stream;
use everstep_model::{GenerateOptions, MicroBatch, Model, ModelError, Sampling};
use everstep_optim::{ComputeDtype, Layout};
use everstep_spec::{Architecture, ExpertsConfig, LatentConfig, ModelConfig, parameters};
use tch::Device;

const ARCHITECTURES: [Architecture; 3] = [
    Architecture::Llama,
    Architecture::Gpt2,
    Architecture::DeepseekV3,
];

fn model(architecture: Architecture) -> Model {
    model_for(architecture, 24)
}

fn model_for(architecture: Architecture, context: usize) -> Model {
    let mut config = ModelConfig {
        vocab_size: 37,
        init_std: 0.3,
        ..ModelConfig::new(architecture, 2, 4, 32, context)
    };
    if architecture == Architecture::DeepseekV3 {
        config.mla = Some(LatentConfig {
            q_lora_rank: Some(12),
            kv_lora_rank: 10,
            qk_nope_head_dim: 6,
            qk_rope_head_dim: 4,
            v_head_dim: 8,
        });
        config.moe = Some(ExpertsConfig::new(6, 2, 16));
    } else {
        config.kv_heads = 2;
    }
    let layout = Layout::new(parameters(&config), 1 << 20).unwrap();
    let mut model = Model::new(&config, Device::Cpu, ComputeDtype::Float32).unwrap();
    let mut offset = 0;
    for block in 0..layout.num_blocks() {
        let values = layout.initial_values(11, block);
        model.set_parameters_f32(offset, &values).unwrap();
        offset += values.len();
    }
    model
}

/// Logits of the token after `tokens`, from a full forward pass.
fn last_logits(model: &Model, tokens: &[i64]) -> Vec<f32> {
    let (inputs, targets) = (tokens.to_vec(), vec![0; tokens.len()]);
    let all = model
        .logits(&MicroBatch {
            inputs,
            targets,
            rows: 1,
            columns: tokens.len(),
        })
        .unwrap();
    all[all.len() - model.config().vocab_size..].to_vec()
}

fn options(sampling: Sampling, tokens_max: usize) -> GenerateOptions {
    GenerateOptions {
        sampling,
        tokens_max,
        stop: Vec::new(),
    }
}

#[test]
fn cached_logits_are_those_of_a_full_pass() {
    for architecture in ARCHITECTURES {
        let model = model(architecture);
        let text: Vec<i64> = (0..24).map(|index| (index * 7 + 3) % 37).collect();
        let mut sequence = model.sequence();
        let mut end = 0;
        // A prompt, single tokens, and several tokens behind a cache.
        for len in [5, 1, 1, 4, 1, 12] {
            let cached = sequence.push(&text[end..end + len]).unwrap();
            end += len;
            for (a, b) in cached.iter().zip(last_logits(&model, &text[..end])) {
                assert!(
                    (a - b).abs() <= 1e-5 * b.abs().max(1.0),
                    "{architecture:?} {end}: {a} {b}"
                );
            }
        }
    }
}

#[test]
fn greedy_takes_the_largest_logit_of_a_full_pass_even_beyond_the_context() {
    for architecture in ARCHITECTURES {
        let model = model(architecture);
        let made = model
            .generate(
                &[1, 2, 3],
                &options(Sampling::GREEDY, 60),
                sampling_stream(1, 0, 0),
                |_| ControlFlow::Continue(()),
            )
            .unwrap();
        assert_eq!(made.len(), 60);
        let mut seen = vec![1, 2, 3];
        for &token in &made {
            if seen.len() > 24 {
                seen.drain(..seen.len() - 12);
            }
            let logits = last_logits(&model, &seen);
            let best = (0..logits.len())
                .max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a)))
                .unwrap();
            assert_eq!(token, best as i64);
            seen.push(token);
        }
    }
}

#[test]
fn equal_keys_give_equal_texts_and_others_do_not() {
    let model = model(Architecture::Llama);
    let sampling = Sampling {
        temperature: 0.9,
        top_p: 0.95,
        top_k: 20,
    };
    let text = |sample| {
        let stream = sampling_stream(5, 3, sample);
        model
            .generate(&[4], &options(sampling, 40), stream, |_| {
                ControlFlow::Continue(())
            })
            .unwrap()
    };
    assert_eq!(text(0), text(0));
    assert_ne!(text(0), text(1));
}

#[test]
fn a_text_ends_where_it_is_told_to() {
    let model = model(Architecture::Gpt2);
    let stream = || sampling_stream(5, 3, 0);
    let all = model
        .generate(&[4], &options(Sampling::default(), 20), stream(), |_| {
            ControlFlow::Continue(())
        })
        .unwrap();
    let stop = GenerateOptions {
        stop: vec![all[5]],
        ..options(Sampling::default(), 20)
    };
    let stopped = model
        .generate(&[4], &stop, stream(), |_| ControlFlow::Continue(()))
        .unwrap();
    let end = all.iter().position(|&token| token == all[5]).unwrap();
    assert_eq!(stopped, all[..=end]);
    let mut seen = Vec::new();
    let broken = model.generate(&[4], &options(Sampling::default(), 20), stream(), |token| {
        seen.push(token);
        if seen.len() == 3 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    assert_eq!(
        (broken.unwrap(), seen),
        (all[..3].to_vec(), all[..3].to_vec())
    );
}

#[test]
fn what_cannot_be_used_is_refused() {
    let model = model(Architecture::Llama);
    let generate = |prompt: &[i64], sampling| {
        model.generate(
            prompt,
            &options(sampling, 1),
            sampling_stream(0, 0, 0),
            |_| ControlFlow::Continue(()),
        )
    };
    assert!(matches!(
        generate(&[], Sampling::GREEDY),
        Err(ModelError::EmptyBatch)
    ));
    assert!(matches!(
        generate(&[37], Sampling::GREEDY),
        Err(ModelError::UnknownToken { token: 37, .. })
    ));
    let sampling = Sampling {
        top_p: 2.0,
        ..Sampling::default()
    };
    assert!(matches!(
        generate(&[1], sampling),
        Err(ModelError::Option { field: "top_p", .. })
    ));
}

/// The compressed cache and the absorbed form against a full pass for every token, which knows neither.
#[test]
fn deepseek_v3_makes_the_tokens_that_it_makes_without_a_cache() {
    const NEW_TOKENS: usize = 256;
    let model = model_for(Architecture::DeepseekV3, NEW_TOKENS + 8);
    let prompt = [5, 9, 2, 30, 11, 7, 7, 1];
    let cached = model
        .generate(
            &prompt,
            &options(Sampling::GREEDY, NEW_TOKENS),
            sampling_stream(1, 0, 0),
            |_| ControlFlow::Continue(()),
        )
        .unwrap();
    let mut text = prompt.to_vec();
    for &token in &cached {
        let logits = last_logits(&model, &text);
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
        assert_eq!(best, Some(token as usize), "after {} tokens", text.len());
        text.push(token);
    }
    assert_eq!(cached.len(), NEW_TOKENS);
    let different: std::collections::BTreeSet<i64> = cached.into_iter().collect();
    assert!(
        different.len() > 5,
        "a model that repeats itself tells little"
    );
}
