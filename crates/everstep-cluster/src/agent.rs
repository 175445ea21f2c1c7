//! The node agent: starts the processes of one node, notices their exits at once, restarts them. Holds no tensors.
//!
//! A process that lived long is restarted at once; one that dies young waits longer each time, and after
//! [`RestartPolicy::max_young_deaths`] in a row the agent gives up and stops the node: a crash loop never spins hot.

use std::fs::OpenOptions;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use everstep_telemetry::{Event, EventLog};
use tokio::io::AsyncWriteExt as _;
use tokio::process::{Child, ChildStdin, Command};
use tokio::task::JoinSet;

use crate::notice::{AGENT_VARIABLE, Notice};
use crate::rundir::RunDir;
use crate::status::{Life, ProcessState, ProcessStatus, write_processes};
use crate::topology::{ActorRole, Topology};

/// Exit code of a process whose user made a mistake; restarting cannot help.
pub const EXIT_USER_ERROR: i32 = 2;

/// How long processes may take to end after the first one ended because the run is over.
const FAREWELL: Duration = Duration::from_secs(5);

/// When and how often a dead process is started again.
#[derive(Clone, Copy, Debug)]
pub struct RestartPolicy {
    /// A process that lived this long is restarted at once.
    pub settled: Duration,
    /// First wait of one that died earlier; doubles with every early death in a row.
    pub backoff_first: Duration,
    /// Longest wait.
    pub backoff_max: Duration,
    /// Early deaths in a row after which the agent gives up.
    pub max_young_deaths: u32,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self {
            settled: Duration::from_secs(5),
            backoff_first: Duration::from_millis(50),
            backoff_max: Duration::from_secs(5),
            max_young_deaths: 12,
        }
    }
}

impl RestartPolicy {
    /// How long to wait after the `deaths`th early death in a row (0: it had settled).
    fn wait(&self, deaths: u32) -> Duration {
        match deaths {
            0 => Duration::ZERO,
            _ => self
                .backoff_first
                .saturating_mul(1 << (deaths - 1).min(16))
                .min(self.backoff_max),
        }
    }
}

/// Why an agent gave up.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A process says that its user made a mistake.
    #[error("{message}")]
    User {
        /// What it said, in one line.
        message: String,
    },
    /// A process cannot be kept alive.
    #[error("process {process} died {deaths} times in a row right after its start; see {log}")]
    CrashLoop {
        /// The process.
        process: String,
        /// How often.
        deaths: u32,
        /// Its log.
        log: String,
    },
    /// The system refused something.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
}

/// Supervises the processes of one node.
#[derive(Debug)]
pub struct Agent {
    run_dir: RunDir,
    topology: Topology,
    node: String,
    executable: PathBuf,
    policy: RestartPolicy,
    events: EventLog,
    slots: Vec<Slot>,
}

#[derive(Debug)]
struct Slot {
    process: u32,
    pid: Option<u32>,
    notices: Option<ChildStdin>,
    started: Instant,
    died: Instant,
    young_deaths: u32,
    restarts: u32,
    state: ProcessState,
}

enum Happening {
    Exited(usize, std::io::Result<ExitStatus>),
    RestartDue(usize),
}

impl Agent {
    /// An agent for node `node`; `executable` is the `everstep` binary.
    ///
    /// # Errors
    /// The event log cannot be opened.
    pub fn new(
        run_dir: RunDir,
        topology: Topology,
        node: &str,
        executable: PathBuf,
    ) -> Result<Self, AgentError> {
        let events = EventLog::open(run_dir.events()).map_err(|error| AgentError::System {
            what: "the event log cannot be opened".to_owned(),
            source: std::io::Error::other(error),
        })?;
        let now = Instant::now();
        let own = topology
            .processes
            .iter()
            .enumerate()
            .filter(|(_, process)| process.node == node);
        let slots = own
            .map(|(process, _)| Slot {
                process: process as u32,
                pid: None,
                notices: None,
                started: now,
                died: now,
                young_deaths: 0,
                restarts: 0,
                state: ProcessState::Restarting,
            })
            .collect();
        Ok(Self {
            run_dir,
            topology,
            node: node.to_owned(),
            executable,
            policy: RestartPolicy::default(),
            events,
            slots,
        })
    }

