//! The `everstep` command.

mod args;
mod certs;
mod digest;
mod export;
mod generate;
mod node;
mod progress;
mod status;
mod train;

use std::os::unix::process::CommandExt as _;
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

/// OpenMP's threads must not spin while they wait: on a machine whose cores are shared (several workers, or anything else), spinning
/// made a step 10 to 30 times slower. libtorch's OpenMP reads the variable when it is loaded, before `main`, so the process replaces itself
/// once; everything that it starts inherits the variable. Whoever set it keeps what they chose.
fn let_openmp_sleep() {
    const VARIABLE: &str = "OMP_WAIT_POLICY";
    if std::env::var_os(VARIABLE).is_some() {
        return;
    }
    let Ok(executable) = std::env::current_exe() else { return };
    let error = std::process::Command::new(executable).args(std::env::args_os().skip(1)).env(VARIABLE, "PASSIVE").exec();
    // Slower, but not wrong.
    eprintln!("warning: cannot restart with {VARIABLE}=PASSIVE: {error}");
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let_openmp_sleep();
    let outcome = match cli.command {
        Command::Train(args) => train::run(args),
        Command::Process(args) => train::process(args),
        Command::Node(args) => node::run(args),
        Command::Status(args) => status::run(args),
        Command::Digest(args) => digest::run(args),
        Command::Export(args) => export::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Certs(args) => certs::run(args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if error.is::<UserError>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}
