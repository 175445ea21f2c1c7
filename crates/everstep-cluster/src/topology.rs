//! The topology file: which roles live in which process, which processes on which node.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, ToSocketAddrs, UdpSocket};
use std::path::{Path, PathBuf};

use everstep_protocol::Role;
use everstep_protocol::coordinator::Domain;
use serde::{Deserialize, Serialize};

use crate::agent::PreemptionSource;
use crate::rundir::RunDir;

mod ports;

pub use ports::free_port;

/// What is wrong with a topology file; one line that names the file, the field and what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    /// The file cannot be read.
    #[error("{file}: cannot be read: {source}")]
    Read {
        /// The file.
        file: String,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, or a field that does not exist.
    #[error("{file}: {message}")]
    Parse {
        /// The file.
        file: String,
        /// What the parser says, in one line.
        message: String,
    },
    /// A field's value is not allowed.
    #[error("{file}: {field}: {message}")]
    Field {
        /// The file.
        file: String,
        /// The field.
        field: String,
        /// What is allowed.
        message: String,
    },
}

/// What an actor of a process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActorRole {
    /// Leads or stands by.
    Coordinator,
    /// Serves batches.
    Loader,
    /// Computes slots on one device.
    Worker,
    /// Owns replicas of blocks.
    Shard,
}

impl ActorRole {
    /// The role in the step protocol; loaders have none.
    pub fn protocol(self) -> Option<Role> {
        match self {
            ActorRole::Coordinator => Some(Role::Coordinator),
            ActorRole::Worker => Some(Role::Worker),
            ActorRole::Shard => Some(Role::Shard),
            ActorRole::Loader => None,
        }
    }

    /// The role's name, as in topology files.
    pub fn name(self) -> &'static str {
        match self {
            ActorRole::Coordinator => "coordinator",
            ActorRole::Loader => "loader",
            ActorRole::Worker => "worker",
            ActorRole::Shard => "shard",
        }
    }
}

impl From<Role> for ActorRole {
    fn from(role: Role) -> Self {
        match role {
            Role::Coordinator => ActorRole::Coordinator,
            Role::Worker => ActorRole::Worker,
            Role::Shard => ActorRole::Shard,
        }
    }
}

/// Where an actor lives, whatever its incarnation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ActorAddress {
    /// What it does.
    pub role: ActorRole,
    /// Its number among the actors of its role.
    pub index: u32,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct RawTopology {
    node: Vec<RawNode>,
    process: Vec<RawProcess>,
    #[serde(default)]
    cluster: ClusterOverrides,
    #[serde(default)]
    agent: AgentSettings,
    #[serde(default)]
    route: Vec<Route>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct RawNode {
    name: String,
    #[serde(default = "loopback")]
    host: String,
    /// Providers whose notices are looked for, by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    preemption: Vec<String>,
}

fn loopback() -> String {
    "127.0.0.1".to_owned()
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct RawProcess {
    name: String,
    node: String,
    roles: Vec<ActorRole>,
    #[serde(default)]
    port: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    count: Option<u32>,
}

/// What a topology may set of the run file's `[cluster]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterOverrides {
    /// Replicas per block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replication: Option<u32>,
}

/// How the agents of all nodes supervise their processes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentSettings {
    /// A process that a signal has stopped for so long is ended, in seconds; 0.9 if not given. Until then it may go on by itself, and the
    /// others do its work.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped_seconds: Option<f64>,
    /// A process that dies right after its start so many times in a row stays down; 12 if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crash_loop_deaths: Option<u32>,
}

impl AgentSettings {
    /// The field that cannot be, and what is allowed.
    fn mistake(&self) -> Option<(&'static str, &'static str)> {
        let allowed = 0.1..=86_400.0;
        if self
            .stopped_seconds
            .is_some_and(|seconds| !allowed.contains(&seconds))
        {
            return Some(("agent.stopped_seconds", "must be 0.1 to 86400"));
        }
        if self
            .crash_loop_deaths
            .is_some_and(|deaths| !(1..=1_000).contains(&deaths))
        {
            return Some(("agent.crash_loop_deaths", "must be 1 to 1000"));
        }
        None
    }
}

/// Another way than the direct one: `from` dials `to` at the address `via`, where a proxy, a tunnel or a port forward must listen.
///
/// Of each pair of processes the later one in the file dials, so only routes from a later to an earlier process are used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// Name of the process that dials.
    pub from: String,
    /// Name of the process that is dialled.
    pub to: String,
    /// Address and UDP port to dial instead.
    pub via: SocketAddr,
}