    /// Runs until every process ended as it should, or `stop` resolves (then the processes are stopped).
    ///
    /// # Errors
    /// A process reports a user's mistake, or cannot be kept alive. All processes are stopped then.
    pub async fn run(mut self, stop: impl Future<Output = ()>) -> Result<bool, AgentError> {
        let mut happenings = JoinSet::new();
        for index in 0..self.slots.len() {
            self.start(index, &mut happenings)?;
        }
        self.write_status();
        tokio::pin!(stop);
        // Processes end by themselves only when the run is over. Those that were away when it was announced do not hear of it.
        let mut over: Option<tokio::time::Instant> = None;
        let outcome = loop {
            let patience = async {
                match over {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = &mut stop => break Ok(false),
                () = patience => break Ok(true),
                happening = happenings.join_next() => match happening {
                    None => break Ok(true),
                    Some(Ok(Happening::RestartDue(_))) if over.is_some() => {}
                    Some(Ok(Happening::RestartDue(index))) => {
                        if let Err(error) = self.start(index, &mut happenings) {
                            break Err(error);
                        }
                    }
                    Some(Ok(Happening::Exited(index, status))) => {
                        if over.is_none() && status.as_ref().is_ok_and(ExitStatus::success) {
                            over = Some(tokio::time::Instant::now() + FAREWELL);
                        }
                        if let Err(error) = self.exited(index, status, &mut happenings).await {
                            break Err(error);
                        }
                    }
                    Some(Err(error)) => break Err(AgentError::System { what: "the agent".to_owned(), source: error.into() }),
                },
            }
            self.write_status();
        };
        self.stop_all(&mut happenings).await;
        self.write_status();
        outcome
    }

    fn start(
        &mut self,
        index: usize,
        happenings: &mut JoinSet<Happening>,
    ) -> Result<(), AgentError> {
        let slot = &mut self.slots[index];
        let process = &self.topology.processes[slot.process as usize];
        let log_path = self.run_dir.log(&process.name);
        let system = |what: String| move |source| AgentError::System { what, source };
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log_path)
            .map_err(system(format!("{} cannot be opened", log_path.display())))?;
        let errors = log
            .try_clone()
            .map_err(system("the log cannot be shared".to_owned()))?;
        let mut child = Command::new(&self.executable)
            .arg("process")
            .arg("--run-dir")
            .arg(self.run_dir.path())
            .arg("--name")
            .arg(&process.name)
            .env(AGENT_VARIABLE, &self.node)
            .stdin(Stdio::piped())
            .stdout(log)
            .stderr(errors)
            .kill_on_drop(true)
            .spawn()
            .map_err(system(format!(
                "{} cannot be started",
                self.executable.display()
            )))?;
        slot.pid = child.id();
        slot.notices = child.stdin.take();
        slot.started = Instant::now();
        if slot.state == ProcessState::Restarting && slot.restarts > 0 {
            let (pid, restarts, seconds) = (
                slot.pid.unwrap_or(0),
                slot.restarts,
                slot.died.elapsed().as_secs_f64(),
            );
            let event = Event::ProcessRestarted {
                process: process.name.clone(),
                node: self.node.clone(),
                pid,
                restarts,
                seconds,
            };
            self.log(&event);
        }
        self.slots[index].state = ProcessState::Running;
        happenings.spawn(wait(index, child));
        Ok(())
    }

