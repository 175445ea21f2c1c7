//! One agent per node and run directory.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write as _};

use crate::rundir::RunDir;

/// Held by the agent of some nodes as long as it lives; the system lets go when it dies.
#[derive(Debug)]
pub(crate) struct AgentLock {
    _files: Vec<File>,
}

/// Why a lock was not given.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    /// Somebody has it.
    #[error("{run_dir}: node {node} has an agent already (pid {pid}); stop that one first")]
    Held {
        /// The run directory.
        run_dir: String,
        /// The node.
        node: String,
        /// The other agent.
        pid: String,
    },
    /// The file cannot be used.
    #[error("{file}: {source}")]
    File {
        /// The file.
        file: String,
        /// Why.
        source: io::Error,
    },
}

impl AgentLock {
    /// Takes the locks of these nodes.
    pub(crate) fn acquire(run_dir: &RunDir, nodes: &[String]) -> Result<Self, LockError> {
        let lock = |node: &String| {
            let path = run_dir.control(node).with_extension("lock");
            let failed = |source| LockError::File {
                file: path.display().to_string(),
                source,
            };
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder).map_err(failed)?;
            }
            let mut file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .read(true)
                .open(&path)
                .map_err(failed)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let pid = fs::read_to_string(&path).unwrap_or_default();
                    return Err(LockError::Held {
                        run_dir: run_dir.path().display().to_string(),
                        node: node.clone(),
                        pid: pid.trim().to_owned(),
                    });
                }
                Err(TryLockError::Error(source)) => return Err(failed(source)),
            }
            file.set_len(0).map_err(failed)?;
            writeln!(file, "{}", std::process::id()).map_err(failed)?;
            Ok(file)
        };
        let files = nodes.iter().map(lock).collect::<Result<_, _>>()?;
        Ok(Self { _files: files })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_agent_per_node() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(folder.path());
        let node = |name: &str| vec![name.to_owned()];
        let first = AgentLock::acquire(&run_dir, &node("a")).unwrap();
        let second = AgentLock::acquire(&run_dir, &node("a"))
            .unwrap_err()
            .to_string();
        let expected = format!("(pid {}); stop that one first", std::process::id());
        assert!(second.ends_with(&expected), "{second}");
        AgentLock::acquire(&run_dir, &node("b")).unwrap();
        drop(first);
        AgentLock::acquire(&run_dir, &node("a")).unwrap();
    }
}