/// One process of the topology.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Process {
    /// Its name: log file, certificate, status.
    pub name: String,
    /// The node it runs on.
    pub node: String,
    /// Host name or address of the node.
    pub host: String,
    /// UDP port of its QUIC endpoint; 0 until resolved.
    pub port: u16,
    /// Its actors.
    pub roles: Vec<ActorRole>,
}

/// A checked topology.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Topology {
    /// Processes, in the order of the file; a process's number is its place here.
    pub processes: Vec<Process>,
    /// Overrides of the run file.
    pub cluster: ClusterOverrides,
    /// How processes are supervised.
    #[serde(default)]
    pub agent: AgentSettings,
    /// Whose notices that it will be taken away a node looks for, by the node's name.
    #[serde(default)]
    pub preemption: BTreeMap<String, Vec<PreemptionSource>>,
    /// Pairs of processes that do not speak directly.
    #[serde(default)]
    pub routes: Vec<Route>,
    /// The file it was read from, for messages.
    pub file: PathBuf,
}

impl Topology {
    /// The default: everything in one process, with so many workers; at least one.
    pub fn laptop(num_workers: usize) -> Self {
        let mut topology = Self::parse(
            include_str!("../../../topology/laptop.toml"),
            Path::new("topology/laptop.toml"),
        )
        .expect("the built-in topology is valid");
        let more = std::iter::repeat_n(ActorRole::Worker, num_workers.saturating_sub(1));
        topology.processes[0].roles.extend(more);
        topology
    }

