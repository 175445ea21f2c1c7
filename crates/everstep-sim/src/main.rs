//! `everstep-sim --seeds N [--first F] [--threads T]` runs a campaign; `--seed S [--trace]` replays one seed, `--minimise` shrinks it if
//! it fails, and `--plan FILE` takes the plan from a file instead of from the seed, for one seed or for many.

use std::io::{self, BufWriter, Write};
use std::process::ExitCode;

use everstep_sim::{Plan, PlanError};

const USAGE: &str = "usage: everstep-sim [--plan FILE] [--seeds N] [--first F] [--threads T] | [--plan FILE] --seed S [--trace | --minimise]";

#[derive(Debug)]
struct Arguments {
    num_seeds: u64,
    first: u64,
    num_threads: usize,
    seed: Option<u64>,
    trace: bool,
    minimise: bool,
    plan: Option<Plan>,
}

fn read_plan(path: &str) -> Result<Plan, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
    text.parse()
        .map_err(|error: PlanError| format!("{path}: {error}"))
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let mut parsed = Arguments {
        num_seeds: 2000,
        first: 0,
        num_threads: std::thread::available_parallelism().map_or(1, usize::from),
        seed: None,
        trace: false,
        minimise: false,
        plan: None,
    };
    while let Some(name) = arguments.next() {
        if name == "--trace" {
            parsed.trace = true;
            continue;
        }
        if name == "--minimise" {
            parsed.minimise = true;
            continue;
        }
        if name == "--plan" {
            let path = arguments
                .next()
                .ok_or_else(|| format!("`--plan` needs a file; {USAGE}"))?;
            parsed.plan = Some(read_plan(&path)?);
            continue;
        }
        if !["--seeds", "--first", "--threads", "--seed"].contains(&name.as_str()) {
            return Err(format!("unknown argument `{name}`; {USAGE}"));
        }
        let value = arguments
            .next()
            .and_then(|value| value.parse::<u64>().ok())
            .ok_or_else(|| format!("`{name}` needs a whole number; {USAGE}"))?;
        match name.as_str() {
            "--seeds" => parsed.num_seeds = value,
            "--first" => parsed.first = value,
            "--threads" => parsed.num_threads = usize::try_from(value).unwrap_or(1),
            _ => parsed.seed = Some(value),
        }
    }
    Ok(parsed)
}

fn run(arguments: &Arguments, out: &mut dyn Write) -> io::Result<bool> {
    let Some(seed) = arguments.seed else {
        let (first, num_seeds) = (arguments.first, arguments.num_seeds);
        let num_threads = arguments.num_threads;
        let summary = match &arguments.plan {
            Some(plan) => everstep_sim::run_plan_many(plan, first, num_seeds, num_threads),
            None => everstep_sim::run_many(first, num_seeds, num_threads),
        };
        writeln!(out, "{summary}")?;
        return Ok(summary.passed());
    };
    let plan = arguments
        .plan
        .clone()
        .unwrap_or_else(|| Plan::of_seed(seed));
    if arguments.minimise {
        let minimal = everstep_sim::minimise(&plan, seed);
        match &minimal {
            Some(minimal) => write!(out, "{minimal}")?,
            None => writeln!(out, "seed {seed} holds every invariant")?,
        }
        return Ok(minimal.is_none());
    }
    let outcome = if arguments.trace {
        let mut result = Ok(());
        let outcome = everstep_sim::run_plan_traced(&plan, seed, &mut |line| {
            if result.is_ok() {
                result = writeln!(out, "{line}");
            }
        });
        result?;
        outcome
    } else {
        everstep_sim::run_plan(&plan, seed)
    };
    writeln!(out, "{outcome:#?}")?;
    Ok(outcome.violation.is_none())
}

fn main() -> ExitCode {
    let arguments = match parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = writeln!(io::stderr(), "{error}");
            return ExitCode::from(2);
        }
    };
    let mut out = BufWriter::new(io::stdout().lock());
    let result = run(&arguments, &mut out).and_then(|passed| out.flush().map(|()| passed));
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        // The reader of a long trace went away.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "cannot write the result: {error}");
            ExitCode::from(1)
        }
    }
}
