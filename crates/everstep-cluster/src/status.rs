//! What `everstep status` shows: small files, replaced whole, written by the leader and by each node's agent.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use everstep_store::Quarantine;
use serde::{Deserialize, Serialize};

use crate::proc;
use crate::rundir::RunDir;
use crate::topology::Topology;

/// Written by the leader.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LeaderStatus {
    /// Name of the leading process.
    pub leader: String,
    /// Its epoch.
    pub epoch: u64,
    /// The step in work: the number of steps committed.
    pub step: u64,
    /// Workers that are leased nothing because their devices lied.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub quarantined: Vec<Quarantine>,
}

/// State of a process as its agent sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProcessState {
    /// Alive.
    Running,
    /// Alive, and does nothing: its agent ends it, or waits whether it goes on.
    Hung,
    /// Dead, waiting for its restart.
    Restarting,
    /// Ended as it should.
    Exited,
    /// Its node was drained; it ended as it should.
    Drained,
    /// Died too often and stays down; the others do its work.
    Quarantined,
    /// Died too often, and nobody can do its work: its agent gave up.
    Failed,
}

impl ProcessState {
    /// Whether there is such a process, whatever it does.
    #[must_use]
    pub fn is_alive(self) -> bool {
        matches!(self, Self::Running | Self::Hung)
    }
}

/// One process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProcessStatus {
    /// Name.
    pub name: String,
    /// Node.
    pub node: String,
    /// Roles.
    pub roles: Vec<String>,
    /// Process id, if alive.
    pub pid: Option<u32>,
    /// State.
    pub state: ProcessState,
    /// Restarts since the run was started.
    pub restarts: u32,
    /// Why it died the last time, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_reason: Option<String>,
}

/// Whether the object store answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoreState {
    /// It does.
    #[default]
    Reachable,
    /// It does not; training goes on and checkpoints wait.
    Unreachable,
}

/// The object store and the checkpoints, as the leader, or who wants to lead, sees them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StoreStatus {
    /// Name of the process that wrote this.
    pub process: String,
    /// Whether the store answers.
    pub state: StoreState,
    /// Since when it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// What it, or the network, says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Step of the newest committed checkpoint; 0 if there is none.
    pub checkpoint: u64,
    /// Steps committed since then: what a loss of all replicas would cost.
    pub lag_steps: u64,
    /// What cannot go on without the store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<String>,
    /// How often checkpoints are taken.
    #[serde(default)]
    pub cadence: CadenceStatus,
}

/// How often checkpoints are taken, and what that follows from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CadenceStatus {
    /// As the run file says.
    pub every: String,
    /// Seconds from one to the next; none if they are due by steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval_seconds: Option<f64>,
    /// What one costs training, as measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost_seconds: Option<f64>,
    /// How long one is on its way to the store, as measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upload_seconds: Option<f64>,
    /// Mean time between failures, as measured; only for `auto`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtbf_seconds: Option<f64>,
}

impl StoreStatus {
    /// Replaces the file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, run_dir: &RunDir) -> std::io::Result<()> {
        replace(&run_dir.status().join("store.json"), self)
    }
}

/// Everything that is known of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunStatus {
    /// The leader, if any wrote.
    #[serde(flatten)]
    pub leader: LeaderStatus,
    /// The object store, if anybody wrote.
    #[serde(default)]
    pub store: Option<StoreStatus>,
    /// All processes.
    pub processes: Vec<ProcessStatus>,
}

impl LeaderStatus {
    /// What the last leader wrote, if anything.
    pub(crate) fn read(run_dir: &RunDir) -> Option<Self> {
        let bytes = fs::read(run_dir.status().join("leader.json")).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// How long ago it was written.
    pub(crate) fn age(&self, run_dir: &RunDir) -> Duration {
        let metadata = fs::metadata(run_dir.status().join("leader.json"));
        let written = metadata.and_then(|metadata| metadata.modified()).ok();
        let age = written.and_then(|written| written.elapsed().ok());
        age.unwrap_or_default()
    }

    /// Replaces the leader's file.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, run_dir: &RunDir) -> std::io::Result<()> {
        replace(&run_dir.status().join("leader.json"), self)
    }
}

/// Replaces the file of a node's agent.
///
/// # Errors
/// The file cannot be written.
pub fn write_processes(
    run_dir: &RunDir,
    node: &str,
    processes: &[ProcessStatus],
) -> std::io::Result<()> {
    replace(
        &run_dir.status().join(format!("node-{node}.json")),
        &processes,
    )
}

/// Writes the status of a topology's only process, which has no agent: this one.
///
/// # Errors
/// The file cannot be written.
pub fn write_single_process(run_dir: &RunDir, topology: &Topology) -> std::io::Result<()> {
    let process = &topology.processes[0];
    let status = ProcessStatus {
        name: process.name.clone(),
        node: process.node.clone(),
        roles: process
            .roles
            .iter()
            .map(|role| role.name().to_owned())
            .collect(),
        pid: Some(std::process::id()),
        state: ProcessState::Running,
        restarts: 0,
        last_reason: None,
    };
    write_processes(run_dir, &process.node, &[status])
}

/// Reads what is known; a process whose agent died with it is shown by what the system says of its pid.
///
/// # Errors
/// There is no run in `run_dir`, or a file is not what it should be.
pub fn read(run_dir: &RunDir) -> std::io::Result<RunStatus> {
    let folder = run_dir.status();
    let leader = match fs::read(folder.join("leader.json")) {
        Ok(bytes) => serde_json::from_slice(&bytes)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => LeaderStatus::default(),
        Err(error) => return Err(error),
    };
    let store = match fs::read(folder.join("store.json")) {
        Ok(bytes) => Some(serde_json::from_slice(&bytes)?),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let mut processes: Vec<ProcessStatus> = Vec::new();
    let mut files: Vec<_> = fs::read_dir(&folder)?.collect::<Result<_, _>>()?;
    files.sort_by_key(fs::DirEntry::file_name);
    for file in files {
        let name = file.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("node-") && name.ends_with(".json") {
            processes.extend(serde_json::from_slice::<Vec<ProcessStatus>>(&fs::read(
                file.path(),
            )?)?);
        }
    }
    for process in &mut processes {
        if process.state.is_alive() && !process.pid.is_some_and(is_alive) {
            process.state = ProcessState::Exited;
            process.pid = None;
        }
    }
    Ok(RunStatus {
        leader,
        store,
        processes,
    })
}

/// What the agent of `node` wrote last.
pub(crate) fn read_processes(run_dir: &RunDir, node: &str) -> Vec<ProcessStatus> {
    let bytes = fs::read(run_dir.status().join(format!("node-{node}.json"))).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

fn is_alive(pid: u32) -> bool {
    proc::stat(pid).is_some_and(|stat| stat.is_alive())
}

pub(crate) fn replace<T: Serialize + ?Sized>(path: &Path, value: &T) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let mut file = fs::File::create(&temporary)?;
    file.write_all(&serde_json::to_vec_pretty(value)?)?;
    fs::rename(&temporary, path)
}

/// As [`replace`], for what must still be there after a power loss.
pub(crate) fn replace_durably<T: Serialize>(path: &Path, value: &T) -> std::io::Result<()> {
    replace(path, value)?;
    fs::File::open(path)?.sync_all()?;
    fs::File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}
