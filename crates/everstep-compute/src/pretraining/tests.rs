use std::path::Path;
use std::sync::Arc;

use everstep_optim::{Layout, TrainingNumerics};
use everstep_protocol::{Numerics, Step};
use everstep_spec::parameters;
use everstep_train::{BatchSource, PretrainingData};
use tch::Device;

use super::*;

const RUN: &str = r#"
[run]
name = "tiny"
seed = 3
steps = 30

[model]
architecture = "llama"
layers = 1
heads = 2
width = 16
context = 16

[data]
train = ["text.txt"]
tokenizer = { kind = "char" }

[batch]
slots = 2
rows = 8
micro_batches = 2

[optimizer]
lr = 2e-2

[evaluation]
every = 10
rows = 3

[cluster]
block_params = 1000
"#;

struct Case {
    _dir: tempfile::TempDir,
    config: RunConfig,
    data: PretrainingData,
}

fn case(set: &[&str]) -> Case {
    // Tests run beside each other; threads that spin for cores make such small models many times slower.
    everstep_torch::pin_threads(1).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let text: String = (0..200)
        .map(|i| format!("{} times {} is {}. ", i % 7, i % 5, (i % 7) * (i % 5)))
        .collect();
    std::fs::write(dir.path().join("text.txt"), text).unwrap();
    let set: Vec<String> = set.iter().map(|&change| change.into()).collect();
    let mut config = RunConfig::parse(Path::new("tiny.toml"), RUN, &set).unwrap();
    let dataset =
        everstep_data::open_or_prepare(&config.data, dir.path(), &dir.path().join("data")).unwrap();
    config
        .resolve_vocab(dataset.vocab_size(), Path::new("tiny.toml"))
        .unwrap();
    let data = PretrainingData::new(&config, Arc::new(dataset)).unwrap();
    Case {
        _dir: dir,
        config,
        data,
    }
}

/// Losses of all steps and the final validation loss, computed as the cluster does: slot by slot, block by block.
fn train(case: &Case) -> (Vec<f64>, f64) {
    let Case { config, data, .. } = case;
    let layout =
        Arc::new(Layout::new(parameters(&config.model), config.cluster.block_params).unwrap());
    let numerics =
        TrainingNumerics::new(layout.clone(), config.optimizer(), config.compute.dtype).unwrap();
    let model = Model::new(&config.model, Device::Cpu, config.compute.dtype).unwrap();
    let mut replica = Pretraining::new(config, model);
    let mut states: Vec<_> = (0..layout.num_blocks())
        .map(|block| numerics.initial_state(config.run.seed, block))
        .collect();
    let mut losses = Vec::new();
    for step in 0..config.run.steps {
        publish(&layout, &numerics, &states, &mut replica);
        let slots: Vec<Vec<Gradient>> = (0..config.batch.slots)
            .map(|slot| {
                let batch = data.batch(step, slot).unwrap();
                replica.gradient(&batch, step, slot).unwrap()
            })
            .collect();
        let sums: Vec<Gradient> = layout
            .blocks()
            .iter()
            .map(|block| {
                let of = |slot: &[Gradient]| {
                    let values = &slot[0].values.as_slice()[block.offset..block.offset + block.len];
                    Gradient::new(values.to_vec(), slot[0].loss_sum, slot[0].tokens)
                };
                numerics.sum(of(&slots[0]), of(&slots[1]))
            })
            .collect();
        let reports: Vec<_> = (0..)
            .zip(&sums)
            .map(|(block, sum)| numerics.report(block, sum))
            .collect();
        let decision = numerics.decide(Step(step), &reports);
        for (block, (state, sum)) in states.iter_mut().zip(&sums).enumerate() {
            numerics.apply(block as u32, Step(step), &decision, sum, state);
        }
        losses.push(decision.loss);
    }
    publish(&layout, &numerics, &states, &mut replica);
    let mut total = EvaluationSums::default();
    for chunk in 0..data.num_evaluation_chunks() {
        let sums = replica
            .evaluate(&data.evaluation_batch(chunk).unwrap())
            .unwrap();
        total.add(&sums);
    }
    assert_eq!(
        total.tokens,
        data.dataset().manifest().validation.tokens - 1
    );
    (losses, total.loss_sum / total.tokens as f64)
}

fn publish(
    layout: &Layout,
    numerics: &TrainingNumerics,
    states: &[everstep_optim::BlockState],
    replica: &mut Pretraining,
) {
    for (index, (block, state)) in layout.blocks().iter().zip(states).enumerate() {
        let parameters = numerics.parameters(index as u32, state);
        replica
            .set_parameters(block.offset, parameters.as_bytes())
            .unwrap();
    }
}

#[test]
fn a_tiny_model_learns_and_learns_the_same_twice() {
    let case = case(&[]);
    let (losses, validation) = train(&case);
    let entropy = case.data.dataset().manifest().unigram_entropy;
    assert!(
        validation < entropy - 0.5,
        "validation loss {validation}, unigram entropy {entropy}, {losses:?}"
    );
    assert_eq!(train(&case), (losses, validation));
}

#[test]
fn micro_batches_are_rows_in_order_and_must_divide() {
    let case = case(&[]);
    let tokens = case.data.batch(0, 1).unwrap();
    let cut = micro_batches(&tokens, 2).unwrap();
    assert_eq!(
        (
            tokens.rows,
            cut.micro_batches.len(),
            cut.micro_batches[1].rows
        ),
        (4, 2, 2)
    );
    let joined: Vec<i64> = cut
        .micro_batches
        .iter()
        .flat_map(|micro_batch| micro_batch.inputs.clone())
        .collect();
    assert_eq!(joined, tokens.inputs);
    let error = micro_batches(&tokens, 3).unwrap_err().to_string();
    assert_eq!(error, "a batch of 4 rows cannot be cut in 3 micro-batches");
}

#[test]
fn a_slot_is_what_the_name_says_wherever_it_is_computed() {
    let here = case(&["model.dropout=0.1"]);
    let gradient = |slot: usize| {
        let mut model =
            Model::new(&here.config.model, Device::Cpu, here.config.compute.dtype).unwrap();
        let layout = Layout::new(parameters(&here.config.model), 1 << 20).unwrap();
        for (index, block) in layout.blocks().iter().enumerate() {
            model
                .set_parameters_f32(block.offset, &layout.initial_values(1, index as u32))
                .unwrap();
        }
        // What travelled as bytes from a loader is what a loader in this process would give.
        let batch = TokenBatch::from_bytes(&here.data.batch(4, slot).unwrap().to_bytes()).unwrap();
        let mut replica = Pretraining::new(&here.config, model);
        replica.gradient(&batch, 4, slot).unwrap().remove(0)
    };
    let first = gradient(0);
    assert_eq!(gradient(0), first);
    assert_ne!(gradient(1).values, first.values);
    assert_eq!(first.tokens, 4 * 16);
}
