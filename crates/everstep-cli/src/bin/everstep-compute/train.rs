//! `everstep train`: prepares the run directory, then trains in this process or supervises those of the topology.

use std::sync::Arc;
use std::time::Instant;

use everstep_cli::args::{RunFileArgs, TrainArgs};
use everstep_cli::process::runtime;
use everstep_cli::progress::{self, Progress};
use everstep_cli::{programs, user};
use everstep_cluster::{
    Agent, AgentError, AgentOptions, AgentOutcome, AgentSignal, Ending, HangPolicy, ProcessError,
    RestartPolicy, RunContext, RunDir, RunRequest, run_process,
};
use everstep_compute::Libtorch;
use everstep_telemetry::{Event, EventLog};
use tokio::sync::{mpsc, oneshot};

pub(crate) fn run(args: TrainArgs) -> anyhow::Result<()> {
    let run = Arc::new(prepare(&args.run, None, args.allow_other_platform)?);
    let run_dir = run.run_dir().clone();
    let events = EventLog::open(run_dir.events()).map_err(user)?;
    let started = Instant::now();
    let resumed_step = run.last_logged_step()?;
    if resumed_step == Some(run.num_steps()) && is_over(&run)? {
        return progress::summary(&run, started.elapsed());
    }
    events.append(&Event::RunStarted {
        run: run.name().to_owned(),
        steps: run.num_steps(),
        resumed_step,
    })?;
    let shown = Progress::start(&run);
    let outcome = if run.topology.is_single_process() {
        in_this_process(&run, &run_dir)
    } else {
        supervise(&run, None, stop_signals)
    };
    shown.finish();
    match outcome? {
        AgentOutcome::Finished => {}
        AgentOutcome::Drained => anyhow::bail!(
            "stopped after step {}, which is committed; the same command goes on from there",
            run.last_logged_step()?.unwrap_or(0)
        ),
        AgentOutcome::Stopped => anyhow::bail!(
            "stopped before the last step; the same command goes on from the last checkpoint"
        ),
    }
    events.append(&Event::RunFinished {
        step: run.num_steps(),
        seconds: started.elapsed().as_secs_f64(),
    })?;
    progress::summary(&run, started.elapsed())
}

/// Reads the run file, checks everything that a user can get wrong, and lays out the run directory.
pub(crate) fn prepare(
    args: &RunFileArgs,
    node: Option<&str>,
    allow_other_platform: bool,
) -> anyhow::Result<RunContext> {
    let request = RunRequest {
        run_file: args.run_file.clone(),
        set: args.set.clone(),
        topology: args.topology.clone(),
        run_dir: args.run_dir.clone(),
        node: node.map(str::to_owned),
        allow_other_platform,
    };
    runtime(2)?
        .block_on(RunContext::prepare(request, &Libtorch, |line| {
            eprintln!("{line}")
        }))
        .map_err(user)
}

/// Says so if the run is over: the last step is committed and no process is there any more that would have to be waited for.
pub(crate) fn is_over(run: &RunContext) -> anyhow::Result<bool> {
    let is_over =
        runtime(1)?.block_on(run.is_finished()).map_err(user)? && run.living_processes().is_empty();
    if is_over {
        eprintln!(
            "the run has finished: step {} is committed",
            run.num_steps()
        );
    }
    Ok(is_over)
}

fn in_this_process(run: &Arc<RunContext>, run_dir: &RunDir) -> anyhow::Result<AgentOutcome> {
    let runtime = runtime(4)?;
    runtime.block_on(async {
        let telemetry = run.telemetry(0)?;
        everstep_cluster::write_single_process_status(run_dir, &run.topology)?;
        let (signals, mut told) = mpsc::channel(1);
        let (leave, leaves) = oneshot::channel::<()>();
        let leaves = async {
            if leaves.await.is_err() {
                std::future::pending().await
            }
        };
        let stopped = async {
            if told.recv().await == Some(AgentSignal::Leave) {
                let _ = leave.send(());
                told.recv().await;
            }
        };
        let outcome = tokio::select! {
            outcome = run_process(run.clone(), run_dir.clone(), 0, Some(&Libtorch), leaves) => outcome,
            () = stopped => Ok(Ending::Stopped),
            () = stop_signals(signals) => Ok(Ending::Stopped),
        };
        telemetry.shutdown();
        match outcome {
            Ok(Ending::Finished) => Ok(AgentOutcome::Finished),
            Ok(Ending::Drained) => Ok(AgentOutcome::Drained),
            Ok(_) => Ok(AgentOutcome::Stopped),
            Err(ProcessError::User(message)) => Err(user(message)),
            Err(other) => Err(other.into()),
        }
    })
}

/// Supervises the processes of `node`, or of all nodes when the topology is local. `listen` passes on what the agent is told from outside.
pub(crate) fn supervise<F: Future<Output = ()>>(
    run: &Arc<RunContext>,
    node: Option<&str>,
    listen: impl FnOnce(mpsc::Sender<AgentSignal>) -> F,
) -> anyhow::Result<AgentOutcome> {
    let nodes = node.map_or_else(|| run.topology.nodes(), |node| vec![node.to_owned()]);
    let agent = Agent::new(AgentOptions {
        run_dir: run.run_dir().clone(),
        topology: run.topology.clone(),
        nodes,
        executable: programs::everstep()?,
        restart: RestartPolicy::of(&run.topology.agent),
        hang: HangPolicy::of(&run.topology.agent),
    })?;
    let (sender, signals) = mpsc::channel(4);
    let outcome = runtime(2)?.block_on(async {
        let listen = listen(sender);
        let agent = agent.run(signals);
        tokio::pin!(agent);
        tokio::select! {
            biased;
            outcome = &mut agent => outcome,
            () = listen => agent.await,
        }
    });
    outcome.map_err(|error| match error {
        AgentError::User { message } => user(message),
        other => other.into(),
    })
}

/// SIGINT and SIGTERM end the run after the open step, which is committed first. The second one does not wait for that, and the third one
/// not for the processes to end by themselves.
async fn stop_signals(agent: mpsc::Sender<AgentSignal>) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate)) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    ) else {
        return std::future::pending().await;
    };
    let mut signal = AgentSignal::Leave;
    loop {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        if agent.send(signal).await.is_err() {
            return;
        }
        signal = AgentSignal::Stop;
    }
}
