//! `everstep generate`: lets a committed step continue a text.

use std::io::Write as _;
use std::ops::ControlFlow;

use everstep_cluster::{RunContext, RunDir};
use everstep_model::generate::sampling_stream;
use everstep_model::{GenerateOptions, Sampling};

use everstep_cli::args::GenerateArgs;
use everstep_cli::user;

pub(crate) fn run(args: GenerateArgs) -> anyhow::Result<()> {
    let sampling = Sampling {
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: args.top_k,
    };
    sampling
        .check()
        .map_err(|error| user(format!("--{error}")))?;
    let run = RunContext::open(&RunDir::new(&args.run_dir)).map_err(user)?;
    let tokenizer = run.dataset().tokenizer();
    let prompt: Vec<i64> = tokenizer
        .encode(&args.prompt)
        .map_err(|error| user(format!("--prompt: {error}")))?
        .into_iter()
        .map(i64::from)
        .collect();
    if prompt.is_empty() {
        return Err(user("--prompt: is empty; allowed: at least one token"));
    }
    let model = crate::model::open(&run, args.step, args.ema)?;

    let stop = tokenizer.eot().map(i64::from).into_iter().collect();
    let options = GenerateOptions {
        sampling,
        tokens_max: args.max_tokens,
        stop,
    };
    let mut out = std::io::stdout().lock();
    for sample in 0..args.samples {
        if sample > 0 {
            writeln!(out, "\n---")?;
        }
        let mut shown = Shown {
            tokenizer,
            bytes: 0,
        };
        write!(out, "{}", args.prompt)?;
        let mut tokens = Vec::new();
        let made = model.generate(
            &prompt,
            &options,
            sampling_stream(args.seed, 0, sample),
            |token| {
                tokens.push(token as u32);
                match shown.grow(&tokens).and_then(|text| {
                    Ok(out.write_all(text.as_bytes()).and_then(|()| out.flush())?)
                }) {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(_) => ControlFlow::Break(()),
                }
            },
        );
        made?;
        write!(out, "{}", shown.rest(&tokens)?)?;
    }
    writeln!(out)?;
    Ok(())
}

/// Tokens become text only in context, and a character may take several tokens: shows what can no longer change.
struct Shown<'a> {
    tokenizer: &'a everstep_data::Tokenizer,
    bytes: usize,
}

impl Shown<'_> {
    fn grow(&mut self, tokens: &[u32]) -> anyhow::Result<String> {
        let text = self.tokenizer.decode(tokens)?;
        let whole = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
        let new = whole.get(self.bytes..).unwrap_or_default().to_owned();
        self.bytes += new.len();
        Ok(new)
    }

    fn rest(&mut self, tokens: &[u32]) -> anyhow::Result<String> {
        let text = self.tokenizer.decode(tokens)?;
        Ok(text.get(self.bytes..).unwrap_or_default().to_owned())
    }
}
