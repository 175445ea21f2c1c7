//! A process's side of its agent's socket, on a thread of its own: it speaks while the compute threads and the actors are busy.
//!
//! An agent that dies is no reason to stop training. The thread connects again when there is one, and only after a long grace without any
//! does the process end.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};

use super::{LINE_BYTES_MAX, Notice, ProcessMessage, Reply, line, socket};
use crate::process::{Ending, ProcessContext};

/// Set to the node's name for processes that an agent started; only those look for an agent.
pub(crate) const AGENT_VARIABLE: &str = "EVERSTEP_AGENT";
/// How many seconds a process goes on without an agent; [`ORPHAN_GRACE`] if not set.
const GRACE_VARIABLE: &str = "EVERSTEP_ORPHAN_SECONDS";

const PULSE: Duration = Duration::from_millis(100);
const ORPHAN_GRACE: Duration = Duration::from_secs(30);
const RETRY_FIRST: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_millis(500);
/// An agent that takes nothing for so long is not connected to.
const WRITE: Duration = Duration::from_secs(2);

/// Starts the thread, if an agent started this process.
pub(crate) fn start(context: &Arc<ProcessContext>) -> io::Result<()> {
    if std::env::var_os(AGENT_VARIABLE).is_none() {
        return Ok(());
    }
    let grace = std::env::var(GRACE_VARIABLE)
        .ok()
        .and_then(|seconds| seconds.parse().ok())
        .map_or(ORPHAN_GRACE, Duration::from_secs);
    let context = Arc::downgrade(context);
    std::thread::Builder::new()
        .name("agent-link".to_owned())
        .spawn(move || keep(&context, grace))?;
    Ok(())
}

fn keep(context: &Weak<ProcessContext>, grace: Duration) {
    let mut alone_since = Instant::now();
    let mut retry = RETRY_FIRST;
    while let Some(process) = context.upgrade() {
        match connect(&process) {
            Ok(stream) => {
                tracing::debug!("linked to the agent");
                process.linked.store(true, Ordering::Relaxed);
                drop(process);
                let error = serve(context, &stream).err();
                if let Some(process) = context.upgrade() {
                    process.linked.store(false, Ordering::Relaxed);
                }
                tracing::info!(?error, "the agent is gone; training goes on");
                alone_since = Instant::now();
                retry = RETRY_FIRST;
            }
            Err(error) if alone_since.elapsed() >= grace => {
                tracing::warn!(%error, seconds = grace.as_secs(), "no agent came back: this process ends");
                return process.end(Ending::Orphaned);
            }
            Err(_) => {
                drop(process);
                std::thread::park_timeout(retry);
                retry = (retry * 2).min(RETRY_MAX);
            }
        }
    }
}

fn connect(context: &ProcessContext) -> io::Result<UnixStream> {
    let stream = socket::connect(&context.run_dir.control(context.node()))?;
    stream.set_write_timeout(Some(WRITE))?;
    let hello = ProcessMessage::Hello {
        process: context.process,
        incarnation: context.incarnation,
        pid: std::process::id(),
    };
    (&stream).write_all(&line(&hello)?)?;
    Ok(stream)
}

/// Pulses and notices until the agent is gone.
fn serve(context: &Weak<ProcessContext>, stream: &UnixStream) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut text = Vec::new();
    let mut due = Instant::now();
    loop {
        let Some(context) = context.upgrade() else {
            return Ok(());
        };
        if Instant::now() >= due {
            let devices = context.devices.pulses();
            write(stream, &ProcessMessage::Pulse { devices })?;
            due = Instant::now() + PULSE;
        }
        let patience = due.saturating_duration_since(Instant::now());
        stream.set_read_timeout(Some(patience.max(Duration::from_millis(1))))?;
        // A line of which only a part came stays in `text` when time is up.
        match io::Read::take(&mut reader, LINE_BYTES_MAX).read_until(b'\n', &mut text) {
            Ok(0) => return Ok(()),
            Ok(_) if text.ends_with(b"\n") => {
                if let Some(answer) = obey(&context, &text) {
                    write(stream, &answer)?;
                }
                text.clear();
            }
            Ok(_) if text.len() as u64 >= LINE_BYTES_MAX => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "a line without end",
                ));
            }
            Ok(_) => {}
            Err(error) if is_patience(&error) => {}
            Err(error) => return Err(error),
        }
    }
}

fn is_patience(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

fn write(mut stream: &UnixStream, message: &ProcessMessage) -> io::Result<()> {
    stream.write_all(&line(message)?)
}

/// Does what the agent says; some notices are answered.
fn obey(context: &Arc<ProcessContext>, text: &[u8]) -> Option<ProcessMessage> {
    let answer = |id: u64, outcome: Result<(), String>| {
        let reply = match outcome {
            Ok(()) => Reply::Done,
            Err(message) => Reply::Refused { message },
        };
        Some(ProcessMessage::Answer { id, reply })
    };
    match serde_json::from_slice(text) {
        Ok(Notice::Exited {
            process,
            incarnation,
        }) => context.router.peer_down(process, incarnation),
        Ok(Notice::Stop) => context.end(Ending::Stopped),
        Ok(Notice::Inject { id, fault }) => return answer(id, context.inject(fault)),
        Ok(Notice::Drain {
            id,
            node,
            seconds_left,
        }) => return answer(id, context.request_drain(&node, seconds_left)),
        Err(error) => tracing::warn!(%error, "a notice of the agent is not understood"),
    }
    None
}

/// Resolves at a SIGTERM while there is no agent; never in a process that no agent started.
///
/// Slurm, systemd and Kubernetes send their signals to every process of a job. What they mean is the agent's to decide, which gets them too:
/// a process that ended at once could not be drained.
pub(crate) async fn signals(context: &ProcessContext) {
    if std::env::var_os(AGENT_VARIABLE).is_none() {
        return std::future::pending().await;
    }
    let (Ok(mut terminate), Ok(mut user)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::user_defined1()),
    ) else {
        return std::future::pending().await;
    };
    loop {
        tokio::select! {
            _ = user.recv() => {}
            _ = terminate.recv() => if !context.linked.load(Ordering::Relaxed) {
                return;
            },
        }
        tracing::info!("a signal is left to the agent");
    }
}
