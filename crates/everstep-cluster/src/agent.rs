//! The node agent: starts the processes of a node, notices their exits and hangs at once, restarts them. Holds no tensors.
//!
//! It may be killed at any time: its processes go on, and the next agent on the same run directory adopts them.
//!
//! - `policy`: when a process is restarted, and when no more
//! - `hang`: what is taken for hung
//! - `body`: a living process, child or adopted
//! - `server`: the control sockets
//! - `preemption`: notices that the machine will be taken away
//! - `requests`: what users, tools and the machine's provider ask
//! - `report`: events and status
//! - `lock`: one agent per node

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use everstep_telemetry::{Event, EventLog};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

mod body;
mod hang;
pub(crate) mod lock;
mod policy;
mod preemption;
mod report;
mod requests;
mod server;

pub use hang::HangPolicy;
pub use policy::RestartPolicy;
pub use preemption::{PreemptionSource, watch_preemption};
pub use requests::{AgentSignal, PreemptionNotice};

use crate::control::Notice;
use crate::control::link::AGENT_VARIABLE;
use crate::life::{self, Body, Life};
use crate::process::Ending;
use crate::rundir::RunDir;
use crate::status::{ProcessState, ProcessStatus, read_processes};
use crate::topology::{ActorRole, Topology};
use body::Exit;
use hang::{HangWatch, LOOK_MS};
use policy::{Death, Deaths, Verdict};
use requests::Asked;
use server::{Link, Said};

/// Exit code of a process whose user made a mistake; restarting cannot help.
pub const EXIT_USER_ERROR: i32 = 2;

/// How long processes may take to end after the first one ended because the run is over.
const FAREWELL: Duration = Duration::from_secs(5);
/// How long processes may take to end when they are told to.
const STOP: Duration = Duration::from_secs(2);
/// Happenings that may wait for the agent.
const QUEUE: usize = 256;

/// Why an agent gave up.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A process says that its user made a mistake.
    #[error("{message}")]
    User {
        /// What it said, in one line.
        message: String,
    },
    /// The run is given up.
    #[error("{message}")]
    Run {
        /// Why, in one line.
        message: String,
    },
    /// A process cannot be kept alive, and no other has its role.
    #[error(
        "process {process} died {deaths} times in a row right after its start, and no other process can do its work; see {log}"
    )]
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

/// How an agent's work ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgentOutcome {
    /// The run is over.
    Finished,
    /// Every process was released from its node; the run goes on elsewhere.
    Drained,
    /// The agent was told to stop, and stopped its processes.
    Stopped,
}

/// What an agent needs to know.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// Where the run lives.
    pub run_dir: RunDir,
    /// All processes.
    pub topology: Topology,
    /// The nodes whose processes are this agent's.
    pub nodes: Vec<String>,
    /// The `everstep` binary.
    pub executable: PathBuf,
    /// When a process is restarted.
    pub restart: RestartPolicy,
    /// When a process is taken for hung.
    pub hang: HangPolicy,
}

/// Supervises the processes of a node, or of several on one machine.
#[derive(Debug)]
pub struct Agent {
    options: AgentOptions,
    events: EventLog,
    born: Instant,
    slots: Vec<Slot>,
    queue: mpsc::Sender<Happening>,
    happenings: mpsc::Receiver<Happening>,
    /// Requests whose answer is a process's.
    asked: BTreeMap<u64, Asked>,
    next_id: u64,
    /// Nodes whose processes are not started again.
    leaving: BTreeSet<String>,
    /// When whatever is left must be stopped.
    deadline: Option<tokio::time::Instant>,
    /// The first process ended because the run is over.
    over: Option<tokio::time::Instant>,
    status_is_old: bool,
}

/// A process of the topology.
#[derive(Debug)]
struct Slot {
    process: u32,
    alive: Option<Alive>,
    died: Instant,
    deaths: Deaths,
    restarts: u32,
    state: ProcessState,
    /// It was linked at least once under this agent.
    has_joined: bool,
    last_reason: Option<String>,
}

/// What is known of a living process.
#[derive(Debug)]
struct Alive {
    body: Body,
    fd: Arc<OwnedFd>,
    since: Instant,
    link: Option<Link>,
    has_joined: bool,
    watch: HangWatch,
    /// For how long it has been hung, in milliseconds, if it is.
    hung_ms: Option<u64>,
    /// Why the agent killed it, if it did.
    killed: Option<String>,
}

