//! `cargo xtask setup`: everything that a build needs and crates.io does not have.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use crate::workspace::Workspace;
use crate::{libtorch, process, python::Python};

/// Python packages that the tests start as real servers. Add a line and every checkout installs it.
const TEST_PACKAGES: &[&str] = &[
    // An S3 server that honours create-if-absent even under a race.
    "moto[server]==5.2.5",
];

/// Options of `cargo xtask setup`.
#[derive(Debug, Default, Args)]
pub(crate) struct Options {
    /// Also install the servers that the tests talk to
    #[arg(long)]
    pub(crate) tests: bool,
    /// Take the wheels from this folder instead of downloading them
    #[arg(long, value_name = "DIR")]
    pub(crate) wheel_dir: Option<PathBuf>,
    /// Use the wheels even where LIBTORCH or an installed PyTorch would do
    #[arg(long)]
    pub(crate) ignore_installed: bool,
}

/// Brings the checkout to where plain `cargo build` works, offline from then on.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<()> {
    libtorch::provision(workspace, options)?;
    if options.tests {
        install_test_packages(workspace)?;
    }
    Ok(())
}

/// Installs [`TEST_PACKAGES`] into `third_party/venv`; a stamp file makes the second call quick.
fn install_test_packages(workspace: &Workspace) -> Result<()> {
    let wanted = TEST_PACKAGES.join("\n");
    let stamp = workspace.venv().join("everstep-test-packages.txt");
    if std::fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
        println!("test servers: in {}", workspace.venv().display());
        return Ok(());
    }
    let python = Python::of_workspace(workspace)?;
    process::run(
        python
            .pip()
            .args(["install", "--quiet"])
            .args(python.retry_options())
            .args(TEST_PACKAGES),
    )
    .context("the tests start real servers, and these Python packages are they")?;
    std::fs::write(&stamp, wanted).with_context(|| format!("cannot write {}", stamp.display()))
}
