//! The machine's python3 and the virtual environment that set-up owns.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process;
use crate::workspace::Workspace;

const NO_PYTHON: &str = "python3 is missing: set-up needs it, with pip, to fetch libtorch from the Python package index. \
    Install it (Debian and Ubuntu: `apt install python3 python3-pip`, Fedora: `dnf install python3-pip`), \
    or install PyTorch 2.11.0 or libtorch 2.11.0 yourself and set LIBTORCH to its folder";

const NO_PIP: &str = "python3 is here but has no pip, which set-up needs to fetch libtorch. \
    Install it (Debian and Ubuntu: `apt install python3-pip`, Fedora: `dnf install python3-pip`, \
    elsewhere: `python3 -m ensurepip --user`), or set LIBTORCH to the folder of an installed libtorch 2.11.0";

/// pip learnt to resume a broken download in this version.
const PIP_RESUMES: (u32, u32) = (25, 1);

/// How often pip resumes a download that breaks off.
const RESUME_RETRIES: &str = "20";

/// A python3 with its pip.
#[derive(Debug)]
pub(crate) struct Python {
    interpreter: PathBuf,
    pip: (u32, u32),
}

impl Python {
    /// The machine's own python3; it is read from, never installed into.
    pub(crate) fn of_machine() -> Result<Self> {
        if !process::is_there("python3") {
            bail!(NO_PYTHON);
        }
        Self::with_pip("python3".into()).context(NO_PIP)
    }

    /// The environment in `third_party/venv`, made on first use, with a pip that resumes downloads where there is one.
    ///
    /// Debian splits `venv` from python3, so where it is missing `virtualenv` is fetched into a folder of its own.
    pub(crate) fn of_workspace(workspace: &Workspace) -> Result<Self> {
        Self::of_environment(workspace, &workspace.venv())
    }

    /// The environment in `folder`, made on first use.
    pub(crate) fn of_environment(workspace: &Workspace, folder: &Path) -> Result<Self> {
        let interpreter = folder.join("bin/python3");
        if let Ok(python) = Self::with_pip(interpreter.clone()) {
            return Ok(python);
        }
        let machine = Self::of_machine()?;
        if folder.exists() {
            std::fs::remove_dir_all(folder)
                .with_context(|| format!("cannot remove the broken {}", folder.display()))?;
        }
        let plain = process::output(machine.command().args(["-m", "venv"]).arg(folder));
        if plain.is_err() || !interpreter.exists() {
            let packages = workspace.third_party().join("virtualenv");
            process::run(
                machine
                    .pip()
                    .args(["install", "--quiet", "--target"])
                    .arg(&packages)
                    .arg("virtualenv"),
            )?;
            process::run(
                machine
                    .command()
                    .env("PYTHONPATH", &packages)
                    .args(["-m", "virtualenv", "--quiet", "--clear"])
                    .arg(folder),
            )?;
        }
        let fresh = Self::with_pip(interpreter.clone())?;
        if fresh.pip >= PIP_RESUMES {
            return Ok(fresh);
        }
        // A newer pip resumes broken downloads. Without it things still work, so its absence stops nothing.
        match process::output(fresh.pip().args(["install", "--quiet", "--upgrade", "pip"])) {
            Ok(_) => Self::with_pip(interpreter),
            Err(_) => Ok(fresh),
        }
    }

    /// The interpreter, ready for arguments.
    pub(crate) fn command(&self) -> Command {
        Command::new(&self.interpreter)
    }

    /// pip, ready for a subcommand.
    pub(crate) fn pip(&self) -> Command {
        let mut command = self.command();
        command.args(["-m", "pip", "--disable-pip-version-check", "--no-input"]);
        command
    }

    /// What to add to a pip download so that it survives a bad line.
    pub(crate) fn retry_options(&self) -> Vec<&'static str> {
        let mut options = vec!["--retries", "10", "--timeout", "60"];
        if self.pip >= PIP_RESUMES {
            options.extend(["--resume-retries", RESUME_RETRIES]);
        }
        options
    }

    fn with_pip(interpreter: PathBuf) -> Result<Self> {
        let text = process::output(Command::new(&interpreter).args(["-m", "pip", "--version"]))?;
        let pip = parse_pip_version(&text)
            .with_context(|| format!("pip gave no version but `{}`", text.trim()))?;
        Ok(Self { interpreter, pip })
    }
}

/// Major and minor of `pip 25.1.1 from …`.
fn parse_pip_version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text
        .strip_prefix("pip ")?
        .split_whitespace()
        .next()?
        .split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pip_versions_are_read() {
        assert_eq!(
            parse_pip_version("pip 23.2.1 from /usr/lib/python3 (python 3.11)\n"),
            Some((23, 2))
        );
        assert_eq!(parse_pip_version("pip 26.0 from x"), Some((26, 0)));
        assert_eq!(parse_pip_version("No module named pip"), None);
        assert!(parse_pip_version("pip 25.1 from x").unwrap() >= PIP_RESUMES);
    }
}
