//! `everstep logits`: what a model says, for programs that compare it with others.

use std::io::Write as _;
use std::ops::ControlFlow;

use everstep_cluster::{RunContext, RunDir};
use everstep_model::generate::sampling_stream;
use everstep_model::{GenerateOptions, MicroBatch, Sampling};

use everstep_cli::args::LogitsArgs;
use everstep_cli::user;

pub(crate) fn run(args: LogitsArgs) -> anyhow::Result<()> {
    let run = RunContext::open(&RunDir::new(&args.run_dir)).map_err(user)?;
    let tokens = run
        .dataset()
        .tokenizer()
        .encode(&args.prompt)
        .map_err(|error| user(format!("--prompt: {error}")))?;
    let inputs: Vec<i64> = tokens.iter().copied().map(i64::from).collect();
    let model = crate::model::open(&run, args.step, false)?;
    let micro_batch = MicroBatch {
        targets: inputs.clone(),
        rows: 1,
        columns: inputs.len(),
        inputs,
    };
    let logits = model.logits(&micro_batch).map_err(user)?;
    let options = GenerateOptions {
        sampling: Sampling {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
        },
        tokens_max: args.max_tokens,
        stop: Vec::new(),
    };
    let stream = sampling_stream(0, 0, 0);
    let continued = model.generate(&micro_batch.inputs, &options, stream, |_| {
        ControlFlow::Continue(())
    })?;
    let rows: Vec<&[f32]> = logits.chunks(model.config().vocab_size).collect();
    let json = serde_json::json!({
        "tokens": tokens,
        "logits": rows,
        "continued": continued,
    });
    writeln!(std::io::stdout().lock(), "{json}")?;
    Ok(())
}
