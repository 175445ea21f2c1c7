//! `everstep checkpoint`: what a run has in its store, seen, verified, compared, removed and copied.

mod cp;
mod diff;
mod ls;
mod place;
mod prune;
mod verify;

use std::io::Write as _;

use crate::args::checkpoint::{CheckpointCommand, PinArgs};
use crate::user;

pub(crate) fn run(command: CheckpointCommand) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        match command {
            CheckpointCommand::Ls(args) => ls::run(&args).await,
            CheckpointCommand::Verify(args) => verify::run(&args).await,
            CheckpointCommand::Diff(args) => diff::run(&args).await,
            CheckpointCommand::Prune(args) => prune::run(&args).await,
            CheckpointCommand::Cp(args) => cp::run(&args).await,
            CheckpointCommand::Pin(args) => pin(&args).await,
            CheckpointCommand::Unpin(args) => unpin(&args).await,
        }
    })
}

async fn pin(args: &PinArgs) -> anyhow::Result<()> {
    let store = place::open(&args.place)?;
    store.existing_run().await.map_err(user)?;
    store.pin(args.step).await.map_err(user)?;
    writeln!(std::io::stdout(), "pinned: step {}", args.step)?;
    Ok(())
}

async fn unpin(args: &PinArgs) -> anyhow::Result<()> {
    let store = place::open(&args.place)?;
    store.existing_run().await.map_err(user)?;
    if !store
        .pinned_steps()
        .await
        .map_err(user)?
        .contains(&args.step)
    {
        return Err(user(format!("step {} is not pinned", args.step)));
    }
    store.unpin(args.step).await.map_err(user)?;
    writeln!(std::io::stdout(), "unpinned: step {}", args.step)?;
    Ok(())
}

/// A size for people.
fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}
