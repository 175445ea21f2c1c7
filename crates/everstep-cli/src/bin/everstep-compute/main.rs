//! The program that `everstep` becomes where it computes.

mod generate;
mod logits;
mod model;
mod node;
mod train;

use std::process::ExitCode;

use clap::Parser as _;
use everstep_cli::args::{Cli, Command};
use everstep_cli::{exit, light, process, programs};

fn main() -> ExitCode {
    let Cli { command } = Cli::parse();
    exit(programs::tune().and_then(|()| run(command)))
}

fn run(command: Command) -> anyhow::Result<()> {
    match light(command)? {
        None => Ok(()),
        Some(Command::Train(args)) => train::run(args),
        Some(Command::Process(args)) => process::run(&args, Some(&everstep_compute::Libtorch)),
        Some(Command::Node(args)) => node::run(args),
        Some(Command::Generate(args)) => generate::run(args),
        Some(Command::Logits(args)) => logits::run(args),
        Some(_) => unreachable!("`light` does all others"),
    }
}
