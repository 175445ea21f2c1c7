//! Notices from the node agent to its processes: lines on their standard input.
//!
//! The agent sees a child's exit at once, long before a connection times out. When the agent itself dies the pipe ends, and the process
//! ends too: its successor is started by the next agent.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, BufReader};

use crate::process::ProcessContext;

/// Set for processes that an agent started; only then is standard input read.
pub(crate) const AGENT_VARIABLE: &str = "EVERSTEP_AGENT";

/// What the agent says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Notice {
    /// A process of this node exited.
    Exited {
        /// Its number in the topology.
        process: u32,
        /// Which life of it, as in its ledger.
        incarnation: u64,
    },
}

/// Passes notices on; returns when the agent is gone, never without an agent.
pub(crate) async fn listen(context: Arc<ProcessContext>) {
    if std::env::var_os(AGENT_VARIABLE).is_none() {
        return std::future::pending().await;
    }
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        match serde_json::from_str(&line) {
            Ok(Notice::Exited {
                process,
                incarnation,
            }) => context.router.peer_down(process, incarnation),
            Err(error) => tracing::warn!(%error, "a notice of the agent is not understood"),
        }
    }
}
