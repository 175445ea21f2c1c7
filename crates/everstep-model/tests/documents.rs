//! Documents of a window that are kept apart are as if each stood in a window of its own.

#![allow(clippy::unwrap_used)]

use everstep_model::{Batch, IGNORED_TARGET, MicroBatch, Model};
use everstep_optim::{ComputeDtype, Layout};
use everstep_spec::{Architecture, ExpertsConfig, LatentConfig, ModelConfig, parameters};
use tch::Device;

const END: i64 = 0;

fn model(config: &ModelConfig) -> Model {
    let layout = Layout::new(parameters(config), 1 << 20).unwrap();
    let mut model = Model::new(config, Device::Cpu, ComputeDtype::Float32).unwrap();
    let mut offset = 0;
    for block in 0..layout.num_blocks() {
        let values = layout.initial_values(7, block);
        model.set_parameters_f32(offset, &values).unwrap();
        offset += values.len();
    }
    model
}

fn batch(inputs: &[i64]) -> Batch {
    let next = inputs[1..].iter().copied();
    Batch {
        micro_batches: vec![MicroBatch {
            inputs: inputs.to_vec(),
            targets: next.chain([IGNORED_TARGET]).collect(),
            rows: 1,
            columns: inputs.len(),
        }],
    }
}

/// The second of two documents gives the logits that it gives alone: rotations depend on distances only.
fn apart(config: &ModelConfig) {
    let (first, second) = ([5, 9, 3, 7, END], [4, 8, 8, 2, 6, END]);
    let both: Vec<i64> = first.iter().chain(&second).copied().collect();
    let vocab = config.vocab_size;
    let logits =
        |model: &Model, inputs: &[i64]| model.logits(&batch(inputs).micro_batches[0]).unwrap();
    let masked = model(config).with_document_end(END as u32);
    let together = logits(&masked, &both);
    let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
    assert!(close(
        &together[..first.len() * vocab],
        &logits(&masked, &first)
    ));
    assert!(close(
        &together[first.len() * vocab..],
        &logits(&masked, &second)
    ));
    let plain = logits(&model(config), &both);
    assert!(!close(&together, &plain));
    assert!(close(
        &together[..first.len() * vocab],
        &plain[..first.len() * vocab]
    ));

    // Gradients are finite, and those of one document are not those of two.
    let mut masked = masked;
    let gradient = masked.gradient(&batch(&both), 0).unwrap();
    assert!(gradient.blocks[0].iter().all(|value| value.is_finite()));
    let plain = model(config).gradient(&batch(&both), 0).unwrap();
    assert_ne!(gradient.blocks[0], plain.blocks[0]);
}

#[test]
fn llama() {
    let config = ModelConfig {
        vocab_size: 11,
        kv_heads: 2,
        ..ModelConfig::new(Architecture::Llama, 2, 4, 32, 16)
    };
    apart(&config);
}

#[test]
fn deepseek_v3() {
    let config = ModelConfig {
        vocab_size: 11,
        mla: Some(LatentConfig {
            q_lora_rank: None,
            kv_lora_rank: 8,
            qk_nope_head_dim: 8,
            qk_rope_head_dim: 4,
            v_head_dim: 8,
        }),
        moe: Some(ExpertsConfig::new(4, 2, 16)),
        ..ModelConfig::new(Architecture::DeepseekV3, 2, 2, 32, 16)
    };
    apart(&config);
}
