//! The control interface of a node: JSON lines over `DIR/control/<node>.sock`, a Unix socket that the node's agent listens on.
//!
//! Processes of the node say hello and send pulses; `everstep drain`, `everstep chaos inject` and outside tools send requests.
//!
//! - `link`: the process's side, on a thread of its own
//! - `socket`: binding and connecting, whatever the length of the path

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::Shutdown;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::rundir::RunDir;

pub(crate) mod link;
pub(crate) mod socket;

/// Longest line that either side reads, in bytes.
pub(crate) const LINE_BYTES_MAX: u64 = 64 * 1024;

/// How long an agent may take to answer a [`Request`].
const ANSWER: Duration = Duration::from_secs(10);

/// What a user or a tool asks of an agent; answered by one [`Reply`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Moves everything off a node, this one or another, and ends its processes.
    Drain {
        /// The node.
        node: String,
        /// Seconds until the machine is taken away, if that is so.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seconds_left: Option<u64>,
    },
    /// Makes a process of this node misbehave; refused unless the run file allows it (`[chaos] allow = true`).
    Inject {
        /// Name of the process.
        process: String,
        /// How.
        fault: Injection,
    },
}

/// A fault inside a process, for chaos tests.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "fault", rename_all = "snake_case", deny_unknown_fields)]
pub enum Injection {
    /// The worker flips one bit of the gradient in this share of its slots from now on (0 ends it).
    FlipGradientBits {
        /// Share of slots, 0 to 1.
        share: f64,
    },
    /// The next slot's gradient is not a number.
    NonFiniteGradient,
    /// The compute thread blocks for ever in its next task, as in a deadlock or a stuck device call.
    HangDevice,
    /// Every task of the compute thread takes this much longer from now on (0 ends it).
    SlowDevice {
        /// Extra time per task.
        delay_ms: u64,
    },
    /// An actor of the process panics.
    Panic {
        /// Its role: `worker`, `shard`, `coordinator` or `loader`.
        role: crate::topology::ActorRole,
    },
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// It is done, or under way.
    Done,
    /// It is refused; one line that says what is allowed.
    Refused {
        /// The line.
        message: String,
    },
}

/// Sends a request to the agent of `node` and waits for its answer.
///
/// # Errors
/// One line: no agent listens there (`NotFound`, `ConnectionRefused`), or it does not answer within ten seconds.
pub fn send(run_dir: &RunDir, node: &str, request: &Request) -> io::Result<Reply> {
    let mut stream = socket::connect(&run_dir.control(node)).map_err(|error| {
        let socket = run_dir.control(node);
        let message = format!(
            "no agent of node {node} listens on {} ({error})",
            socket.display()
        );
        io::Error::new(error.kind(), message)
    })?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.set_write_timeout(Some(ANSWER))?;
    stream.write_all(&line(request)?)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    let silent = |error: io::Error| {
        let message = format!("the agent of node {node} does not answer ({error})");
        io::Error::new(error.kind(), message)
    };
    BufReader::new(stream)
        .read_line(&mut answer)
        .map_err(silent)?;
    if answer.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("the agent of node {node} ended before it answered"),
        ));
    }
    Ok(serde_json::from_str(&answer)?)
}

/// One object as a line.
pub(crate) fn line<T: Serialize>(value: &T) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

/// What a process says to its agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub(crate) enum ProcessMessage {
    /// The first line of a connection.
    Hello {
        /// Its number in the topology.
        process: u32,
        /// Which life of it, as in its ledger.
        incarnation: u64,
        /// Its process id; must be that of the socket's peer.
        pid: u32,
    },
    /// Every 100 ms.
    Pulse {
        /// Its compute threads.
        devices: Vec<DevicePulse>,
    },
    /// What became of a notice that asks for an answer.
    Answer {
        /// Number of the notice.
        id: u64,
        /// The answer.
        reply: Reply,
    },
}

/// How far a compute thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DevicePulse {
    /// Tasks that it finished.
    pub(crate) finished: u64,
    /// How long it has been in a task, if it is in one, in milliseconds.
    pub(crate) busy_ms: Option<u64>,
    /// CPU time of the thread and its helpers, in clock ticks; measured only in tasks that take long.
    pub(crate) cpu_ticks: Option<u64>,
    /// Whether the work is done elsewhere, so that CPU time says nothing.
    pub(crate) accelerated: bool,
}

/// What an agent says to its processes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "notice", rename_all = "snake_case")]
pub(crate) enum Notice {
    /// A process of this node exited.
    Exited {
        /// Its number in the topology.
        process: u32,
        /// Which life of it, as in its ledger.
        incarnation: u64,
    },
    /// Misbehave.
    Inject {
        /// Number of this notice, for the answer.
        id: u64,
        /// How.
        fault: Injection,
    },
    /// Tell the coordinators that a node is to be drained.
    Drain {
        /// Number of this notice, for the answer.
        id: u64,
        /// The node.
        node: String,
        /// Seconds until the machine is taken away, if that is so.
        seconds_left: Option<u64>,
    },
    /// End now; the run goes on another time, or without this process.
    Stop,
}

#[cfg(test)]
mod tests;
