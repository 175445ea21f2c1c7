//! `cargo xtask transformers`: Hugging Face transformers computes what `everstep` computes.

use anyhow::{Context, Result};

use crate::process;
use crate::python::Python;
use crate::workspace::Workspace;

/// What the comparison is made with; PyTorch brings CUDA's libraries, so this is 5 GB.
const PACKAGES: [&str; 2] = ["torch==2.11.0", "transformers==5.24.0"];

const CHECK: &str = "tests/transformers/check.py";

/// Whether [`PACKAGES`] are installed.
pub(crate) fn is_installed(workspace: &Workspace) -> bool {
    stamp(workspace).exists()
}

/// Exports and imports small models and compares logits and generated tokens; fetches what it needs first.
///
/// # Errors
/// The packages cannot be had, or something differs.
pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    let folder = workspace.transformers();
    let python = Python::of_environment(workspace, &folder)?;
    if !is_installed(workspace) {
        println!("fetching {} (about 3 GB, once)", PACKAGES.join(", "));
        let mut command = python.pip();
        command
            .args(["install", "--quiet", "--no-compile"])
            .args(python.retry_options())
            .args(PACKAGES);
        process::run(&mut command).context(
            "the comparison needs PyTorch and transformers in an environment of its own",
        )?;
        let stamp = stamp(workspace);
        std::fs::write(&stamp, "").with_context(|| format!("cannot write {}", stamp.display()))?;
    }
    process::run(process::cargo(workspace).args([
        "build",
        "--locked",
        "--package",
        "everstep-cli",
    ]))?;
    let binary = workspace.target().join("debug/everstep");
    process::run(
        python
            .command()
            // No compiled files among the sources.
            .arg("-B")
            .arg(workspace.root().join(CHECK))
            .arg(binary),
    )
}

fn stamp(workspace: &Workspace) -> std::path::PathBuf {
    let name = format!("installed-{}.txt", PACKAGES.join("-"));
    workspace.transformers().join(name)
}