/// What the agent's loop waits for.
#[derive(Debug)]
enum Happening {
    Exited { slot: usize, pid: u32, exit: Exit },
    RestartDue { slot: usize },
    Said(Said),
}

impl Agent {
    /// An agent that has not started anything yet. The caller holds the nodes' lock.
    ///
    /// # Errors
    /// The event log cannot be opened.
    pub fn new(options: AgentOptions) -> Result<Self, AgentError> {
        let events =
            EventLog::open(options.run_dir.events()).map_err(|error| AgentError::System {
                what: "the event log cannot be opened".to_owned(),
                source: std::io::Error::other(error),
            })?;
        let now = Instant::now();
        let processes = options.topology.processes.iter().enumerate();
        let own = processes.filter(|(_, process)| options.nodes.contains(&process.node));
        let slots = own
            .map(|(process, _)| Slot {
                process: process as u32,
                alive: None,
                died: now,
                deaths: Deaths::default(),
                restarts: 0,
                state: ProcessState::Restarting,
                has_joined: false,
                last_reason: None,
            })
            .collect();
        let (queue, happenings) = mpsc::channel(QUEUE);
        Ok(Self {
            options,
            events,
            born: now,
            slots,
            queue,
            happenings,
            asked: BTreeMap::new(),
            next_id: 0,
            leaving: BTreeSet::new(),
            deadline: None,
            over: None,
            status_is_old: true,
        })
    }

    /// Runs until every process ended as it should, or a signal says that it must end before.
    ///
    /// # Errors
    /// A process reports a user's mistake, or cannot be kept alive and nobody can do its work. All processes are stopped then.
    pub async fn run(
        mut self,
        mut signals: mpsc::Receiver<AgentSignal>,
    ) -> Result<AgentOutcome, AgentError> {
        let mut listeners = Vec::new();
        for node in &self.options.nodes {
            let listener = server::listen(&self.options.run_dir, node, self.queue.clone());
            listeners.push(listener.map_err(|source| AgentError::System {
                what: self.options.run_dir.control(node).display().to_string(),
                source,
            })?);
        }
        let outcome = match self.adopt_or_start_all() {
            Ok(()) => self.supervise(&mut signals).await,
            Err(error) => Err(error),
        };
        self.stop_all(&mut signals).await;
        self.write_status();
        for (node, listener) in self.options.nodes.iter().zip(listeners) {
            listener.abort();
            let _ = std::fs::remove_file(self.options.run_dir.control(node));
        }
        outcome
    }

