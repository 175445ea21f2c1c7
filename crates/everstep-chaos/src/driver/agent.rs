//! The run's agent, a child of the driver, and everything that it starts.

use std::fs::OpenOptions;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use everstep_cluster::Topology;
use nix::sys::signal::Signal;

use super::observer::Alive;
use crate::ChaosError;
use crate::process::{self, Identity, State};

/// How long an agent that a fault ended stays away, in seconds: about what a service manager takes.
const AWAY_SECONDS: f64 = 1.0;

/// How long a run that is told to stop may take before it is killed.
const STOP: Duration = Duration::from_secs(10);

/// How to start, and start again, the run that is disturbed.
#[derive(Debug, Clone)]
pub struct TrainCommand {
    /// The `everstep` binary.
    pub executable: PathBuf,
    /// The run file.
    pub run_file: PathBuf,
    /// The topology file; everything in one process without it.
    pub topology: Option<PathBuf>,
    /// `field=value` overrides.
    pub set: Vec<String>,
    /// The run directory, absolute.
    pub run_dir: PathBuf,
    /// Takes what the command prints.
    pub log: PathBuf,
    /// Environment variables that differ from this process's.
    pub environment: Vec<(String, String)>,
}

impl TrainCommand {
    /// Starts it in a process group of its own.
    ///
    /// # Errors
    /// The binary cannot be started or the log not be written.
    pub fn spawn(&self) -> Result<Child, ChaosError> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)
            .map_err(ChaosError::io("open", &self.log))?;
        let errors = log.try_clone().map_err(ChaosError::io("open", &self.log))?;
        let mut command = Command::new(&self.executable);
        command
            .arg("train")
            .arg(&self.run_file)
            .arg("--run-dir")
            .arg(&self.run_dir);
        if let Some(topology) = &self.topology {
            command.arg("--topology").arg(topology);
        }
        for set in &self.set {
            command.arg("--set").arg(set);
        }
        command
            .envs(self.environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .process_group(0)
            .spawn()
            .map_err(ChaosError::io("start", &self.executable))
    }

    /// The last line of the log that tells of an error.
    #[must_use]
    pub fn last_error(&self) -> Option<String> {
        let log = std::fs::read_to_string(&self.log).ok()?;
        let line = log.lines().rev().find(|line| line.starts_with("error: "))?;
        Some(line.trim_start_matches("error: ").to_owned())
    }
}

/// How the run ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// With exit code 0.
    Finished,
    /// As it was asked to, with the step committed that was open.
    Stopped,
    /// Otherwise.
    Failed(String),
}

#[derive(Debug)]
pub(super) struct AgentChild {
    command: TrainCommand,
    node: String,
    child: Option<Child>,
    identity: Option<Identity>,
    /// It was killed on purpose and is to be started again then.
    away_until: Option<f64>,
    /// It was asked to commit the open step and stop.
    is_leaving: bool,
    /// Processes whose parent may be this one by now.
    adopted: Vec<i32>,
}

impl AgentChild {
    pub(super) fn start(command: TrainCommand, topology: &Topology) -> Result<Self, ChaosError> {
        // What an agent leaves behind when it is killed becomes a child of this process, which can then end it for certain.
        let _ = nix::sys::prctl::set_child_subreaper(true);
        let mut agent = Self {
            node: topology.processes[0].node.clone(),
            command,
            child: None,
            identity: None,
            away_until: None,
            is_leaving: false,
            adopted: Vec::new(),
        };
        agent.spawn()?;
        Ok(agent)
    }

    fn spawn(&mut self) -> Result<(), ChaosError> {
        let child = self.command.spawn()?;
        self.identity = Identity::of(child.id() as i32);
        self.child = Some(child);
        self.away_until = None;
        Ok(())
    }

    /// Whether and how the run ended; an agent that was killed on purpose has not.
    pub(super) fn ended(&mut self, now: f64) -> Option<Ended> {
        process::reap(&mut self.adopted);
        let status = match self.child.as_mut()?.try_wait() {
            Ok(None) => return None,
            Ok(Some(status)) => status,
            Err(error) => return Some(Ended::Failed(format!("cannot be waited for: {error}"))),
        };
        self.child = None;
        if status.success() {
            return Some(Ended::Finished);
        }
        if self.away_until.is_some() {
            self.away_until = Some(now + AWAY_SECONDS);
            return None;
        }
        let reason = self.command.last_error().unwrap_or_default();
        if self.is_leaving && reason.contains("which is committed") {
            return Some(Ended::Stopped);
        }
        let log = self.command.log.display();
        Some(Ended::Failed(format!(
            "everstep train ended with {status}: {reason} (see {log})"
        )))
    }

    pub(super) fn alive(&self) -> Option<Alive> {
        let identity = self.identity.filter(|_| self.child.is_some())?;
        (identity.state() != State::Dead).then(|| Alive {
            name: format!("agent {}", self.node),
            node: self.node.clone(),
            roles: vec!["agent".to_owned()],
            identity,
        })
    }

    /// Asks the run to commit the open step and stop, once.
    pub(super) fn leave(&mut self) {
        if let (false, Some(_), Some(identity)) = (self.is_leaving, &self.child, self.identity) {
            self.is_leaving = identity.signal(Signal::SIGTERM);
        }
    }

    /// Whether it was killed on purpose and is not back.
    pub(super) fn is_away(&self) -> bool {
        self.away_until.is_some()
    }

    /// Says that the agent is about to be killed on purpose, and which processes will have no parent then.
    pub(super) fn goes_away(&mut self, now: f64, orphans: impl Iterator<Item = i32>) {
        self.away_until = Some(now + AWAY_SECONDS);
        // The agent itself is waited for by its handle, which must not find that somebody else did.
        let own = self.identity.map(|identity| identity.pid);
        self.adopted.extend(orphans.filter(|pid| Some(*pid) != own));
    }

    pub(super) fn restart_if_due(&mut self, now: f64) -> Result<(), ChaosError> {
        if self.child.is_none() && self.away_until.is_some_and(|until| now >= until) {
            self.spawn()?;
        }
        Ok(())
    }

    /// Ends the agent and every process of the run, whoever their parent is.
    pub(super) fn end(&mut self) {
        if let (Some(child), Some(identity)) = (&mut self.child, self.identity) {
            // Asked politely first: the agent stops its processes.
            let asked = identity.signal(Signal::SIGTERM);
            let started = Instant::now();
            while asked && matches!(child.try_wait(), Ok(None)) && started.elapsed() < STOP {
                std::thread::sleep(super::LOOK_EVERY);
            }
            let _ = child.kill();
            let _ = child.wait();
            self.child = None;
        }
        let started = Instant::now();
        loop {
            let left = process::all_of(&self.command.run_dir);
            self.adopted.extend(left.iter().map(|left| left.pid));
            if left.is_empty() || started.elapsed() > STOP {
                break;
            }
            for process in left {
                let _ = process.signal(Signal::SIGKILL);
            }
            std::thread::sleep(super::LOOK_EVERY);
            process::reap(&mut self.adopted);
        }
    }
}

impl Drop for AgentChild {
    fn drop(&mut self) {
        self.end();
    }
}
