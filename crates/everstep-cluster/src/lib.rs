//! Actors, supervision, node agent: the only crate that knows ractor.
//!
//! - `topology`: which roles live in which process, which processes on which node
//! - `run`: what a run is, for every process of it
//! - `process`: one process: its supervision tree and what its actors share
//! - `actors`: thin shells around the protocol's machines
//! - `router`, `wire`, `session`, `mesh`: how a message finds an actor, here or in another process
//! - `agent`: the node agent, which keeps processes alive
//! - `control`: what users and chaos tools ask of a node
//! - `election`: who leads
//! - `background`: threads of low priority
//! - `snapshot`: where a snapshot waits for the store
//! - `scrub`, `store_health`: what is known of the store and of what lies there

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod actors;
mod agent;
mod background;
pub mod control;
mod drain;
mod election;
mod history;
mod injection;
mod lanes;
mod life;
mod local_state;
mod mesh;
mod message;
mod proc;
mod process;
mod progress;
mod quarantine;
mod router;
mod run;
mod rundir;
mod scrub;
mod session;
mod slots;
mod snapshot;
mod status;
mod store_health;
mod topology;
mod wire;

pub use agent::{
    Agent, AgentError, AgentOptions, AgentOutcome, AgentSignal, EXIT_USER_ERROR, HangPolicy,
    PreemptionNotice, PreemptionSource, RestartPolicy, watch_preemption,
};
pub use process::{Ending, ProcessError, run_process};
pub use quarantine::{clear as clear_quarantine, list as list_quarantines};
pub use run::{RunContext, RunError, RunRequest, Weights, goodput};
pub use rundir::RunDir;
pub use session::make_secret as make_session_secret;
pub use status::{
    CadenceStatus, LeaderStatus, ProcessState, ProcessStatus, RunStatus, StoreState, StoreStatus,
    read as read_status, write_processes, write_single_process as write_single_process_status,
};
pub use topology::{
    ActorAddress, ActorRole, AgentSettings, Process, Route, Topology, TopologyError, free_port,
};