    async fn supervise(
        &mut self,
        signals: &mut mpsc::Receiver<AgentSignal>,
    ) -> Result<AgentOutcome, AgentError> {
        let mut looks = tokio::time::interval(Duration::from_millis(LOOK_MS));
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last_look = Instant::now();
        loop {
            if self.status_is_old {
                self.write_status();
            }
            if let Some(outcome) = self.outcome() {
                return Ok(outcome);
            }
            // Processes end by themselves only when the run is over. Those that were away when it was announced do not hear of it.
            let until = [self.over, self.deadline].into_iter().flatten().min();
            let patience = async {
                match until {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                signal = signals.recv() => match signal {
                    Some(AgentSignal::Preempted(notice)) => self.preempted(&notice),
                    Some(AgentSignal::Leave) if self.leave() => {}
                    Some(AgentSignal::Leave | AgentSignal::Stop) | None => return Ok(AgentOutcome::Stopped),
                },
                () = patience => return Ok(match self.over {
                    Some(_) => AgentOutcome::Finished,
                    None => AgentOutcome::Stopped,
                }),
                happening = self.happenings.recv() => match happening {
                    Some(happening) => self.handle(happening)?,
                    None => return Ok(AgentOutcome::Stopped),
                },
                _ = looks.tick() => {
                    let elapsed_ms = last_look.elapsed().as_millis() as u64;
                    last_look = Instant::now();
                    self.look(elapsed_ms);
                }
            }
        }
    }

    /// How it ended, once nothing lives and nothing will be started.
    fn outcome(&self) -> Option<AgentOutcome> {
        let is_over = |slot: &Slot| slot.alive.is_none() && slot.state != ProcessState::Restarting;
        if !self.slots.iter().all(is_over) {
            return None;
        }
        let is_finished = self
            .slots
            .iter()
            .any(|slot| slot.state == ProcessState::Exited);
        Some(if is_finished {
            AgentOutcome::Finished
        } else {
            AgentOutcome::Drained
        })
    }

    fn adopt_or_start_all(&mut self) -> Result<(), AgentError> {
        let nodes = self.options.nodes.clone();
        let known: Vec<ProcessStatus> = nodes
            .iter()
            .flat_map(|node| read_processes(&self.options.run_dir, node))
            .collect();
        let bodies: Vec<Option<Body>> = (0..self.slots.len())
            .map(|slot| life::living(&self.options.run_dir, &self.name(slot)))
            .collect();
        let is_handover = bodies.iter().any(Option::is_some);
        for (slot, body) in bodies.into_iter().enumerate() {
            let before = known.iter().find(|known| known.name == self.name(slot));
            if let (true, Some(before)) = (is_handover, before) {
                self.slots[slot].restarts = before.restarts;
                self.slots[slot].last_reason.clone_from(&before.last_reason);
            }
            if body.is_some_and(|body| self.adopt(slot, body)) {
                continue;
            }
            if is_handover && before.is_some_and(|before| before.state == ProcessState::Drained) {
                self.slots[slot].state = ProcessState::Drained;
                continue;
            }
            if is_handover {
                self.missed(slot, before);
            }
            self.start(slot)?;
        }
        Ok(())
    }

    /// A process that the earlier agent knew is not alive any more.
    fn missed(&mut self, slot: usize, before: Option<&ProcessStatus>) {
        // That it is to be started again was told and counted already.
        if before.is_some_and(|before| before.state == ProcessState::Restarting) {
            return;
        }
        self.slots[slot].restarts += 1;
        if !before.is_some_and(|before| before.state.is_alive()) {
            return;
        }
        let reason = "it ended while no agent watched".to_owned();
        self.slots[slot].last_reason = Some(reason.clone());
        self.log(&Event::ProcessLost {
            process: self.name(slot),
            node: self.node(slot),
            roles: self.roles(slot),
            step: None,
            epoch: None,
            reason,
        });
    }

    /// Takes a living process over; false if it died right now.
    fn adopt(&mut self, slot: usize, body: Body) -> bool {
        let Ok(fd) = body::open(body) else {
            return false;
        };
        let pid = body.pid;
        self.spawn_wait(slot, pid, body::adopted_exit(fd.clone()));
        self.log(&Event::ProcessAdopted {
            process: self.name(slot),
            node: self.node(slot),
            pid,
        });
        self.is_alive(slot, body, fd);
        true
    }

    fn is_alive(&mut self, slot: usize, body: Body, fd: Arc<OwnedFd>) {
        let slot = &mut self.slots[slot];
        slot.alive = Some(Alive {
            body,
            fd,
            since: Instant::now(),
            link: None,
            has_joined: false,
            watch: HangWatch::default(),
            hung_ms: None,
            killed: None,
        });
        slot.state = ProcessState::Running;
        self.status_is_old = true;
    }

    fn start(&mut self, slot: usize) -> Result<(), AgentError> {
        let name = self.name(slot);
        let log_path = self.options.run_dir.log(&name);
        let system = |what: String| move |source| AgentError::System { what, source };
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log_path)
            .map_err(system(format!("{} cannot be opened", log_path.display())))?;
        let errors = log
            .try_clone()
            .map_err(system("the log cannot be shared".to_owned()))?;
        // A group of its own: what a terminal sends to the agent's group is the agent's to pass on.
        let child = Command::new(&self.options.executable)
            .arg("process")
            .arg("--run-dir")
            .arg(self.options.run_dir.path())
            .arg("--name")
            .arg(&name)
            .env(AGENT_VARIABLE, self.node(slot))
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .process_group(0)
            .spawn()
            .map_err(system(format!(
                "{} cannot be started",
                self.options.executable.display()
            )))?;
        let pid = child.id();
        let (restarts, seconds) = {
            let slot = &self.slots[slot];
            (slot.restarts, slot.died.elapsed().as_secs_f64())
        };
        if restarts > 0 {
            self.log(&Event::ProcessRestarted {
                process: name.clone(),
                node: self.node(slot),
                pid,
                restarts,
                seconds,
            });
        }
        // One that died already is a zombie until it is waited for: it has a descriptor, too.
        let body = Body::of_child(pid);
        let fd = body::open_child(body).map_err(system(format!("process {name}")))?;
        if let Err(error) = life::write_started(&self.options.run_dir, &name, body) {
            tracing::warn!(%error, "the next agent may not find a process");
        }
        self.is_alive(slot, body, fd);
        self.spawn_wait(slot, pid, body::child_exit(child));
        Ok(())
    }

