//! The `everstep` command, in two programs: `everstep`, which answers at once, and `everstep-compute`, which it becomes where it computes and
//! which takes half a second to load libtorch.
//!
//! Here is what does without libtorch; the rest is in `bin/everstep-compute`.

pub mod args;
mod audit;
mod certs;
mod chaos;
mod checkpoint;
mod digest;
mod drain;
mod export;
mod import;
pub mod process;
pub mod programs;
pub mod progress;
mod status;
pub mod trained;

use std::process::ExitCode;

use crate::args::Command;

/// A user's mistake: one line, exit code 2, nothing half-written.
#[derive(Debug)]
pub struct UserError(String);

impl std::fmt::Display for UserError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UserError {}

/// Makes any error a user's mistake.
pub fn user(error: impl std::fmt::Display) -> anyhow::Error {
    UserError(error.to_string()).into()
}

/// Carries out a command that does not compute; gives back one that does.
///
/// # Errors
/// What the command says.
pub fn light(command: Command) -> anyhow::Result<Option<Command>> {
    match command {
        Command::Process(args) if !programs::computes(&args) => process::run(&args, None),
        Command::Drain(args) => drain::run(args),
        Command::Status(args) => status::run(args),
        Command::Digest(args) => digest::run(args),
        Command::Export(args) => export::run(args),
        Command::Import(args) => import::run(args),
        Command::Checkpoint(command) => checkpoint::run(command),
        Command::Certs(args) => certs::run(args),
        Command::Audit(command) => audit::run(command),
        Command::Chaos(command) => chaos::run(command),
        Command::Train(_)
        | Command::Process(_)
        | Command::Node(_)
        | Command::Generate(_)
        | Command::Logits(_) => return Ok(Some(command)),
    }
    .map(|()| None)
}

/// Says what went wrong; 2 is for a user's mistake.
pub fn exit(outcome: anyhow::Result<()>) -> ExitCode {
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
