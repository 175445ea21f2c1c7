//! Where things lie in a run directory.

use std::path::{Path, PathBuf};

/// A run directory; the names in it are part of the contract with scripts.
#[derive(Clone, Debug)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// The run directory at `path`, made absolute.
    pub fn new(path: impl AsRef<Path>) -> Self {
        let path = path.as_ref();
        Self(std::path::absolute(path).unwrap_or_else(|_| path.to_owned()))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0
    }
    /// The resolved run file.
    pub fn run_file(&self) -> PathBuf {
        self.0.join("run.toml")
    }
    /// The resolved topology, for the processes.
    pub fn topology(&self) -> PathBuf {
        self.0.join("topology.json")
    }
    /// One object per committed step.
    pub fn metrics(&self) -> PathBuf {
        self.0.join("metrics.jsonl")
    }
    /// One object per event.
    pub fn events(&self) -> PathBuf {
        self.0.join("events.jsonl")
    }
    /// What a process printed.
    pub fn log(&self, process: &str) -> PathBuf {
        self.0.join("logs").join(format!("{process}.log"))
    }
    /// What must outlive a process.
    pub fn ledger(&self, process: &str) -> PathBuf {
        self.0.join("ledger").join(process)
    }
    /// Quarantines that the store may not have yet.
    pub(crate) fn quarantine(&self) -> PathBuf {
        self.0.join("quarantine")
    }
    /// Where snapshots wait for the store.
    pub(crate) fn snapshots(&self) -> PathBuf {
        self.0.join("snapshots")
    }
    /// Copies of checkpoint objects, in a folder for each process that wrote them.
    pub(crate) fn local_checkpoints(&self) -> PathBuf {
        self.0.join("local")
    }
    /// Certificates of the cluster.
    pub fn tls(&self) -> PathBuf {
        self.0.join("tls")
    }
    /// Packed tokens and the tokenizer.
    pub fn data(&self) -> PathBuf {
        self.0.join("data")
    }
    /// Weights that the run starts from, if its file names any.
    pub(crate) fn initial_weights(&self) -> PathBuf {
        self.0.join("init")
    }
    /// Status files of agents and of the leader.
    pub fn status(&self) -> PathBuf {
        self.0.join("status")
    }
    /// The socket that the agent of a node listens on.
    pub fn control(&self, node: &str) -> PathBuf {
        self.0.join("control").join(format!("{node}.sock"))
    }
    /// The socket on which a process takes lanes from others of its node.
    pub(crate) fn lane(&self, process: &str) -> PathBuf {
        self.0.join("control").join(format!("{process}.lane"))
    }
    /// Event files for TensorBoard.
    pub fn tensorboard(&self) -> PathBuf {
        self.0.join("tensorboard")
    }
    /// The object store that is used when the run file names none.
    pub fn default_store(&self) -> String {
        format!("file://{}", self.0.join("store").display())
    }
}
