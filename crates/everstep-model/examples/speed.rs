//! Tokens per second of a slot's gradient in nanoGPT's character-level Shakespeare shape, or in a deeper one, and the peak of memory.
//!
//! `cargo run -p everstep-model --example speed -- [llama] [bf16] [deep] [recompute]`

#![allow(clippy::print_stdout)]

use std::time::Instant;

use everstep_model::{Batch, MicroBatch, Model, ModelError};
use everstep_optim::{ComputeDtype, Layout};
use everstep_protocol::random::{Purpose, Stream};
use everstep_spec::{Architecture, ModelConfig, parameters};
use tch::Device;

const ROWS: usize = 12;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let given = |word: &str| std::env::args().any(|argument| argument == word);
    let architecture = if given("llama") {
        Architecture::Llama
    } else {
        Architecture::Gpt2
    };
    let dtype = if given("bf16") {
        ComputeDtype::Bfloat16
    } else {
        ComputeDtype::Float32
    };
    let config = ModelConfig {
        vocab_size: 65,
        bias: false,
        ..if given("deep") {
            ModelConfig::new(architecture, 16, 4, 256, 256)
        } else {
            ModelConfig::new(architecture, 4, 4, 128, 64)
        }
    };
    let layout = Layout::new(parameters(&config), 1 << 20)?;
    let mut model = Model::new(&config, Device::Cpu, dtype)?;
    if given("recompute") {
        model = model.with_recomputation();
    }
    let mut offset = 0;
    for block in 0..layout.num_blocks() {
        let values = layout.initial_values(1, block);
        model.set_parameters_f32(offset, &values)?;
        offset += values.len();
    }
    let mut stream = Stream::new(1, Purpose::Evaluation, &[]);
    let columns = config.context;
    let mut tokens = || {
        (0..ROWS * columns)
            .map(|_| stream.below(65) as i64)
            .collect::<Vec<_>>()
    };
    let micro_batch = MicroBatch {
        inputs: tokens(),
        targets: tokens(),
        rows: ROWS,
        columns,
    };
    let batch = Batch {
        micro_batches: vec![micro_batch],
    };
    let steps = if given("deep") { 5 } else { 60 };
    for threads in [1, 2] {
        everstep_torch::pin_threads(threads)?;
        let seconds = median(steps, || model.gradient(&batch, 0).map(drop))?;
        let forward = median(steps, || model.evaluate(&batch).map(drop))?;
        println!(
            "{architecture:?} {dtype:?}, {threads} thread(s): gradient {:.2} ms, {:.0} tokens/s; evaluation {:.2} ms",
            seconds * 1e3,
            batch.tokens() as f64 / seconds,
            forward * 1e3
        );
    }
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find(|line| line.starts_with("VmHWM"));
    println!(
        "{}",
        peak.unwrap_or("the peak of memory is told on Linux only")
    );
    Ok(())
}

/// Median seconds of a call: other work on the machine stretches some calls, and the median ignores them.
fn median(
    steps: usize,
    mut call: impl FnMut() -> Result<(), ModelError>,
) -> Result<f64, ModelError> {
    let mut seconds = Vec::with_capacity(steps);
    for _ in 0..steps {
        let start = Instant::now();
        call()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[steps / 2])
}
