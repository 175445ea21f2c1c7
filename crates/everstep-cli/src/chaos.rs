//! `everstep chaos`.

use std::io::Write as _;
use std::path::Path;

use everstep_chaos::report::Report;
use everstep_chaos::scenario::Scenario;
use everstep_chaos::{ChaosError, RunOptions};
use everstep_cluster::control::{self, Injection, Reply, Request};
use everstep_cluster::{ActorRole, RunDir};

use crate::args::{ChaosCommand, ChaosInjectArgs, ChaosRunArgs, InjectedFault};
use crate::{programs, user};

pub(crate) fn run(command: ChaosCommand) -> anyhow::Result<()> {
    match command {
        ChaosCommand::Run(args) => run_scenario(args),
        ChaosCommand::Inject(args) => inject(args),
    }
}

fn run_scenario(args: ChaosRunArgs) -> anyhow::Result<()> {
    let scenario = Scenario::read(&args.file).map_err(user)?;
    if args.simulate {
        return simulate(&scenario, &args);
    }
    let run_dir = args.run_dir.clone().unwrap_or_else(|| {
        Path::new("runs").join(format!("chaos-{}-{}", scenario.name, args.seed))
    });
    let options = RunOptions {
        executable: programs::everstep()?,
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

fn simulate(scenario: &Scenario, args: &ChaosRunArgs) -> anyhow::Result<()> {
    let report = everstep_chaos::simulate(scenario, args.seed, &args.set).map_err(told)?;
    let text = if args.json {
        serde_json::to_string_pretty(&report)? + "\n"
    } else {
        report.table()
    };
    write!(std::io::stdout().lock(), "{text}")?;
    anyhow::ensure!(report.passed, "the simulated scenario failed");
    Ok(())
}

/// Sends one request to the agent of the process's node.
fn inject(args: ChaosInjectArgs) -> anyhow::Result<()> {
    let run_dir = RunDir::new(&args.run_dir);
    let status = crate::status::read(&run_dir)?;
    let names: Vec<&str> = status.processes.iter().map(|p| p.name.as_str()).collect();
    let known = status.processes.iter().find(|p| p.name == args.process);
    let process = known.ok_or_else(|| {
        user(format!(
            "there is no process \"{}\" in this run; allowed: {}",
            args.process,
            names.join(", ")
        ))
    })?;
    let fault = match args.fault {
        InjectedFault::FlipGradientBits { share } if !(0.0..=1.0).contains(&share) => {
            return Err(user(format!("share: is {share}; allowed: 0 to 1")));
        }
        InjectedFault::FlipGradientBits { share } => Injection::FlipGradientBits { share },
        InjectedFault::NonFiniteGradient => Injection::NonFiniteGradient,
        InjectedFault::HangDevice => Injection::HangDevice,
        InjectedFault::SlowDevice { delay_ms } => Injection::SlowDevice { delay_ms },
        InjectedFault::Panic { role } => Injection::Panic {
            role: match role.as_str() {
                "coordinator" => ActorRole::Coordinator,
                "loader" => ActorRole::Loader,
                "worker" => ActorRole::Worker,
                "shard" => ActorRole::Shard,
                _ => {
                    return Err(user(format!(
                        "there is no role \"{role}\"; allowed: coordinator, loader, worker, shard"
                    )));
                }
            },
        },
    };
    let request = Request::Inject {
        process: args.process,
        fault,
    };
    match control::send(&run_dir, &process.node, &request).map_err(user)? {
        Reply::Done => Ok(()),
        Reply::Refused { message } => Err(user(message)),
    }
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
