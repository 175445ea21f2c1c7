//! `everstep train`: prepares the run directory, then trains in this process or supervises those of the topology.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use everstep_cluster::{
    Agent, AgentError, EXIT_USER_ERROR, ProcessError, RunContext, RunDir, RunRequest, run_process,
};
use everstep_telemetry::{Event, EventLog};

use crate::args::{ProcessArgs, RunFileArgs, TrainArgs};
use crate::progress::Progress;
use crate::user;

pub(crate) fn run(args: TrainArgs) -> anyhow::Result<()> {
    let run = Arc::new(prepare(&args.run, None, args.allow_other_platform)?);
    let run_dir = run.run_dir().clone();
    let events = EventLog::open(run_dir.events()).map_err(user)?;
    let started = Instant::now();
    let resumed_step = run.last_logged_step()?;
    events.append(&Event::RunStarted {
        run: run.name().to_owned(),
        steps: run.num_steps(),
        resumed_step,
    })?;
    let progress = Progress::start(&run);
    let finished = if run.topology.is_single_process() {
        in_this_process(&run, &run_dir)
    } else {
        supervise(&run, &run_dir, None)
    };
    progress.finish();
    if finished? {
        events.append(&Event::RunFinished {
            step: run.num_steps(),
            seconds: started.elapsed().as_secs_f64(),
        })?;
        crate::progress::summary(&run, started.elapsed())
    } else {
        anyhow::bail!(
            "stopped before the last step; the same command goes on from the last checkpoint"
        )
    }
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
        .block_on(RunContext::prepare(request, |line| eprintln!("{line}")))
        .map_err(user)
}

fn in_this_process(run: &Arc<RunContext>, run_dir: &RunDir) -> anyhow::Result<bool> {
    let runtime = runtime(4)?;
    runtime.block_on(async {
        let telemetry = run.telemetry(0)?;
        everstep_cluster::write_single_process_status(run_dir, &run.topology)?;
        let outcome = tokio::select! {
            outcome = run_process(run.clone(), run_dir.clone(), 0) => outcome.map(|()| true),
            () = stop_signal() => Ok(false),
        };
        telemetry.shutdown();
        outcome.map_err(|error| match error {
            ProcessError::User(message) => user(message),
            other => other.into(),
        })
    })
}

/// Supervises the processes of `node`, or of all nodes when the topology is local.
pub(crate) fn supervise(
    run: &Arc<RunContext>,
    run_dir: &RunDir,
    node: Option<&str>,
) -> anyhow::Result<bool> {
    let executable = std::env::current_exe().context("the everstep binary cannot be found")?;
    let node = match node {
        Some(node) => node.to_owned(),
        None => run.topology.processes[0].node.clone(),
    };
    let agent = Agent::new(run_dir.clone(), run.topology.clone(), &node, executable)?;
    runtime(2)?
        .block_on(agent.run(stop_signal()))
        .map_err(|error| match error {
            AgentError::User { message } => user(message),
            other => other.into(),
        })
}

/// `everstep process`: one process of the topology.
pub(crate) fn process(args: ProcessArgs) -> anyhow::Result<()> {
    let run_dir = RunDir::new(&args.run_dir);
    let run = Arc::new(RunContext::open(&run_dir).map_err(user)?);
    let process = run
        .topology
        .process_named(&args.name)
        .with_context(|| format!("no process {} in the topology", args.name))?;
    runtime(4)?.block_on(async {
        let telemetry = run.telemetry(process)?;
        let outcome = run_process(run.clone(), run_dir, process).await;
        telemetry.shutdown();
        let code = match outcome {
            Ok(()) => 0,
            Err(error) => {
                eprintln!("error: {error}");
                if matches!(error, ProcessError::User(_)) {
                    EXIT_USER_ERROR
                } else {
                    1
                }
            }
        };
        // The device thread may be inside libtorch and the thread that reads the agent's notices blocks; there is nothing left to save.
        std::process::exit(code)
    })
}

fn runtime(threads: usize) -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .enable_all()
        .build()
        .context("the async runtime cannot start")
}

/// Resolves at SIGINT or SIGTERM.
pub(crate) async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate)) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    ) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}
