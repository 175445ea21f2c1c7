//! The same weights in Hugging Face's models on PyTorch and here: logits, loss and gradients agree in float32.
//!
//! `fixtures/make_fixtures.py` made the expected values.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use everstep_model::{Batch, MicroBatch, Model};
use everstep_optim::{ComputeDtype, ParameterSpec};
use everstep_spec::{hugging_face, parameters};
use safetensors::SafeTensors;
use tch::Device;

const TOLERANCE: f64 = 1e-5;
const Z_LOSS: f64 = 0.01;
const BALANCE_LOSS: f64 = 0.01;

struct Fixture {
    bytes: Vec<u8>,
    json: PathBuf,
}

impl Fixture {
    fn open(name: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
        let bytes = fs::read(folder.join(format!("{name}.safetensors"))).unwrap();
        Self {
            bytes,
            json: folder.join(format!("{name}.json")),
        }
    }

    fn float(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let data = tensors.tensor(name).unwrap();
        data.data()
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
            .collect()
    }

    fn tokens(&self, name: &str) -> (Vec<i64>, Vec<usize>) {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = tensors.tensor(name).unwrap();
        let tokens = view
            .data()
            .chunks_exact(8)
            .map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap()))
            .collect();
        (tokens, view.shape().to_vec())
    }

    /// The model with the fixture's weights, its parameters and its batch.
    fn model(&self, balance_loss: f64) -> (Model, Vec<ParameterSpec>, MicroBatch) {
        let json = serde_json::from_slice(&fs::read(&self.json).unwrap()).unwrap();
        let mut config = hugging_face::from_json(&json).unwrap();
        if let Some(moe) = &mut config.moe {
            moe.balance_loss = balance_loss;
        }
        let mut model = Model::new(&config, Device::Cpu, ComputeDtype::Float32).unwrap();
        let parameters = parameters(&config);
        let mut offset = 0;
        for parameter in &parameters {
            let values = self.float(&format!("weight/{}", parameter.name));
            assert_eq!(values.len(), parameter.num_elements(), "{}", parameter.name);
            model.set_parameters_f32(offset, &values).unwrap();
            offset += values.len();
        }
        let (inputs, shape) = self.tokens("inputs");
        let (targets, _) = self.tokens("targets");
        (
            model,
            parameters,
            MicroBatch {
                inputs,
                targets,
                rows: shape[0],
                columns: shape[1],
            },
        )
    }
}

/// Agreement relative to the tensor's largest value: single elements that are nearly 0 have no digits to compare.
fn assert_close(what: &str, actual: &[f32], expected: &[f32]) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let scale = expected
        .iter()
        .fold(0.0f64, |scale, &value| scale.max(f64::from(value).abs()));
    let error = actual.iter().zip(expected).fold(0.0f64, |error, (&a, &b)| {
        error.max((f64::from(a) - f64::from(b)).abs())
    });
    assert!(
        error <= TOLERANCE * scale,
        "{what}: off by {:e} of its scale",
        error / scale
    );
}

fn agrees(name: &str) {
    let fixture = Fixture::open(name);
    let (mut model, parameters, micro_batch) = fixture.model(0.0);
    assert_close(
        "logits",
        &model.logits(&micro_batch).unwrap(),
        &fixture.float("logits"),
    );

    let batch = Batch {
        micro_batches: vec![micro_batch.clone()],
    };
    let expected_loss = f64::from(fixture.float("loss_sum")[0]);
    let sums = model.evaluate(&batch).unwrap();
    let (loss, tokens) = (sums.loss_sum, sums.tokens);
    assert!(
        (loss - expected_loss).abs() <= TOLERANCE * expected_loss,
        "{loss} {expected_loss}"
    );
    assert_eq!(tokens, 3 * 17 - 5);

    let gradient = model.gradient(&batch, 0).unwrap();
    assert_eq!((gradient.loss_sum, gradient.tokens), (loss, tokens));
    compare(&fixture, &parameters, "gradient", &gradient.blocks[0]);

    // Row by row, the same gradient up to rounding: it is a sum, not a mean.
    let rows = (0..micro_batch.rows).map(|row| {
        let range = row * micro_batch.columns..(row + 1) * micro_batch.columns;
        MicroBatch {
            inputs: micro_batch.inputs[range.clone()].to_vec(),
            targets: micro_batch.targets[range].to_vec(),
            rows: 1,
            columns: micro_batch.columns,
        }
    });
    let gradient = model
        .gradient(
            &Batch {
                micro_batches: rows.collect(),
            },
            0,
        )
        .unwrap();
    compare(&fixture, &parameters, "gradient", &gradient.blocks[0]);

    let mut model = model.with_z_loss(Z_LOSS).unwrap();
    let gradient = model.gradient(&batch, 0).unwrap();
    assert_eq!(
        gradient.loss_sum, loss,
        "the reported loss is without z-loss"
    );
    compare_some(
        &fixture,
        &parameters,
        "gradient_z",
        &gradient.blocks[0],
        |it| it.shape.len() == 1,
    );
}

