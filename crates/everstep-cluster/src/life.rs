//! Which life of a process runs under which pid: small files that outlive agents.

use std::fs;

use serde::{Deserialize, Serialize};

use crate::proc;
use crate::process::Ending;
use crate::rundir::RunDir;
use crate::status::replace;
use crate::topology::Topology;

/// A process as the system knows it. A pid alone may be used again by another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Body {
    pub(crate) pid: u32,
    pub(crate) started_ticks: u64,
}

impl Body {
    /// The process that has this pid now.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let stat = proc::stat(pid)?;
        stat.is_alive().then_some(Self {
            pid,
            started_ticks: stat.started_ticks,
        })
    }

    /// A child that was not waited for yet; it may be dead.
    pub(crate) fn of_child(pid: u32) -> Self {
        let started_ticks = proc::stat(pid).map_or(0, |stat| stat.started_ticks);
        Self { pid, started_ticks }
    }

    /// Whether it is still this one that lives under the pid.
    pub(crate) fn is_alive(&self) -> bool {
        Self::of(self.pid) == Some(*self)
    }
}

/// Written by the process itself when it starts and when it ends as it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Life {
    #[serde(flatten)]
    pub(crate) body: Body,
    pub(crate) incarnation: u64,
    /// Why it ended, if it ended as it should.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ended: Option<Ending>,
}

impl Life {
    /// This process's.
    pub(crate) fn own(incarnation: u64) -> Self {
        let pid = std::process::id();
        let unknown = Body {
            pid,
            started_ticks: 0,
        };
        Self {
            body: Body::of(pid).unwrap_or(unknown),
            incarnation,
            ended: None,
        }
    }

    /// Replaces the file of process `name`.
    pub(crate) fn write(&self, run_dir: &RunDir, name: &str) -> std::io::Result<()> {
        replace(&run_dir.status().join(format!("life-{name}.json")), self)
    }

    /// The last life that process `name` wrote down.
    pub(crate) fn read(run_dir: &RunDir, name: &str) -> Option<Self> {
        let bytes = fs::read(run_dir.status().join(format!("life-{name}.json"))).ok()?;
        serde_json::from_slice(&bytes).ok()
    }
}

/// Written by the agent for a process that it started, which writes its life down only later.
pub(crate) fn write_started(run_dir: &RunDir, name: &str, body: Body) -> std::io::Result<()> {
    replace(
        &run_dir.status().join(format!("started-{name}.json")),
        &body,
    )
}

/// The living process `name` of this run directory, whoever started it.
pub(crate) fn living(run_dir: &RunDir, name: &str) -> Option<Body> {
    let started = || {
        let file = run_dir.status().join(format!("started-{name}.json"));
        serde_json::from_slice(&fs::read(file).ok()?).ok()
    };
    let life = Life::read(run_dir, name).map(|life| life.body);
    life.filter(Body::is_alive)
        .or_else(|| started().filter(Body::is_alive))
}

/// Names of the topology's processes that live in this run directory.
pub(crate) fn all_living(run_dir: &RunDir, topology: &Topology) -> Vec<String> {
    let processes = topology.processes.iter();
    processes
        .filter(|process| living(run_dir, &process.name).is_some())
        .map(|process| process.name.clone())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reused_pid_is_not_taken_for_the_process() {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::new(folder.path());
        assert_eq!(living(&run_dir, "p"), None);
        let mut life = Life::own(3);
        life.write(&run_dir, "p").unwrap();
        assert_eq!(living(&run_dir, "p"), Some(life.body));
        life.body.started_ticks += 1;
        life.write(&run_dir, "p").unwrap();
        assert_eq!(living(&run_dir, "p"), None);
        life.body.started_ticks -= 1;
        write_started(&run_dir, "p", life.body).unwrap();
        assert_eq!(living(&run_dir, "p"), Some(life.body));
    }

    #[test]
    fn a_dead_process_that_nobody_waited_for_is_dead() {
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let body = Body::of(child.id()).unwrap();
        assert!(body.is_alive());
        drop(child.stdin.take());
        while body.is_alive() {
            std::thread::yield_now();
        }
        child.wait().unwrap();
    }
}
