//! One process: its supervision tree, and what its actors share.
//!
//! ```text
//! supervisor (one_for_one, 20 restarts in 30 s, back-off 50 ms to 2 s; beyond that the process exits and its agent restarts it)
//! ├─ checkpointer   permanent   object store; only where a shard or a coordinator lives
//! ├─ mesh           permanent   QUIC endpoint and sessions; not in a topology of one process
//! ├─ loader-N       permanent
//! ├─ shard-N        permanent   a new life starts empty and is seeded
//! ├─ worker-N       permanent   a new life has a new device thread
//! └─ coordinator-N  permanent   a new life takes a new epoch
//! ```

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use everstep_store::{Ledger, RunStore};
use everstep_telemetry::{Event, EventLog};
use everstep_train::Backend;
use everstep_transport::{Endpoint, Hello, Identity, TransportOptions};
use ractor::{Actor, ActorRef, MessagingErr};
use ractor_supervisor::{
    ChildBackoffFn, ChildSpec, Restart, SpawnFn, Supervisor, SupervisorArguments,
    SupervisorOptions, SupervisorStrategy,
};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::actors::{
    ActorArguments, Checkpointer, CheckpointerMessage, CoordinatorActor, Loader, ShardActor,
    WorkerActor,
};
use crate::background::Background;
use crate::control::link;
use crate::injection::Injected;
use crate::life::Life;
use crate::local_state::{self, LocalState};
use crate::mesh::{Mesh, MeshArguments};
use crate::progress::Devices;
use crate::router::Router;
use crate::run::RunContext;
use crate::rundir::RunDir;
use crate::scrub;
use crate::session::{self, Sessions};
use crate::slots::SlotCounter;
use crate::store_health::{self, StoreHealth};
use crate::topology::{ActorAddress, ActorRole};

const MAX_RESTARTS: usize = 20;
const RESTART_WINDOW: Duration = Duration::from_secs(30);
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// How long compute threads may take to end with their process.
const DEVICES_END: Duration = Duration::from_secs(1);
const DEVICES_LOOK: Duration = Duration::from_millis(2);
/// After the end of the run, the leader stays this long to tell everybody.
const FAREWELL: Duration = Duration::from_secs(3);

/// Bits of an incarnation that count restarts within a process.
const LIFE_BITS: u32 = 16;

/// A process's first incarnation.
const FIRST_LIFE: u64 = 1;

/// The process's part of a member's incarnation.
pub(crate) fn process_life(incarnation: u64) -> u64 {
    incarnation >> LIFE_BITS
}

/// Why a process ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// The run is over.
    Finished,
    /// Its node was drained: whatever it held is elsewhere.
    Drained,
    /// Its agent, or a signal when it has none, told it to end.
    Stopped,
    /// Its agent died and none came back.
    Orphaned,
    /// The run is given up, for a reason that no restart mends.
    Failed,
}

/// Why a process could not start or had to end.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// Something that only the user can mend: certificates, a port in use.
    #[error("{0}")]
    User(String),
    /// The run is given up.
    #[error("{0}")]
    Run(String),
    /// Something it needs is not there now.
    #[error("{0}")]
    Start(String),
    /// An actor failed too often.
    #[error("process {0}: its actors failed too often")]
    Meltdown(String),
}

/// What the actors of a process share.
pub(crate) struct ProcessContext {
    pub(crate) run: Arc<RunContext>,
    /// What computes; nothing in a process without workers.
    pub(crate) backend: Option<&'static dyn Backend>,
    pub(crate) run_dir: RunDir,
    pub(crate) router: Arc<Router>,
    pub(crate) store: RunStore,
    pub(crate) store_health: StoreHealth,
    pub(crate) ledger: Ledger,
    /// Slots that the workers of this process computed; there where one lives.
    pub(crate) slots: Option<Arc<SlotCounter>>,
    /// Number of this process in the topology.
    pub(crate) process: u32,
    /// Which life of the process this is.
    pub(crate) incarnation: u64,
    /// Faults that it has been told to have.
    pub(crate) injected: Injected,
    lives: AtomicU64,
    first_election: AtomicBool,
    events: EventLog,
    started: Instant,
    ending: watch::Sender<Option<Ending>>,
    /// Why the run is given up, if it is.
    failure: OnceLock<String>,
    /// Whether the agent is there.
    pub(crate) linked: AtomicBool,
    /// The compute threads of this process.
    pub(crate) devices: Devices,
    checkpointer: Mutex<Option<ActorRef<CheckpointerMessage>>>,
    /// Where tasks of threads that are not the runtime's go.
    pub(crate) runtime: tokio::runtime::Handle,
    /// Where tasks that training must not wait for go.
    pub(crate) background: Background,
    /// Actors of this process that may go.
    pub(crate) released: Mutex<BTreeSet<ActorAddress>>,
}

