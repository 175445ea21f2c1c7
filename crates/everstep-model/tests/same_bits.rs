//! A gradient is a pure function of parameters, batch and seed: the same bits again, with one thread and with two, and
//! in a model that has computed something else before.

#![allow(clippy::unwrap_used)]

use std::sync::{Mutex, PoisonError};

use everstep_model::{Batch, MicroBatch, Model, SlotGradient, dropout_seed};
use everstep_optim::{ComputeDtype, Layout};
use everstep_protocol::random::{Purpose, Stream};
use everstep_spec::{
    Architecture, ExpertsConfig, LatentConfig, Mlp, ModelConfig, Norm, Positions, PredictionConfig,
    parameters,
};
use everstep_torch::pin_threads;
use tch::Device;

/// The number of threads belongs to the process.
static THREADS: Mutex<()> = Mutex::new(());

/// The tensors whose gradients differ.
fn difference(config: &ModelConfig, a: &SlotGradient, b: &SlotGradient) -> String {
    let mut offset = 0;
    let mut names = Vec::new();
    for parameter in parameters(config) {
        let range = offset..offset + parameter.num_elements();
        offset = range.end;
        if a.blocks[0][range.clone()] != b.blocks[0][range] {
            names.push(parameter.name);
        }
    }
    format!("losses {} and {}, {names:?}", a.loss_sum, b.loss_sum)
}

#[derive(Clone, Copy)]
enum Precision {
    Plain(ComputeDtype),
    Fp8,
}

fn model(config: &ModelConfig, precision: Precision) -> Model {
    let layout = Layout::new(parameters(config), 1 << 20).unwrap();
    let mut model = match precision {
        Precision::Plain(dtype) => Model::new(config, Device::Cpu, dtype).unwrap(),
        Precision::Fp8 => Model::new_fp8(config, Device::Cpu).unwrap(),
    };
    let mut offset = 0;
    for block in 0..layout.num_blocks() {
        let values = layout.initial_values(7, block);
        model.set_parameters_f32(offset, &values).unwrap();
        offset += values.len();
    }
    assert_eq!(offset, model.num_elements());
    model
}

fn batch(config: &ModelConfig, micro_batches: usize, rows: usize, seed: u64) -> Batch {
    let columns = config.context;
    let mut stream = Stream::new(seed, Purpose::Evaluation, &[]);
    let mut tokens = || {
        (0..rows * columns)
            .map(|_| stream.below(config.vocab_size as u64) as i64)
            .collect()
    };
    let micro_batches = (0..micro_batches).map(|_| MicroBatch {
        inputs: tokens(),
        targets: tokens(),
        rows,
        columns,
    });
    Batch {
        micro_batches: micro_batches.collect(),
    }
}

fn bits(gradient: &SlotGradient) -> (Vec<u32>, u64) {
    (
        gradient
            .blocks
            .iter()
            .flatten()
            .map(|value| value.to_bits())
            .collect(),
        gradient.loss_sum.to_bits(),
    )
}

/// One layer says as much as many, but its tensors must be large enough for libtorch to divide them among threads.
fn shapes() -> Vec<(&'static str, ModelConfig, usize)> {
    let shakespeare = ModelConfig {
        vocab_size: 65,
        ..ModelConfig::new(Architecture::Gpt2, 1, 4, 128, 64)
    };
    let llama = ModelConfig {
        vocab_size: 512,
        kv_heads: 2,
        ..ModelConfig::new(Architecture::Llama, 1, 4, 128, 64)
    };
    vec![
        (
            "shakespeare",
            ModelConfig {
                bias: false,
                ..shakespeare.clone()
            },
            12,
        ),
        (
            "gpt2 with dropout",
            ModelConfig {
                dropout: 0.1,
                ..shakespeare
            },
            12,
        ),
        (
            "llama with grouped queries and dropout",
            ModelConfig {
                dropout: 0.1,
                ..llama.clone()
            },
            16,
        ),
        (
            "llama, wider than long",
            ModelConfig {
                vocab_size: 65,
                tied_embeddings: true,
                ..ModelConfig::new(Architecture::Llama, 1, 6, 384, 16)
            },
            16,
        ),
        (
            "odd sizes",
            ModelConfig {
                vocab_size: 101,
                ..ModelConfig::new(Architecture::Llama, 2, 5, 80, 33)
            },
            3,
        ),
        (
            "everything crossed",
            ModelConfig {
                norm: Norm::Layer,
                positions: Positions::Learned,
                mlp: Mlp::GeluTanh,
                bias: true,
                ..llama
            },
            16,
        ),
        (
            "deepseek_v3 with groups of experts, modules that predict further tokens and dropout",
            ModelConfig {
                vocab_size: 101,
                dropout: 0.1,
                mla: Some(LatentConfig {
                    q_lora_rank: Some(48),
                    kv_lora_rank: 32,
                    qk_nope_head_dim: 32,
                    qk_rope_head_dim: 16,
                    v_head_dim: 32,
                }),
                moe: Some(ExpertsConfig {
                    groups: 4,
                    groups_per_token: 2,
                    balance_loss: 0.01,
                    ..ExpertsConfig::new(16, 4, 64)
                }),
                mtp: Some(PredictionConfig::new(2)),
                ..ModelConfig::new(Architecture::DeepseekV3, 2, 4, 128, 64)
            },
            12,
        ),
    ]
}

