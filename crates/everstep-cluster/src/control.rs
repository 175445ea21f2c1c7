//! The control interface of a node: JSON lines over `DIR/control/<node>.sock`, a Unix socket that the node's agent listens on.
//!
//! Processes of the node say hello and send pulses; `everstep drain`, `everstep chaos inject` and outside tools send requests.

use serde::{Deserialize, Serialize};

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