    fn spawn_wait(&self, slot: usize, pid: u32, exit: impl Future<Output = Exit> + Send + 'static) {
        let queue = self.queue.clone();
        tokio::spawn(async move {
            let exit = exit.await;
            let _ = queue.send(Happening::Exited { slot, pid, exit }).await;
        });
    }

    fn handle(&mut self, happening: Happening) -> Result<(), AgentError> {
        match happening {
            Happening::Exited { slot, pid, exit } => self.exited(slot, pid, &exit),
            Happening::RestartDue { slot } => {
                let is_due = self.over.is_none()
                    && self.slots[slot].alive.is_none()
                    && self.slots[slot].state == ProcessState::Restarting;
                if is_due { self.start(slot) } else { Ok(()) }
            }
            Happening::Said(said) => {
                self.said(said);
                Ok(())
            }
        }
    }

    fn exited(&mut self, slot: usize, pid: u32, exit: &Exit) -> Result<(), AgentError> {
        let alive = self.slots[slot]
            .alive
            .take_if(|alive| alive.body.pid == pid);
        let Some(alive) = alive else {
            return Ok(());
        };
        self.status_is_old = true;
        let name = self.name(slot);
        let life = Life::read(&self.options.run_dir, &name).filter(|life| life.body.pid == pid);
        if let Some(ending) = life.and_then(|life| life.ended) {
            self.ended(slot, ending);
            if ending == Ending::Failed {
                return Err(AgentError::Run {
                    message: self.last_error(&name),
                });
            }
            return Ok(());
        }
        // A mistake shows at the first start. What ran already is not stopped because a port is taken for a moment.
        if exit.code() == Some(EXIT_USER_ERROR) && !self.slots[slot].has_joined {
            self.slots[slot].state = ProcessState::Failed;
            return Err(AgentError::User {
                message: self.last_error(&name),
            });
        }
        if let Some(life) = life {
            self.notify(&Notice::Exited {
                process: self.slots[slot].process,
                incarnation: life.incarnation,
            });
        }
        let reason = match &alive.killed {
            Some(why) => format!("the agent ended it: {why}"),
            None => match exit.code().and_then(|_| self.last_words(&name)) {
                Some(error) => format!("the agent saw it end: {exit}: {error}"),
                None => format!("the agent saw it end: {exit}"),
            },
        };
        tracing::warn!(process = name, reason, "died");
        self.slots[slot].last_reason = Some(reason.clone());
        let death = Death {
            now_ms: self.born.elapsed().as_millis() as u64,
            lived_ms: alive.since.elapsed().as_millis() as u64,
            is_kill: alive.has_joined && exit.may_be_killed(),
        };
        let verdict = self.slots[slot].deaths.judge(&self.options.restart, death);
        self.slots[slot].died = Instant::now();
        self.log(&Event::ProcessLost {
            process: name,
            node: self.node(slot),
            roles: self.roles(slot),
            step: None,
            epoch: None,
            reason,
        });
        if self.leaving.contains(&self.node(slot)) {
            self.slots[slot].state = ProcessState::Drained;
            return Ok(());
        }
        match verdict {
            Verdict::Restart { wait_ms } => {
                self.slots[slot].restarts += 1;
                self.slots[slot].state = ProcessState::Restarting;
                let queue = self.queue.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(wait_ms)).await;
                    let _ = queue.send(Happening::RestartDue { slot }).await;
                });
                Ok(())
            }
            Verdict::GiveUp { deaths } => self.give_up(slot, deaths),
        }
    }

    /// A process ended as it should.
    fn ended(&mut self, slot: usize, ending: Ending) {
        tracing::info!(process = self.name(slot), ?ending, "ended");
        self.slots[slot].state = match ending {
            Ending::Drained => ProcessState::Drained,
            Ending::Failed => ProcessState::Failed,
            Ending::Finished | Ending::Stopped | Ending::Orphaned => ProcessState::Exited,
        };
        if ending == Ending::Finished && self.over.is_none() {
            self.over = Some(tokio::time::Instant::now() + FAREWELL);
        }
        self.log(&Event::ProcessStopped {
            process: self.name(slot),
            node: self.node(slot),
        });
    }

    /// A process that cannot live stays down if others can do its work, and stops the node otherwise.
    fn give_up(&mut self, slot: usize, deaths: u32) -> Result<(), AgentError> {
        let name = self.name(slot);
        let reason = format!(
            "died {deaths} times in a row right after its start; {}",
            self.slots[slot].last_reason.as_deref().unwrap_or_default()
        );
        self.log(&Event::ProcessQuarantined {
            process: name.clone(),
            node: self.node(slot),
            restarts: self.slots[slot].restarts,
            reason,
        });
        self.slots[slot].state = ProcessState::Quarantined;
        let is_down = |slot: &Slot| slot.state == ProcessState::Quarantined;
        if self.can_be_missed(slot) && !self.slots.iter().all(is_down) {
            tracing::error!(process = name, deaths, "stays down; the others do its work");
            return Ok(());
        }
        self.slots[slot].state = ProcessState::Failed;
        Err(AgentError::CrashLoop {
            log: self.options.run_dir.log(&name).display().to_string(),
            process: name,
            deaths,
        })
    }

    /// Whether each role of the process is played by another that is not down for good.
    fn can_be_missed(&self, slot: usize) -> bool {
        let is_down = |process: u32| {
            let own = self.slots.iter().find(|slot| slot.process == process);
            own.is_some_and(|own| {
                matches!(own.state, ProcessState::Quarantined | ProcessState::Drained)
            })
        };
        let processes = &self.options.topology.processes;
        let own = self.slots[slot].process;
        let plays = |process: u32, role: &ActorRole| {
            processes[process as usize].roles.contains(role) && !is_down(process)
        };
        let roles = &processes[own as usize].roles;
        roles.iter().all(|role| {
            (0..processes.len() as u32).any(|process| process != own && plays(process, role))
        })
    }

    /// Tells every living process.
    fn notify(&self, notice: &Notice) {
        for slot in &self.slots {
            let link = slot.alive.as_ref().and_then(|alive| alive.link.as_ref());
            if link.is_some_and(|link| !link.send(notice.clone())) {
                tracing::debug!(process = slot.process, "does not take notices now");
            }
        }
    }

    /// Ends the processes: they are told, and what does not end by itself within two seconds is killed; so is everything at a second signal.
    async fn stop_all(&mut self, signals: &mut mpsc::Receiver<AgentSignal>) {
        self.notify(&Notice::Stop);
        let deadline = tokio::time::Instant::now() + STOP;
        let mut is_killed = false;
        while self.slots.iter().any(|slot| slot.alive.is_some()) {
            let late = async {
                match is_killed {
                    false => tokio::time::sleep_until(deadline).await,
                    true => std::future::pending().await,
                }
            };
            tokio::select! {
                happening = self.happenings.recv() => match happening {
                    Some(Happening::Exited { slot, pid, .. }) => {
                        self.slots[slot].alive.take_if(|alive| alive.body.pid == pid);
                    }
                    // A process that links only now is told now.
                    Some(Happening::Said(Said::Hello { link, .. })) => {
                        link.send(Notice::Stop);
                    }
                    Some(_) => {}
                    None => break,
                },
                Some(_) = signals.recv(), if !is_killed => is_killed = self.kill_all(),
                () = late => is_killed = self.kill_all(),
            }
        }
        for slot in &mut self.slots {
            if slot.state.is_alive() || slot.state == ProcessState::Restarting {
                slot.state = ProcessState::Exited;
            }
        }
    }

    fn kill_all(&self) -> bool {
        for alive in self.slots.iter().filter_map(|slot| slot.alive.as_ref()) {
            body::kill(&alive.fd);
        }
        true
    }
}
