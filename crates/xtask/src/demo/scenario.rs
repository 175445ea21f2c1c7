//! A chaos file: which run is disturbed on which cluster, by what, and what must hold in the end.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// A chaos file, checked.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Scenario {
    /// What it is called; the file's name without its ending.
    pub(crate) name: String,
    pub(crate) workload: Workload,
    /// The faults, in the order in which they strike.
    #[serde(rename = "fault")]
    pub(crate) faults: Vec<Fault>,
    pub(crate) check: Check,
}

/// What is disturbed. Paths are relative to the root of the checkout.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Workload {
    /// The run file.
    pub(crate) run: PathBuf,
    /// The topology file.
    pub(crate) topology: PathBuf,
}

/// One fault.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Fault {
    /// SIGKILL to a process that plays one role only.
    Kill {
        role: Role,
        /// It strikes as soon as this step is committed.
        after_step: u64,
    },
}

/// A role that a process can play.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Role {
    Coordinator,
    Loader,
    Worker,
    Shard,
}

/// What must hold in the end.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Check {
    pub(crate) digest: Digest,
    /// How many faults must have struck.
    pub(crate) faults: usize,
}

/// What the digests are compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Digest {
    /// Those of the same run without faults.
    Undisturbed,
}

impl Role {
    /// The role's name in topology files and in `everstep status`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Loader => "loader",
            Self::Worker => "worker",
            Self::Shard => "shard",
        }
    }
}

impl Scenario {
    /// Reads and checks a chaos file.
    ///
    /// # Errors
    /// One that names the file, and the field with what is allowed.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let scenario: Self = toml::from_str(&text)
            .with_context(|| format!("{} is no chaos file", path.display()))?;
        scenario
            .check(path)
            .with_context(|| format!("{} is no chaos file", path.display()))?;
        Ok(scenario)
    }

    fn check(&self, path: &Path) -> Result<()> {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        ensure!(
            self.name == stem,
            "name: it is `{}`, but the file is called {stem}",
            self.name
        );
        let steps: Vec<u64> = self
            .faults
            .iter()
            .map(|Fault::Kill { after_step, .. }| *after_step)
            .collect();
        ensure!(
            !steps.is_empty() && steps.is_sorted(),
            "fault: at least one, in the order of their steps"
        );
        let Check {
            digest: Digest::Undisturbed,
            faults,
        } = self.check;
        ensure!(
            faults == steps.len(),
            "check.faults: it is {faults}, but the file has {} faults",
            steps.len()
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::Workspace;

    fn check(change: impl Fn(String) -> String) -> Result<Scenario> {
        let text = r#"name = "two"
            workload = { run = "a.toml", topology = "b.toml" }
            fault = [{ kind = "kill", role = "worker", after_step = 1 }, { kind = "kill", role = "shard", after_step = 2 }]
            check = { digest = "undisturbed", faults = 2 }"#;
        let scenario: Scenario = toml::from_str(&change(text.to_owned()))?;
        scenario.check(Path::new("chaos/two.toml"))?;
        Ok(scenario)
    }

    #[test]
    fn mistakes_are_named() {
        check(|text| text).unwrap();
        let wrong = |from: &str, to: &str| {
            format!("{:#}", check(|text| text.replace(from, to)).unwrap_err())
        };
        assert!(wrong("\"two\"", "\"three\"").contains("name:"));
        assert!(wrong("faults = 2", "faults = 3").contains("check.faults"));
        assert!(wrong("after_step = 2", "after_step = 0").contains("order"));
        assert!(wrong("\"shard\"", "\"shards\"").contains("`coordinator`"));
        assert!(wrong("digest", "digests").contains("digests"));
    }

    #[test]
    fn the_demos_file_is_right_and_names_files_that_exist() {
        let workspace = Workspace::locate().unwrap();
        let file = workspace
            .root()
            .join("chaos/fast/kill-worker-and-shard.toml");
        let scenario = Scenario::read(&file).unwrap();
        for named in [&scenario.workload.run, &scenario.workload.topology] {
            assert!(
                workspace.root().join(named).exists(),
                "{} names {}",
                file.display(),
                named.display()
            );
        }
    }
}
