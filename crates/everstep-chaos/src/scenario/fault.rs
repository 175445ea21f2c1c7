//! One fault: what happens, to whom, and when.

use everstep_cluster::control::Injection;
use everstep_cluster::{ActorRole, Topology};
use serde::{Deserialize, Serialize};

/// A fault with its target and its moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Fault {
    /// Where it stands in the file, for messages.
    pub place: String,
    /// What happens.
    pub action: Action,
    /// To whom.
    pub target: Target,
    /// When.
    pub moment: Moment,
}

/// What happens.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// SIGKILL.
    Kill,
    /// SIGSTOP, and SIGCONT after `seconds`; never, if there are none.
    Pause {
        /// How long.
        seconds: Option<f64>,
    },
    /// The target cannot reach the others, or is not reached.
    Partition {
        /// What is cut.
        direction: Direction,
        /// How long.
        seconds: f64,
        /// Cut and mended in turn, each for this long.
        flap_ms: Option<u64>,
    },
    /// Packets from and to the target suffer.
    Network {
        /// How.
        weather: Weather,
        /// How long.
        seconds: f64,
    },
    /// The object store is away.
    StoreOutage {
        /// How long.
        seconds: f64,
    },
    /// Requests to the object store take longer.
    StoreSlow {
        /// By so much.
        delay_ms: u64,
        /// How long.
        seconds: f64,
    },
    /// The object store answers requests with an error.
    StoreErrors {
        /// HTTP status.
        status: u16,
        /// Share of the requests.
        share: f64,
        /// How long.
        seconds: f64,
    },
    /// An object of the last committed checkpoint is damaged.
    Damage {
        /// How.
        how: Damage,
    },
    /// Something inside the process.
    Inject {
        /// What.
        injection: Injection,
        /// It is taken back after this long, if it can be.
        seconds: Option<f64>,
    },
    /// The node is drained, as before maintenance.
    Drain,
}

/// What happens to packets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Weather {
    /// Share that is lost.
    pub loss: f64,
    /// Added delay.
    pub delay_ms: u64,
    /// Share that is overtaken by later ones.
    pub reorder: f64,
    /// Share that arrives twice.
    pub duplicate: f64,
    /// Share in which a byte is changed.
    pub corrupt: f64,
    /// Most megabits per second; 0 does not limit.
    pub bandwidth_mbit: f64,
}

/// Which direction is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Nothing gets in or out.
    Both,
    /// What the target sends is lost; it hears the others.
    Out,
    /// What is sent to the target is lost; the others hear it.
    In,
}

/// How an object is damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Damage {
    /// One bit is flipped.
    Flip,
    /// The second half is cut off.
    Truncate,
    /// It is removed.
    Remove,
}

/// Whom it strikes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A process that plays the role: the `index`th of the topology, or a random one of those alive.
    Role {
        /// The role.
        role: ActorRole,
        /// Which of them.
        index: Option<u32>,
    },
    /// A process by its name.
    Process(String),
    /// Every process of a node.
    Node(String),
    /// Any process.
    Any,
    /// The process that leads.
    Leader,
    /// The process that leads, and then whoever leads after it.
    LeaderAndSuccessor,
    /// Two shard processes at once, so that no replica of some block is left (with replication 2).
    ReplicasOfABlock,
    /// The node agent.
    Agent,
    /// Everything at once, agent included: a power loss.
    All,
    /// Every process, one after the other, each when the one before is back: a rolling restart.
    EveryProcessInTurn,
    /// The object store.
    Store,
}

/// When it strikes: as soon as all that is given here holds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Moment {
    /// So many steps are committed.
    pub after_step: u64,
    /// So long after the first commit.
    pub after_seconds: f64,
    /// The cluster is just doing this.
    pub phase: Option<Phase>,
}

/// What a cluster may be doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Processes are up, nothing is committed yet.
    Start,
    /// A checkpoint is being written.
    Checkpoint,
    /// Steps are evaluated on held-out text.
    Evaluation,
    /// A process was just lost.
    Recovery,
    /// The leader was just lost and none is elected.
    Election,
    /// A shard process is back and gets its blocks again.
    Seeding,
    /// The run has just gone back to a checkpoint.
    Rollback,
}

