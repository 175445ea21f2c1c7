//! `everstep chaos`.

use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;
use everstep_chaos::report::Report;
use everstep_chaos::scenario::Scenario;
use everstep_chaos::{ChaosError, RunOptions};

use crate::args::{ChaosCommand, ChaosRunArgs};
use crate::user;

pub(crate) fn run(command: ChaosCommand) -> anyhow::Result<()> {
    match command {
        ChaosCommand::Run(args) => run_scenario(args),
    }
}

fn run_scenario(args: ChaosRunArgs) -> anyhow::Result<()> {
    let scenario = Scenario::read(&args.file).map_err(user)?;
    let run_dir = args.run_dir.clone().unwrap_or_else(|| {
        Path::new("runs").join(format!("chaos-{}-{}", scenario.name, args.seed))
    });
    let options = RunOptions {
        executable: std::env::current_exe().context("the everstep binary cannot be found")?,
        run_dir: run_dir.clone(),
        seed: args.seed,
        set: args.set,
        undisturbed: args.undisturbed,
    };
    let report =
        everstep_chaos::run(&scenario, &options, &mut |line| eprintln!("{line}")).map_err(told)?;
    print(&report, args.json)?;
    anyhow::ensure!(
        report.passed,
        "the scenario failed; see {}",
        run_dir.join("report.json").display()
    );
    Ok(())
}

fn told(error: ChaosError) -> anyhow::Error {
    if error.is_users() {
        user(error)
    } else {
        error.into()
    }
}

fn print(report: &Report, json: bool) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(report)?)?;
    } else {
        write!(out, "{}", everstep_chaos::report::table(report))?;
    }
    Ok(())
}