fn compare(fixture: &Fixture, parameters: &[ParameterSpec], prefix: &str, values: &[f32]) {
    compare_some(fixture, parameters, prefix, values, |_| true);
}

fn compare_some(
    fixture: &Fixture,
    parameters: &[ParameterSpec],
    prefix: &str,
    values: &[f32],
    compared: impl Fn(&ParameterSpec) -> bool,
) {
    let mut offset = 0;
    for parameter in parameters {
        let actual = &values[offset..offset + parameter.num_elements()];
        offset += actual.len();
        if compared(parameter) {
            let name = format!("{prefix}/{}", parameter.name);
            assert_close(&name, actual, &fixture.float(&name));
        }
    }
    assert_eq!(offset, values.len());
}

/// The balance loss moves routers, by what the paper says.
fn balances(name: &str) {
    let fixture = Fixture::open(name);
    let (mut model, parameters, micro_batch) = fixture.model(BALANCE_LOSS);
    let batch = Batch {
        micro_batches: vec![micro_batch],
    };
    let gradient = model.gradient(&batch, 0).unwrap();
    let expected_loss = f64::from(fixture.float("loss_sum")[0]);
    assert!((gradient.loss_sum - expected_loss).abs() <= TOLERANCE * expected_loss);
    let is_router = |it: &ParameterSpec| it.name.ends_with("mlp.gate.weight");
    let modules = model.config().mtp.as_ref().map_or(0, |mtp| mtp.modules);
    assert_eq!(
        parameters.iter().filter(|it| is_router(it)).count(),
        2 + modules
    );
    let prefix = "gradient_balance";
    compare_some(
        &fixture,
        &parameters,
        prefix,
        &gradient.blocks[0],
        is_router,
    );

    // An evaluation counts the choices whose excess a gradient reports, and modules for further tokens have no part in it.
    let choices = model.evaluate(&batch).unwrap().expert_choices;
    let moe = model.config().moe.as_ref().unwrap();
    assert_eq!(choices.len(), 2 * moe.experts);
    let num_choices = (3 * 17 * moe.experts_per_token) as u64;
    for layer in choices.chunks(moe.experts) {
        assert_eq!(layer.iter().sum::<u64>(), num_choices);
    }
    let mut offset = 0;
    let mut excess = Vec::new();
    for parameter in &parameters {
        let range = offset..offset + parameter.num_elements();
        offset = range.end;
        if parameter.name.ends_with("e_score_correction_bias") {
            excess.extend_from_slice(&gradient.blocks[0][range]);
        }
    }
    for (&count, excess) in choices.iter().zip(excess) {
        let count = (count * moe.experts as u64) as f32;
        assert_eq!(count - num_choices as f32, excess);
    }
}

#[test]
fn llama_with_grouped_queries() {
    agrees("llama");
}

#[test]
fn llama_with_tied_embeddings_and_biases() {
    agrees("llama_tied");
}

#[test]
fn llama_with_a_stretched_rotation() {
    agrees("llama_3");
}

#[test]
fn gpt2() {
    agrees("gpt2");
}

#[test]
fn deepseek_v3() {
    agrees("deepseek_v3");
    balances("deepseek_v3");
}

#[test]
fn deepseek_v3_with_groups_of_experts_latent_queries_and_yarn() {
    agrees("deepseek_v3_groups");
    balances("deepseek_v3_groups");
}

#[test]
fn deepseek_v3_with_modules_that_predict_further_tokens() {
    agrees("deepseek_v3_mtp");
    balances("deepseek_v3_mtp");
}