impl Action {
    /// Its name in scenario files.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Pause { .. } => "pause",
            Self::Partition { .. } => "partition",
            Self::Network { .. } => "network",
            Self::StoreOutage { .. } => "store_outage",
            Self::StoreSlow { .. } => "store_slow",
            Self::StoreErrors { .. } => "store_errors",
            Self::Damage { .. } => "damage",
            Self::Inject { injection, .. } => match injection {
                Injection::FlipGradientBits { .. } => "flip_gradient_bits",
                Injection::NonFiniteGradient => "non_finite",
                Injection::HangDevice => "hang_device",
                Injection::SlowDevice { .. } => "slow_device",
                Injection::Panic { .. } => "panic",
            },
            Self::Drain => "drain",
        }
    }

    /// Whether it is asked for over the control socket, which the run file must allow.
    pub fn is_injected(&self) -> bool {
        matches!(self, Self::Inject { .. })
    }

    /// Whether packets must go through a proxy.
    pub fn needs_udp_proxy(&self) -> bool {
        matches!(self, Self::Partition { .. } | Self::Network { .. })
    }

    /// Whether it strikes the requests to the store.
    pub fn strikes_requests(&self) -> bool {
        matches!(
            self,
            Self::StoreOutage { .. } | Self::StoreSlow { .. } | Self::StoreErrors { .. }
        )
    }
}

impl Target {
    /// Its name in reports.
    pub fn label(&self) -> String {
        match self {
            Self::Role { role, index: None } => role.name().to_owned(),
            Self::Role {
                role,
                index: Some(index),
            } => format!("{}-{index}", role.name()),
            Self::Process(name) => name.clone(),
            Self::Node(name) => format!("node {name}"),
            Self::Any => "any".to_owned(),
            Self::Leader => "leader".to_owned(),
            Self::LeaderAndSuccessor => "leader-and-successor".to_owned(),
            Self::ReplicasOfABlock => "replicas-of-a-block".to_owned(),
            Self::Agent => "agent".to_owned(),
            Self::All => "all".to_owned(),
            Self::EveryProcessInTurn => "every-process-in-turn".to_owned(),
            Self::Store => "store".to_owned(),
        }
    }

    /// Whether the topology has it; if not, one sentence that says what it has.
    pub(super) fn check(&self, topology: &Topology) -> Result<(), String> {
        let file = topology.file.display();
        if topology.is_single_process() && *self != Self::Store {
            return Err(format!(
                "{file} has one process, which has no agent to restart it; allowed: a topology with several"
            ));
        }
        match self {
            Self::Role { role, index } => {
                let count = topology.count(*role);
                match index {
                    Some(index) if *index >= count => Err(format!(
                        "there is no {} {index} in {file}; allowed: 0 to {}",
                        role.name(),
                        count.saturating_sub(1)
                    )),
                    _ => Ok(()),
                }
            }
            Self::Process(name) if topology.process_named(name).is_none() => {
                let known: Vec<&str> = topology.processes.iter().map(|p| p.name.as_str()).collect();
                Err(format!(
                    "there is no process \"{name}\" in {file}; allowed: {}",
                    known.join(", ")
                ))
            }
            Self::Node(name) if !topology.processes.iter().any(|p| p.node == *name) => {
                let mut known: Vec<&str> =
                    topology.processes.iter().map(|p| p.node.as_str()).collect();
                known.dedup();
                Err(format!(
                    "there is no node \"{name}\" with a process in {file}; allowed: {}",
                    known.join(", ")
                ))
            }
            Self::LeaderAndSuccessor if topology.count(ActorRole::Coordinator) < 2 => Err(format!(
                "a successor needs a second coordinator; {file} has one"
            )),
            Self::ReplicasOfABlock if num_processes_with(topology, ActorRole::Shard) < 2 => Err(
                format!("two replicas need two shard processes; {file} has one"),
            ),
            _ => Ok(()),
        }
    }
}

fn num_processes_with(topology: &Topology, role: ActorRole) -> usize {
    let processes = topology.processes.iter();
    processes.filter(|p| p.roles.contains(&role)).count()
}

impl Fault {
    /// Kind and target, as in reports.
    pub fn label(&self) -> String {
        match self.target {
            Target::Store => self.action.kind().to_owned(),
            _ => format!("{} {}", self.action.kind(), self.target.label()),
        }
    }
}