fn same_bits(precision: Precision) {
    let _threads = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
    for (name, config, rows) in shapes() {
        let micro_batches = if config.dropout > 0.0 { 2 } else { 1 };
        let slot = batch(&config, micro_batches, rows, 1);
        let other = batch(&config, 1, 1, 2);
        let seed = dropout_seed(1, 2, 3);
        pin_threads(1).unwrap();
        let mut first = model(&config, precision);
        let expected = first.gradient(&slot, seed).unwrap();
        assert!(
            expected.blocks[0].iter().all(|value| value.is_finite()),
            "{name}"
        );
        assert!(
            expected.blocks[0].iter().any(|&value| value != 0.0),
            "{name}"
        );
        first.gradient(&other, 5).unwrap();
        first.evaluate(&slot).unwrap();
        assert!(
            bits(&first.gradient(&slot, seed).unwrap()) == bits(&expected),
            "{name}: again"
        );
        let loss = first.evaluate(&slot).unwrap();
        pin_threads(2).unwrap();
        let two = first.gradient(&slot, seed).unwrap();
        assert!(
            bits(&two) == bits(&expected),
            "{name}: two threads: {}",
            difference(&config, &two, &expected)
        );
        assert_eq!(
            first.evaluate(&slot).unwrap(),
            loss,
            "{name}: evaluation with two threads"
        );
        let mut second = model(&config, precision);
        assert!(
            bits(&second.gradient(&slot, seed).unwrap()) == bits(&expected),
            "{name}: another model"
        );
        // In blocks that end anywhere.
        let num_elements = first.num_elements();
        let lens = [1, num_elements / 3, num_elements - num_elements / 3 - 1];
        let mut third = model(&config, precision)
            .with_recomputation()
            .with_blocks(lens);
        let again = third.gradient(&slot, seed).unwrap();
        assert!(
            bits(&again) == bits(&expected),
            "{name}: layers computed again"
        );
        if config.dropout > 0.0 {
            assert!(
                bits(&first.gradient(&slot, seed + 1).unwrap()) != bits(&expected),
                "{name}: another seed"
            );
            assert_ne!(
                loss.loss_sum, expected.loss_sum,
                "{name}: evaluation drops nothing"
            );
        }
    }
}

#[test]
fn float32() {
    same_bits(Precision::Plain(ComputeDtype::Float32));
}

#[test]
fn bfloat16() {
    same_bits(Precision::Plain(ComputeDtype::Bfloat16));
}

#[test]
fn fp8() {
    same_bits(Precision::Fp8);
}

#[test]
fn models_in_one_process_do_not_share_their_dropout() {
    let _threads = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
    pin_threads(1).unwrap();
    let config = ModelConfig {
        vocab_size: 31,
        dropout: 0.2,
        ..ModelConfig::new(Architecture::Llama, 2, 2, 32, 16)
    };
    let slot = batch(&config, 2, 4, 1);
    let expected: Vec<_> = (0..4)
        .map(|seed| {
            bits(
                &model(&config, Precision::Plain(ComputeDtype::Float32))
                    .gradient(&slot, seed)
                    .unwrap(),
            )
        })
        .collect();
    std::thread::scope(|scope| {
        for (seed, expected) in expected.iter().enumerate() {
            let (config, slot) = (&config, &slot);
            scope.spawn(move || {
                pin_threads(1).unwrap();
                let mut model = model(config, Precision::Plain(ComputeDtype::Float32));
                for _ in 0..8 {
                    assert!(
                        bits(&model.gradient(slot, seed as u64).unwrap()) == *expected,
                        "seed {seed}"
                    );
                }
            });
        }
    });
}

#[test]
fn bfloat16_is_near_float32() {
    let _threads = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
    pin_threads(2).unwrap();
    for (name, config, rows) in shapes().into_iter().skip(2).step_by(2) {
        let config = ModelConfig {
            dropout: 0.0,
            ..config
        };
        let slot = batch(&config, 1, rows, 1);
        let wide = model(&config, Precision::Plain(ComputeDtype::Float32))
            .gradient(&slot, 0)
            .unwrap();
        let narrow = model(&config, Precision::Plain(ComputeDtype::Bfloat16))
            .gradient(&slot, 0)
            .unwrap();
        assert!(
            (wide.loss_sum - narrow.loss_sum).abs() < 1e-3 * wide.loss_sum,
            "{name}"
        );
        let dot = |a: &[f32], b: &[f32]| {
            a.iter()
                .zip(b)
                .map(|(&a, &b)| f64::from(a) * f64::from(b))
                .sum::<f64>()
        };
        let (a, b) = (&wide.blocks[0], &narrow.blocks[0]);
        let cosine = dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
        assert!(cosine > 0.999, "{name}: {cosine}");
    }
}
