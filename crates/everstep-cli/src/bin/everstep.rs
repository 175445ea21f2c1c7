//! The program that users start.

use std::process::ExitCode;

use clap::Parser as _;
use everstep_cli::args::Cli;
use everstep_cli::{exit, light, programs};

fn main() -> ExitCode {
    exit(light(Cli::parse().command).and_then(|left| match left {
        None => Ok(()),
        Some(_) => Err(programs::hand_over()),
    }))
}