impl std::fmt::Debug for ProcessContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProcessContext")
            .field("name", &self.name())
            .field("incarnation", &self.incarnation)
            .finish_non_exhaustive()
    }
}

impl ProcessContext {
    /// Milliseconds since the process started: the clock of the protocol's machines.
    pub(crate) fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// The incarnation of an actor that starts now.
    pub(crate) fn next_life(&self) -> u64 {
        (self.incarnation << LIFE_BITS) | self.lives.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether nobody of this process has ever run for leadership, in any of its lives. True at most once.
    pub(crate) fn is_first_election(&self) -> bool {
        self.first_election.swap(false, Ordering::Relaxed) && self.incarnation == FIRST_LIFE
    }

    pub(crate) fn name(&self) -> &str {
        &self.run.topology.processes[self.process as usize].name
    }

    pub(crate) fn node(&self) -> &str {
        &self.run.topology.processes[self.process as usize].node
    }

    /// Process and node of an actor.
    pub(crate) fn whereabouts(&self, address: ActorAddress) -> (String, String) {
        let process = self
            .router
            .process_of(address)
            .map(|process| &self.run.topology.processes[process as usize]);
        process.map_or_else(Default::default, |process| {
            (process.name.clone(), process.node.clone())
        })
    }

    /// Name and node of a process.
    pub(crate) fn name_and_node(&self, process: u32) -> (String, String) {
        let process = self.run.topology.processes.get(process as usize);
        process.map_or_else(Default::default, |process| {
            (process.name.clone(), process.node.clone())
        })
    }

    /// Appends to the event log; a log that cannot be written does not stop training.
    pub(crate) fn event(&self, event: &Event) {
        if let Err(error) = self.events.append(event) {
            tracing::error!(%error, "an event could not be logged");
        }
    }

    /// The run is over for this process.
    pub(crate) fn finish(&self) {
        self.end(Ending::Finished);
    }

    /// The run is given up, and this process ends with it.
    pub(crate) fn fail(&self, reason: String) {
        self.failure.get_or_init(|| reason);
        self.end(Ending::Failed);
    }

    /// This process ends; the first reason counts.
    pub(crate) fn end(&self, ending: Ending) {
        self.ending.send_if_modified(|known| {
            let is_first = known.is_none();
            known.get_or_insert(ending);
            is_first
        });
    }

    /// Whether this process is about to end: what it loses contact with then is not gone.
    pub(crate) fn is_ending(&self) -> bool {
        self.ending.borrow().is_some()
    }

    pub(crate) fn set_checkpointer(&self, actor: ActorRef<CheckpointerMessage>) {
        *self
            .checkpointer
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(actor);
    }

    /// Asks the checkpointer of this process for something. One that is just starting gets it a moment later: who asks holds state
    /// that must not be lost over it.
    pub(crate) fn checkpointer(self: &Arc<Self>, message: CheckpointerMessage) {
        let Err(message) = self.try_checkpointer(message) else {
            return;
        };
        let context = self.clone();
        tokio::spawn(async move {
            let mut message = message;
            loop {
                tokio::time::sleep(BACKOFF_FIRST).await;
                match context.try_checkpointer(message) {
                    Ok(()) => return,
                    Err(returned) => message = returned,
                }
            }
        });
    }

    fn try_checkpointer(&self, message: CheckpointerMessage) -> Result<(), CheckpointerMessage> {
        let actor = self
            .checkpointer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let Some(actor) = actor else {
            return Err(message);
        };
        actor.cast(message).map_err(|error| match error {
            MessagingErr::SendErr(message) => message,
            _ => CheckpointerMessage::Check,
        })
    }
}

/// Runs a process of the topology until the run is over, or it is told to end. When `leave` resolves, its node is drained. Workers need
/// a `backend`.
///
/// # Errors
/// It cannot start (certificates, port, ledger, store), its actors fail too often, or its agent is gone for long.
pub async fn run_process(
    run: Arc<RunContext>,
    run_dir: RunDir,
    process: u32,
    backend: Option<&'static dyn Backend>,
    leave: impl Future<Output = ()> + Send + 'static,
) -> Result<Ending, ProcessError> {
    let start = |error: &dyn std::fmt::Display| ProcessError::Start(error.to_string());
    let user = |error: &dyn std::fmt::Display| ProcessError::User(error.to_string());
    let spec = run.topology.processes[process as usize].clone();
    // Without a store to ask, only the ledger knows which epochs there were.
    let is_sole_witness = run.is_static_election() && spec.roles.contains(&ActorRole::Coordinator);
    let LocalState {
        ledger,
        incarnation,
        damage,
    } = local_state::open(&run_dir, &spec.name, !is_sole_witness).map_err(|e| start(&e))?;
    ledger.bind_run(&run.identity).map_err(|e| start(&e))?;
    let mut life = Life::own(incarnation);
    life.write(&run_dir, &spec.name).map_err(|e| start(&e))?;
    let store =
        RunStore::open(&run.store_url(&run_dir), &run.config.run.name).map_err(|e| start(&e))?;
    let keep_local = run.config.checkpoint.keep_local;
    let store = store.with_near_copies(&run_dir.local_checkpoints(), &spec.name, keep_local);
    let events = EventLog::open(run_dir.events()).map_err(|e| start(&e))?;

    let slots = spec
        .roles
        .contains(&ActorRole::Worker)
        .then(|| SlotCounter::open(&run_dir, &spec.name).map(Arc::new))
        .transpose()
        .map_err(|e| start(&e))?;

    let mut network = None;
    if !run.topology.is_single_process() {
        let identity = Identity::load(&run_dir.tls(), &spec.name).map_err(|e| user(&e))?;
        let address = run
            .topology
            .address(process)
            .ok_or_else(|| ProcessError::User(format!("host {} has no address", spec.host)))?;
        let cookie = session::read_secret(&run_dir.tls()).map_err(|e| user(&e))?;
        let hello = Hello {
            run_id: run.run_id,
            process,
            name: spec.name.clone(),
            incarnation,
        };
        let endpoint = Endpoint::bind(address, &identity, hello, TransportOptions::default())
            .map_err(|e| user(&e))?;
        let sessions = Sessions::start(process, incarnation, &spec.name, cookie)
            .await
            .map_err(|e| start(&e))?;
        network = Some((endpoint, sessions));
    }
    let sessions = network.as_ref().map(|(_, sessions)| sessions.clone());
    let router = Router::new(run.run_id, process, &run.topology, sessions.clone());
    if let Some(sessions) = &sessions {
        sessions.attach(&router);
    }
    let (ending, mut ended) = watch::channel(None);
    let context = Arc::new(ProcessContext {
        run,
        backend,
        run_dir,
        router,
        store,
        store_health: StoreHealth::new(),
        ledger,
        slots,
        process,
        incarnation,
        injected: Injected::default(),
        lives: AtomicU64::new(0),
        first_election: AtomicBool::new(true),
        events,
        started: Instant::now(),
        ending,
        failure: OnceLock::new(),
        linked: AtomicBool::new(false),
        devices: Devices::default(),
        checkpointer: Mutex::new(None),
        runtime: tokio::runtime::Handle::current(),
        background: Background::start().map_err(|e| start(&e))?,
        released: Mutex::default(),
    });
    let roles: Vec<String> = spec
        .roles
        .iter()
        .map(|role| role.name().to_owned())
        .collect();
    if let Some(reason) = damage {
        context.event(&Event::LedgerDamaged {
            process: spec.name.clone(),
            node: spec.node.clone(),
            reason,
            incarnation,
        });
    }
    context.event(&Event::ProcessStarted {
        process: spec.name.clone(),
        node: spec.node.clone(),
        pid: std::process::id(),
        roles,
        incarnation,
    });

    let options = SupervisorOptions {
        strategy: SupervisorStrategy::OneForOne,
        max_restarts: MAX_RESTARTS,
        max_window: RESTART_WINDOW,
        reset_after: Some(RESTART_WINDOW),
    };
    let arguments = SupervisorArguments {
        child_specs: children(&context, network.clone()),
        options,
    };
    let (supervisor, mut tree) = Supervisor::spawn(format!("{}/supervisor", spec.name), arguments)
        .await
        .map_err(|e| start(&e))?;
    link::start(&context).map_err(|e| start(&e))?;
    let mut store_tasks = JoinSet::new();
    if spec.roles.contains(&ActorRole::Coordinator) {
        store_tasks.spawn(store_health::watch(context.clone()));
        store_tasks.spawn_on(scrub::scrub(context.clone()), context.background.handle());
    }
    let leaving = tokio::spawn({
        let context = context.clone();
        async move {
            leave.await;
            if let Err(reason) = context.request_drain(context.node(), None) {
                tracing::warn!(reason, "cannot be drained");
            }
        }
    });
    let outcome = tokio::select! {
        ending = ended.wait_for(Option::is_some) => match ending.ok().and_then(|ending| *ending) {
            Some(Ending::Orphaned) | None => Err(ProcessError::Start("the node agent is gone".to_owned())),
            Some(Ending::Failed) => Err(ProcessError::Run(
                context.failure.get().cloned().unwrap_or_default(),
            )),
            Some(ending) => Ok(ending),
        },
        _ = &mut tree => Err(ProcessError::Meltdown(spec.name.clone())),
        () = link::signals(&context) => Ok(Ending::Stopped),
    };
    context.end(Ending::Stopped);
    leaving.abort();
    let is_over = matches!(outcome, Ok(Ending::Finished) | Err(ProcessError::Run(_)));
    if is_over && spec.roles.contains(&ActorRole::Coordinator) && network.is_some() {
        farewell(&context).await;
    }
    store_tasks.abort_all();
    supervisor.stop(None);
    if let Some((endpoint, sessions)) = network {
        sessions.stop();
        endpoint.close().await;
    }
    devices_end(&context).await;
    let ending = match outcome {
        Ok(ending) => Some(ending),
        Err(ProcessError::Run(_)) => Some(Ending::Failed),
        Err(_) => None,
    };
    if let Some(ending) = ending {
        // An agent that did not start this process cannot ask the system for its exit code.
        life.ended = Some(ending);
        if let Err(error) = life.write(&context.run_dir, &spec.name) {
            tracing::warn!(%error, "the agent may take this end for a death");
        }
    }
    outcome
}

/// Lets the compute threads end, unless one hangs: the system unloads libtorch when the process exits, and a thread inside it would crash.
async fn devices_end(context: &ProcessContext) {
    let until = Instant::now() + DEVICES_END;
    while !context.devices.pulses().is_empty() && Instant::now() < until {
        tokio::time::sleep(DEVICES_LOOK).await;
    }
}

/// Lets the others hear that the run is over.
async fn farewell(context: &ProcessContext) {
    let until = Instant::now() + FAREWELL;
    // Coordinators stay as long as this one does; they do not wait for each other.
    let others: Vec<u32> = (0..)
        .zip(&context.run.topology.processes)
        .filter(|(_, process)| !process.roles.contains(&ActorRole::Coordinator))
        .map(|(number, _)| number)
        .collect();
    while Instant::now() < until && others.iter().any(|process| context.router.is_up(*process)) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn children(
    context: &Arc<ProcessContext>,
    network: Option<(Endpoint, Sessions)>,
) -> Vec<ChildSpec> {
    let mut specs = Vec::new();
    let actors: Vec<ActorAddress> = context
        .run
        .topology
        .actors()
        .filter(|(_, process)| *process == context.process)
        .map(|(address, _)| address)
        .collect();
    let stores =
        |address: &ActorAddress| matches!(address.role, ActorRole::Shard | ActorRole::Coordinator);
    if let Some(address) = actors.iter().copied().find(stores) {
        specs.push(child(
            context,
            "checkpointer",
            || Checkpointer,
            ActorArguments {
                context: context.clone(),
                address,
            },
        ));
    }
    if let Some((endpoint, sessions)) = network {
        specs.push(child(
            context,
            "mesh",
            || Mesh,
            MeshArguments {
                context: context.clone(),
                endpoint,
                sessions,
            },
        ));
    }
    for role in [
        ActorRole::Loader,
        ActorRole::Shard,
        ActorRole::Worker,
        ActorRole::Coordinator,
    ] {
        for address in actors
            .iter()
            .copied()
            .filter(|address| address.role == role)
        {
            let name = format!("{}-{}", role.name(), address.index);
            let arguments = ActorArguments {
                context: context.clone(),
                address,
            };
            specs.push(match role {
                ActorRole::Loader => child(context, &name, || Loader, arguments),
                ActorRole::Shard => child(context, &name, || ShardActor, arguments),
                ActorRole::Worker => child(context, &name, || WorkerActor, arguments),
                ActorRole::Coordinator => child(context, &name, || CoordinatorActor, arguments),
            });
        }
    }
    specs
}

fn child<A, F>(context: &ProcessContext, name: &str, actor: F, arguments: A::Arguments) -> ChildSpec
where
    A: Actor,
    A::Arguments: Clone + Sync,
    F: Fn() -> A + Clone + Send + Sync + 'static,
{
    let spawn = SpawnFn::new(move |supervisor, id| {
        let (actor, arguments) = (actor(), arguments.clone());
        async move {
            let (started, _) = Supervisor::spawn_linked(id, actor, arguments, supervisor).await?;
            Ok(started.get_cell())
        }
    });
    ChildSpec {
        id: format!("{}/{name}", context.name()),
        restart: Restart::Permanent,
        spawn_fn: spawn,
        backoff_fn: Some(ChildBackoffFn::new(|_, restarts, _, _| {
            let doubled = BACKOFF_FIRST.saturating_mul(1 << restarts.min(10) as u32);
            Some(doubled.min(BACKOFF_MAX))
        })),
        reset_after: Some(RESTART_WINDOW),
    }
}