    async fn exited(
        &mut self,
        index: usize,
        status: std::io::Result<ExitStatus>,
        happenings: &mut JoinSet<Happening>,
    ) -> Result<(), AgentError> {
        let number = self.slots[index].process;
        let process = self.topology.processes[number as usize].clone();
        let pid = self.slots[index].pid.take();
        self.slots[index].notices = None;
        let status = status.map_err(|source| AgentError::System {
            what: format!("process {} cannot be waited for", process.name),
            source,
        })?;
        if status.success() {
            tracing::info!(process = process.name, "ended");
            self.slots[index].state = ProcessState::Exited;
            self.log(&Event::ProcessStopped {
                process: process.name,
                node: self.node.clone(),
            });
            return Ok(());
        }
        if status.code() == Some(EXIT_USER_ERROR) {
            self.slots[index].state = ProcessState::Failed;
            return Err(AgentError::User {
                message: self.last_error(&process.name),
            });
        }
        tracing::warn!(process = process.name, %status, "died");
        let life = Life::read(&self.run_dir, &process.name).filter(|life| Some(life.pid) == pid);
        if let Some(life) = life {
            self.notify(&Notice::Exited {
                process: number,
                incarnation: life.incarnation,
            })
            .await;
        }
        let policy = self.policy;
        let slot = &mut self.slots[index];
        slot.died = Instant::now();
        slot.young_deaths = if slot.started.elapsed() >= policy.settled {
            0
        } else {
            slot.young_deaths + 1
        };
        slot.restarts += 1;
        slot.state = ProcessState::Restarting;
        let deaths = slot.young_deaths;
        if deaths > policy.max_young_deaths {
            slot.state = ProcessState::Failed;
            let restarts = slot.restarts - 1;
            let reason = format!("died {deaths} times in a row: {status}");
            self.log(&Event::ProcessQuarantined {
                process: process.name.clone(),
                node: self.node.clone(),
                restarts,
                reason,
            });
            let log = self.run_dir.log(&process.name).display().to_string();
            return Err(AgentError::CrashLoop {
                process: process.name,
                deaths,
                log,
            });
        }
        let roles = process
            .roles
            .iter()
            .map(|role: &ActorRole| role.name().to_owned())
            .collect();
        let reason = format!("the agent saw it end: {status}");
        self.log(&Event::ProcessLost {
            process: process.name,
            node: self.node.clone(),
            roles,
            step: None,
            epoch: None,
            reason,
        });
        let wait = policy.wait(deaths);
        happenings.spawn(async move {
            tokio::time::sleep(wait).await;
            Happening::RestartDue(index)
        });
        Ok(())
    }

    /// Tells every living process of this node.
    async fn notify(&mut self, notice: &Notice) {
        let Ok(mut line) = serde_json::to_vec(notice) else {
            return;
        };
        line.push(b'\n');
        for slot in &mut self.slots {
            let Some(notices) = &mut slot.notices else {
                continue;
            };
            // A stopped process may leave its pipe full; its peers must not wait for it.
            let written =
                tokio::time::timeout(Duration::from_millis(100), notices.write_all(&line)).await;
            if !matches!(written, Ok(Ok(()))) {
                tracing::debug!(process = slot.process, "does not take notices now");
            }
        }
    }

    /// Ends the processes: their pipes close, and what does not end by itself within two seconds is killed.
    async fn stop_all(&mut self, happenings: &mut JoinSet<Happening>) {
        for slot in &mut self.slots {
            slot.notices = None;
        }
        let deadline = tokio::time::Instant::now() + Duration::from_secs(2);
        while self.slots.iter().any(|slot| slot.pid.is_some()) {
            match tokio::time::timeout_at(deadline, happenings.join_next()).await {
                Ok(Some(Ok(Happening::Exited(index, _)))) => self.slots[index].pid = None,
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            }
        }
        // Dropping the waiting tasks kills what is left (`kill_on_drop`).
        happenings.shutdown().await;
        for slot in &mut self.slots {
            slot.pid = None;
            if slot.state != ProcessState::Failed {
                slot.state = ProcessState::Exited;
            }
        }
    }

    fn last_error(&self, process: &str) -> String {
        let log = std::fs::read_to_string(self.run_dir.log(process)).unwrap_or_default();
        let line = log
            .lines()
            .rev()
            .find_map(|line| line.strip_prefix("error: "));
        line.map_or_else(
            || format!("process {process} cannot run with this configuration; see its log"),
            str::to_owned,
        )
    }

    fn log(&self, event: &Event) {
        if let Err(error) = self.events.append(event) {
            tracing::error!(%error, "an event could not be logged");
        }
    }

    fn write_status(&self) {
        let processes: Vec<ProcessStatus> = self
            .slots
            .iter()
            .map(|slot| {
                let process = &self.topology.processes[slot.process as usize];
                ProcessStatus {
                    name: process.name.clone(),
                    node: process.node.clone(),
                    roles: process
                        .roles
                        .iter()
                        .map(|role| role.name().to_owned())
                        .collect(),
                    pid: slot.pid,
                    state: slot.state,
                    restarts: slot.restarts,
                }
            })
            .collect();
        if let Err(error) = write_processes(&self.run_dir, &self.node, &processes) {
            tracing::warn!(%error, "the status file cannot be written");
        }
    }
}

async fn wait(index: usize, mut child: Child) -> Happening {
    Happening::Exited(index, child.wait().await)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_are_bounded() {
        let policy = RestartPolicy::default();
        let waits: Vec<u128> = (0..12)
            .map(|deaths| policy.wait(deaths).as_millis())
            .collect();
        assert_eq!(
            waits,
            [
                0, 50, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000, 5000
            ]
        );
    }
}
