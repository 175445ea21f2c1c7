//! `everstep node`: the agent of one machine of a cluster.

use std::sync::Arc;

use everstep_cluster::{AgentOutcome, AgentSignal, PreemptionNotice};
use tokio::sync::mpsc;

use crate::args::NodeArgs;
use crate::{train, user};

/// What Kubernetes, Slurm and systemd leave between SIGTERM and SIGKILL, or less.
const GRACE_SECONDS: u64 = 30;

pub(crate) fn run(args: NodeArgs) -> anyhow::Result<()> {
    if args.run.topology.is_none() {
        return Err(user(
            "--topology is needed: the node must be one of its nodes",
        ));
    }
    let run = Arc::new(train::prepare(&args.run, Some(&args.node), false)?);
    if train::is_over(&run)? {
        return Ok(());
    }
    match train::supervise(&run, Some(&args.node), signals)? {
        AgentOutcome::Finished => Ok(()),
        AgentOutcome::Drained => {
            eprintln!("node {} is drained; the run goes on without it", args.node);
            Ok(())
        }
        AgentOutcome::Stopped => anyhow::bail!("stopped before the run was over"),
    }
}

/// SIGTERM is the notice that the machine will be taken away; SIGINT and a second SIGTERM stop at once.
async fn signals(agent: mpsc::Sender<AgentSignal>) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate)) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    ) else {
        return std::future::pending().await;
    };
    let mut is_noticed = false;
    loop {
        let notice = AgentSignal::Preempted(PreemptionNotice {
            source: "sigterm".to_owned(),
            seconds_left: GRACE_SECONDS,
        });
        let signal = tokio::select! {
            _ = interrupt.recv() => AgentSignal::Stop,
            _ = terminate.recv() => if is_noticed { AgentSignal::Stop } else { notice },
        };
        is_noticed = true;
        if agent.send(signal).await.is_err() {
            return;
        }
    }
}
