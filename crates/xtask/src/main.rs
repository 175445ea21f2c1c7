//! Everything about Everstep that is not the product: set-up, tests, simulation, the demo.
//!
//! `cargo xtask setup` must run before libtorch exists, so this crate depends on nothing that links it.
#![allow(
    clippy::print_stdout,
    reason = "a command-line tool talks on its standard output"
)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod architecture;
mod demo;
mod harness;
mod libtorch;
mod process;
mod python;
mod setup;
mod sim;
mod test;
mod tidy;
mod transformers;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::workspace::Workspace;

#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    about = "Set up, test, simulate and demonstrate Everstep."
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Put libtorch (and with --tests what the tests need) into third_party/
    Setup(setup::Options),
    /// Run everything that CI runs
    Test(test::Options),
    /// Run the cluster simulator over many seeds, or replay one
    Sim(sim::Options),
    /// Compare exported and imported models with Hugging Face transformers
    Transformers,
    /// Train a small model while its processes are killed, and show that no bit changed
    Demo(demo::Options),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = Workspace::locate().and_then(|workspace| match arguments.command {
        Command::Setup(options) => setup::run(&workspace, &options),
        Command::Test(options) => test::run(&workspace, &options),
        Command::Sim(options) => sim::run(&workspace, &options),
        Command::Transformers => transformers::run(&workspace),
        Command::Demo(options) => demo::run(&workspace, &options),
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
