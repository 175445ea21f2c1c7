//! `everstep process`: one process of the topology.

use std::sync::Arc;

use anyhow::Context as _;
use everstep_cluster::{EXIT_USER_ERROR, ProcessError, RunContext, RunDir, run_process};
use everstep_train::Backend;

use crate::args::ProcessArgs;
use crate::user;

/// Runs a process; one with workers needs a `backend`.
///
/// # Errors
/// There is no such process; its own errors end the program.
pub fn run(args: &ProcessArgs, backend: Option<&'static dyn Backend>) -> anyhow::Result<()> {
    let run_dir = RunDir::new(&args.run_dir);
    let run = Arc::new(RunContext::open(&run_dir).map_err(user)?);
    let process = run
        .topology
        .process_named(&args.name)
        .with_context(|| format!("no process {} in the topology", args.name))?;
    runtime(4)?.block_on(async {
        let telemetry = run.telemetry(process)?;
        let leave = std::future::pending();
        let outcome = run_process(run.clone(), run_dir, process, backend, leave).await;
        telemetry.shutdown();
        let code = match outcome {
            Ok(_) => 0,
            Err(error) => {
                eprintln!("error: {error}");
                if matches!(error, ProcessError::User(_)) {
                    EXIT_USER_ERROR
                } else {
                    1
                }
            }
        };
        // The device thread may be inside libtorch; there is nothing left to save.
        std::process::exit(code)
    })
}

/// Threads for what blocks, such as the local object store: a slow disk gets no faster by hundreds of them.
const BLOCKING_THREADS_MAX: usize = 4;

/// The asynchronous runtime of a process, with so many threads.
///
/// # Errors
/// The system gives no threads.
pub fn runtime(threads: usize) -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .enable_all()
        .build()
        .context("the async runtime cannot start")
}