    /// Reads and checks a topology file.
    ///
    /// # Errors
    /// One line naming the file, the field and what is allowed.
    pub fn read(path: &Path) -> Result<Self, TopologyError> {
        let text = std::fs::read_to_string(path).map_err(|source| TopologyError::Read {
            file: path.display().to_string(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// The topology of the run that lives in `run_dir`.
    ///
    /// # Errors
    /// There is none, or it is damaged.
    pub fn of_run(run_dir: &RunDir) -> Result<Self, TopologyError> {
        let file = run_dir.topology().display().to_string();
        let bytes = std::fs::read(run_dir.topology()).map_err(|source| TopologyError::Read {
            file: file.clone(),
            source,
        })?;
        serde_json::from_slice(&bytes).map_err(|error| TopologyError::Parse {
            file,
            message: error.to_string(),
        })
    }

    fn parse(text: &str, path: &Path) -> Result<Self, TopologyError> {
        let file = path.display().to_string();
        let raw: RawTopology = toml::from_str(text).map_err(|error| TopologyError::Parse {
            file: file.clone(),
            message: one_line(&error),
        })?;
        let field = |field: String, message: String| TopologyError::Field {
            file: file.clone(),
            field,
            message,
        };
        if let Some((name, message)) = raw.agent.mistake() {
            return Err(field(name.to_owned(), message.to_owned()));
        }
        let mut names = BTreeSet::new();
        let mut preemption = BTreeMap::new();
        for node in &raw.node {
            check_name(&node.name).map_err(|m| field("node.name".to_owned(), m))?;
            if !names.insert(node.name.clone()) {
                return Err(field(
                    "node.name".to_owned(),
                    format!("\"{}\" is given twice; names must differ", node.name),
                ));
            }
            let source = |name: &String| {
                PreemptionSource::named(name).ok_or_else(|| {
                    let node = &node.name;
                    field(
                        format!("node.preemption of \"{node}\""),
                        format!("\"{name}\" is not known; allowed: aws, gcp, azure"),
                    )
                })
            };
            let sources = node
                .preemption
                .iter()
                .map(source)
                .collect::<Result<Vec<_>, _>>()?;
            if !sources.is_empty() {
                preemption.insert(node.name.clone(), sources);
            }
        }
        let mut processes = Vec::new();
        let mut taken = BTreeSet::new();
        for process in &raw.process {
            check_name(&process.name).map_err(|m| field("process.name".to_owned(), m))?;
            let Some(node) = raw.node.iter().find(|node| node.name == process.node) else {
                let known: Vec<&str> = raw.node.iter().map(|node| node.name.as_str()).collect();
                return Err(field(
                    format!("process.node of \"{}\"", process.name),
                    format!(
                        "there is no node \"{}\"; nodes are: {}",
                        process.node,
                        known.join(", ")
                    ),
                ));
            };
            if process.roles.is_empty() {
                return Err(field(
                    format!("process.roles of \"{}\"", process.name),
                    "must name at least one of coordinator, loader, worker, shard".to_owned(),
                ));
            }
            let count = process.count.unwrap_or(1);
            if count == 0 || count > 4096 {
                return Err(field(
                    format!("process.count of \"{}\"", process.name),
                    "must be 1 to 4096".to_owned(),
                ));
            }
            for index in 0..count {
                let name = match process.count {
                    None => process.name.clone(),
                    Some(_) => format!("{}-{index}", process.name),
                };
                if !taken.insert(name.clone()) {
                    return Err(field(
                        "process.name".to_owned(),
                        format!("\"{name}\" is given twice; names must differ"),
                    ));
                }
                let port = if process.port == 0 {
                    0
                } else {
                    process.port + index as u16
                };
                processes.push(Process {
                    name,
                    node: process.node.clone(),
                    host: node.host.clone(),
                    port,
                    roles: process.roles.clone(),
                });
            }
        }
        let topology = Topology {
            processes,
            cluster: raw.cluster,
            agent: raw.agent,
            preemption,
            routes: raw.route,
            file: path.to_owned(),
        };
        topology.check_routes()?;
        for role in [
            ActorRole::Coordinator,
            ActorRole::Loader,
            ActorRole::Worker,
            ActorRole::Shard,
        ] {
            if topology.count(role) == 0 {
                return Err(field(
                    "process.roles".to_owned(),
                    format!("no process has the role {}", role.name()),
                ));
            }
        }
        if let Some(replication) = topology.cluster.replication {
            topology.check_replication(replication, "cluster.replication")?;
        }
        Ok(topology)
    }

    /// The topology as a file's text: each process by itself, with its port and all routes.
    ///
    /// # Errors
    /// It cannot be written as TOML.
    pub fn to_toml(&self) -> Result<String, TopologyError> {
        let mut nodes: Vec<RawNode> = Vec::new();
        for process in &self.processes {
            if !nodes.iter().any(|node| node.name == process.node) {
                let sources = self.preemption.get(&process.node).into_iter().flatten();
                nodes.push(RawNode {
                    name: process.node.clone(),
                    host: process.host.clone(),
                    preemption: sources.map(|source| source.name().to_owned()).collect(),
                });
            }
        }
        let process = |process: &Process| RawProcess {
            name: process.name.clone(),
            node: process.node.clone(),
            roles: process.roles.clone(),
            port: process.port,
            count: None,
        };
        let raw = RawTopology {
            node: nodes,
            process: self.processes.iter().map(process).collect(),
            cluster: self.cluster.clone(),
            agent: self.agent.clone(),
            route: self.routes.clone(),
        };
        toml::to_string(&raw).map_err(|error| TopologyError::Parse {
            file: self.file.display().to_string(),
            message: error.to_string(),
        })
    }

    /// Whether `replication` replicas can be placed on different shards.
    ///
    /// # Errors
    /// Names `field` and what is allowed.
    pub fn check_replication(&self, replication: u32, field: &str) -> Result<(), TopologyError> {
        let shards = self.count(ActorRole::Shard);
        if replication == 0 || replication > shards {
            return Err(TopologyError::Field {
                file: self.file.display().to_string(),
                field: field.to_owned(),
                message: format!(
                    "{replication} replicas need as many shards; this topology has {shards}: allowed is 1 to {shards}"
                ),
            });
        }
        Ok(())
    }

    fn check_routes(&self) -> Result<(), TopologyError> {
        let field = |message: String| TopologyError::Field {
            file: self.file.display().to_string(),
            field: "route".to_owned(),
            message,
        };
        let mut pairs = BTreeSet::new();
        for route in &self.routes {
            let number = |name: &str| {
                self.process_named(name)
                    .ok_or_else(|| field(format!("there is no process \"{name}\"")))
            };
            let (from, to) = (number(&route.from)?, number(&route.to)?);
            if from <= to {
                return Err(field(format!(
                    "{} does not dial {}; of each pair the later process in the file dials",
                    route.from, route.to
                )));
            }
            if !pairs.insert((from, to)) {
                return Err(field(format!(
                    "{} to {} is given twice",
                    route.from, route.to
                )));
            }
        }
        Ok(())
    }

    /// Where each shard runs, by its index.
    pub(crate) fn shard_domains(&self) -> Vec<Domain> {
        let node_of = |process: u32| {
            let name = &self.processes[process as usize].node;
            let first = self.processes.iter().position(|other| other.node == *name);
            first.map_or(process, |first| first as u32)
        };
        let mut shards: Vec<(u32, u32)> = self
            .actors()
            .filter(|(address, _)| address.role == ActorRole::Shard)
            .map(|(address, process)| (address.index, process))
            .collect();
        shards.sort_unstable();
        shards
            .into_iter()
            .map(|(_, process)| Domain {
                node: node_of(process),
                process,
            })
            .collect()
    }

    /// Number of actors of a role.
    pub fn count(&self, role: ActorRole) -> u32 {
        self.actors()
            .filter(|(address, _)| address.role == role)
            .count() as u32
    }

    /// All actors with the number of their process, in the order of the file.
    pub fn actors(&self) -> impl Iterator<Item = (ActorAddress, u32)> + '_ {
        let mut next = [0u32; 4];
        self.processes
            .iter()
            .enumerate()
            .flat_map(move |(process, spec)| {
                let mut own = Vec::with_capacity(spec.roles.len());
                for role in &spec.roles {
                    let index = &mut next[*role as usize];
                    own.push((
                        ActorAddress {
                            role: *role,
                            index: *index,
                        },
                        process as u32,
                    ));
                    *index += 1;
                }
                own
            })
    }

    /// The process of an actor.
    pub fn process_of(&self, address: ActorAddress) -> Option<u32> {
        self.actors()
            .find(|(known, _)| *known == address)
            .map(|(_, process)| process)
    }

    /// The number of a process by its name.
    pub fn process_named(&self, name: &str) -> Option<u32> {
        self.processes
            .iter()
            .position(|process| process.name == name)
            .map(|index| index as u32)
    }

    /// Names of the nodes that have processes, in the order of the file.
    pub fn nodes(&self) -> Vec<String> {
        let mut nodes: Vec<String> = Vec::new();
        for process in &self.processes {
            if !nodes.contains(&process.node) {
                nodes.push(process.node.clone());
            }
        }
        nodes
    }

    /// Whether `asked`, whose ports may not be resolved yet, asks for this topology.
    pub(crate) fn is_same_but_for_ports(&self, asked: &Topology) -> bool {
        let is_same = |(own, asked): (&Process, &Process)| {
            let mut asked = asked.clone();
            if asked.port == 0 {
                asked.port = own.port;
            }
            *own == asked
        };
        self.processes.len() == asked.processes.len()
            && self.processes.iter().zip(&asked.processes).all(is_same)
            && self.cluster == asked.cluster
    }

    /// Whether there is but one process, which then needs no sockets.
    pub fn is_single_process(&self) -> bool {
        self.processes.len() == 1
    }

    /// Gives every process on this machine that asked for port 0 a free one.
    ///
    /// # Errors
    /// A host without address, or a named port that is in use.
    pub fn resolve_ports(
        &mut self,
        nodes_here: impl Fn(&str) -> bool,
    ) -> Result<(), TopologyError> {
        let file = self.file.display().to_string();
        // The sockets are kept until all ports are chosen, so that no port is given twice.
        let mut sockets = Vec::new();
        for process in &mut self.processes {
            if !nodes_here(&process.node) {
                if process.port == 0 {
                    return Err(TopologyError::Field {
                        file,
                        field: format!("process.port of \"{}\"", process.name),
                        message: "is 0, but other machines must know it; allowed is a UDP port that is free there"
                            .to_owned(),
                    });
                }
                continue;
            }
            let field = |message: String| TopologyError::Field {
                file: file.clone(),
                field: format!("process.port of \"{}\"", process.name),
                message,
            };
            let address = resolve(&process.host, process.port)
                .ok_or_else(|| field(format!("host \"{}\" has no address", process.host)))?;
            let socket = if process.port == 0 {
                free_port(address.ip())
            } else {
                UdpSocket::bind(address)
            };
            let socket = socket.map_err(|error| {
                field(format!("{address} cannot be used ({error}); allowed is a free UDP port, or 0 to choose one"))
            })?;
            process.port = socket
                .local_addr()
                .map_err(|error| field(error.to_string()))?
                .port();
            sockets.push(socket);
        }
        Ok(())
    }

    /// Where `from` dials `to`.
    pub fn dial_address(&self, from: u32, to: u32) -> Option<SocketAddr> {
        let name = |process: u32| Some(&self.processes.get(process as usize)?.name);
        let (from_name, to_name) = (name(from)?, name(to)?);
        self.routes
            .iter()
            .find(|route| route.from == *from_name && route.to == *to_name)
            .map_or_else(|| self.address(to), |route| Some(route.via))
    }

    /// Socket address of a process.
    pub fn address(&self, process: u32) -> Option<SocketAddr> {
        let process = self.processes.get(process as usize)?;
        resolve(&process.host, process.port)
    }
}

fn resolve(host: &str, port: u16) -> Option<SocketAddr> {
    (host, port).to_socket_addrs().ok()?.next()
}

fn check_name(name: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || name.len() > 64 || !name.chars().all(allowed) {
        return Err(format!(
            "\"{name}\" is not allowed; use 1 to 64 letters, digits, - and _"
        ));
    }
    Ok(())
}

fn one_line(error: &toml::de::Error) -> String {
    error
        .message()
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests;
