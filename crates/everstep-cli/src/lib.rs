//! The `everstep` command.

mod args;
mod audit;
mod certs;
mod chaos;
mod checkpoint;
mod digest;
mod drain;
mod export;
mod generate;
mod import;
mod logits;
mod node;
mod progress;
mod status;
mod train;
mod trained;

use std::process::ExitCode;

use clap::Parser as _;

use crate::args::{Cli, Command};

/// A user's mistake: one line, exit code 2, nothing half-written.
#[derive(Debug)]
pub(crate) struct UserError(pub(crate) String);

impl std::fmt::Display for UserError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UserError {}

/// Makes any error a user's mistake.
pub(crate) fn user(error: impl std::fmt::Display) -> anyhow::Error {
    UserError(error.to_string()).into()
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // Slower without, but not wrong.
    if let Err(error) = everstep_torch::restart_with_tuned_runtime() {
        eprintln!(
            "warning: OpenMP and the allocator run with their defaults, which is slow: {error}"
        );
    }
    let outcome = match cli.command {
        Command::Train(args) => train::run(args),
        Command::Process(args) => train::process(args),
        Command::Node(args) => node::run(args),
        Command::Drain(args) => drain::run(args),
        Command::Status(args) => status::run(args),
        Command::Digest(args) => digest::run(args),
        Command::Export(args) => export::run(args),
        Command::Import(args) => import::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Logits(args) => logits::run(args),
        Command::Checkpoint(command) => checkpoint::run(command),
        Command::Certs(args) => certs::run(args),
        Command::Audit(command) => audit::run(command),
        Command::Chaos(command) => chaos::run(command),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if error.is::<UserError>() {
                ExitCode::from(2)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}
