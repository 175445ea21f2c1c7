//! A living process, child or not: how it is signalled and how its end is noticed.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, ExitStatus};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::sync::oneshot;

use crate::life::Body;

/// How a process ended, as far as the agent can see.
#[derive(Debug)]
pub(super) enum Exit {
    /// A child's status.
    Status(ExitStatus),
    /// It is gone. The system tells a status to the parent only.
    Adopted,
    /// A child that cannot be waited for.
    Unknown(io::Error),
}

impl Exit {
    /// Whether it got SIGKILL, or may have got it.
    pub(super) fn may_be_killed(&self) -> bool {
        match self {
            Exit::Status(status) => status.signal() == Some(Signal::KILL.as_raw()),
            Exit::Adopted => true,
            Exit::Unknown(_) => false,
        }
    }

    pub(super) fn code(&self) -> Option<i32> {
        match self {
            Exit::Status(status) => status.code(),
            _ => None,
        }
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Exit::Status(status) => write!(f, "{status}"),
            Exit::Adopted => {
                f.write_str("its status is not known, since an earlier agent started it")
            }
            Exit::Unknown(error) => write!(f, "it cannot be waited for: {error}"),
        }
    }
}

/// A file descriptor of the process: unlike its pid it never means another one.
pub(super) fn open(body: Body) -> io::Result<Arc<OwnedFd>> {
    let fd = open_child(body)?;
    // Between the look at the pid and the opening it may have become another's.
    if body.is_alive() {
        Ok(fd)
    } else {
        Err(io::ErrorKind::NotFound.into())
    }
}

/// The same for a child that was not waited for yet, so that its pid cannot be another's.
pub(super) fn open_child(body: Body) -> io::Result<Arc<OwnedFd>> {
    let pid = Pid::from_raw(body.pid as i32).ok_or(io::ErrorKind::NotFound)?;
    Ok(Arc::new(pidfd_open(pid, PidfdFlags::NONBLOCK)?))
}

/// Sends SIGKILL; a process that is gone has what it should get.
pub(super) fn kill(fd: &OwnedFd) {
    if let Err(error) = pidfd_send_signal(fd, Signal::KILL) {
        tracing::debug!(%error, "SIGKILL");
    }
}

/// Resolves when the child ended.
pub(super) async fn child_exit(mut child: Child) -> Exit {
    let status = in_thread(move || child.wait()).await;
    status.map_or_else(Exit::Unknown, Exit::Status)
}

/// Resolves when an adopted process ended.
pub(super) async fn adopted_exit(fd: Arc<OwnedFd>) -> Exit {
    let outcome = in_thread(move || wait(&fd)).await;
    outcome.map_or_else(Exit::Unknown, |()| Exit::Adopted)
}

/// Every process has one thread that waits for its end, child or not: the runtime's own way to wait for descriptors is not safe Rust.
async fn in_thread<T: Send + 'static>(
    wait: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let (ended, exit) = oneshot::channel();
    std::thread::Builder::new()
        .name("exit".to_owned())
        .spawn(move || {
            let _ = ended.send(wait());
        })?;
    exit.await
        .unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// A process's descriptor is readable once it ended.
fn wait(fd: &OwnedFd) -> io::Result<()> {
    loop {
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], None) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
