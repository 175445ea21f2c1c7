//! `everstep node`: the agent of one machine of a cluster.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use everstep_cluster::{
    AgentOutcome, AgentSignal, PreemptionNotice, PreemptionSource, watch_preemption,
};
use tokio::sync::mpsc;

use everstep_cli::args::NodeArgs;
use everstep_cli::user;

use crate::train;

pub(crate) fn run(args: NodeArgs) -> anyhow::Result<()> {
    if args.run.topology.is_none() {
        return Err(user(
            "--topology is needed: the node must be one of its nodes",
        ));
    }
    let known = |name: &String| {
        PreemptionSource::named(name).ok_or_else(|| {
            user(format!(
                "--preemption: \"{name}\" is not known; allowed: aws, gcp, azure"
            ))
        })
    };
    let mut sources = args
        .preemption
        .iter()
        .map(known)
        .collect::<Result<BTreeSet<_>, _>>()?;
    let run = Arc::new(train::prepare(&args.run, Some(&args.node), false)?);
    sources.extend(
        run.topology
            .preemption
            .get(&args.node)
            .into_iter()
            .flatten(),
    );
    if args.preemption_endpoint.is_some() && sources.is_empty() {
        return Err(user(format!(
            "--preemption-endpoint: no provider is named; allowed with --preemption, or with preemption of node \"{}\" in the topology file",
            args.node
        )));
    }
    if train::is_over(&run)? {
        return Ok(());
    }
    let listen = |agent| listen(agent, sources, args.preemption_endpoint, args.grace);
    match train::supervise(&run, Some(&args.node), listen)? {
        AgentOutcome::Finished => Ok(()),
        AgentOutcome::Drained => {
            eprintln!("node {} is drained; the run goes on without it", args.node);
            Ok(())
        }
        AgentOutcome::Stopped => anyhow::bail!("stopped before the run was over"),
    }
}

async fn listen(
    agent: mpsc::Sender<AgentSignal>,
    sources: BTreeSet<PreemptionSource>,
    endpoint: Option<String>,
    grace_seconds: u64,
) {
    for source in sources {
        tokio::spawn(watch_preemption(source, endpoint.clone(), agent.clone()));
    }
    signals(agent, grace_seconds).await;
}

/// SIGTERM is the notice that the machine will be taken away, and so is the SIGUSR1 of Slurm's `--signal`; SIGINT and a second SIGTERM stop at
/// once.
async fn signals(agent: mpsc::Sender<AgentSignal>, grace_seconds: u64) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate), Ok(mut user)) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
        signal(SignalKind::user_defined1()),
    ) else {
        return std::future::pending().await;
    };
    let notice = |source: &str, seconds_left: u64| {
        AgentSignal::Preempted(PreemptionNotice {
            source: source.to_owned(),
            seconds_left: Some(seconds_left),
        })
    };
    let is_slurm = std::env::var_os("SLURM_JOB_ID").is_some();
    let mut is_terminated = false;
    loop {
        let signal = tokio::select! {
            _ = interrupt.recv() => AgentSignal::Stop,
            _ = user.recv() => notice("slurm", slurm_seconds_left().unwrap_or(grace_seconds)),
            _ = terminate.recv() => if is_terminated {
                AgentSignal::Stop
            } else {
                is_terminated = true;
                notice(if is_slurm { "slurm" } else { "sigterm" }, grace_seconds)
            },
        };
        if agent.send(signal).await.is_err() {
            return;
        }
    }
}

/// Slurm says when the job ends, in seconds since 1970.
fn slurm_seconds_left() -> Option<u64> {
    let end: u64 = std::env::var("SLURM_JOB_END_TIME").ok()?.parse().ok()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    Some(end.saturating_sub(now.as_secs()))
}
