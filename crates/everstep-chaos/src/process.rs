//! What the system says of a process: who it is, whether it lives, what it uses.

use std::fs;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Serialize;

/// One life of a process. A pid may be given again; together with the time of its start it names one life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Identity {
    /// Process id.
    pub pid: i32,
    /// When it started, in clock ticks since the system did.
    pub started_ticks: u64,
}

/// Whether a process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It runs or waits.
    Running,
    /// It is stopped by a signal.
    Stopped,
    /// It is gone, or waits for its parent to notice.
    Dead,
}

/// What a process uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Resident memory.
    pub rss_bytes: u64,
    /// Threads.
    pub threads: u64,
    /// Open file descriptors.
    pub descriptors: u64,
}

/// The fields of `/proc/PID/stat` that are looked at.
struct Stat {
    state: char,
    parent: i32,
    started_ticks: u64,
}

fn stat(pid: i32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name is in parentheses and may hold anything.
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    let started_ticks = fields.nth(17)?.parse().ok()?;
    Some(Stat {
        state,
        parent,
        started_ticks,
    })
}

impl Identity {
    /// The life that runs under `pid` now.
    #[must_use]
    pub fn of(pid: i32) -> Option<Self> {
        let stat = stat(pid)?;
        (!matches!(stat.state, 'Z' | 'X')).then_some(Self {
            pid,
            started_ticks: stat.started_ticks,
        })
    }

    /// Whether this life goes on.
    #[must_use]
    pub fn state(self) -> State {
        match stat(self.pid) {
            Some(stat) if stat.started_ticks == self.started_ticks => match stat.state {
                'Z' | 'X' => State::Dead,
                'T' | 't' => State::Stopped,
                _ => State::Running,
            },
            _ => State::Dead,
        }
    }

    /// Sends a signal; false if this life is over.
    #[must_use]
    pub fn signal(self, signal: Signal) -> bool {
        self.state() != State::Dead && kill(Pid::from_raw(self.pid), signal).is_ok()
    }

    /// What it uses now.
    #[must_use]
    pub fn usage(self) -> Option<Usage> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let field = |name: &str| -> Option<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse().ok()
        };
        Some(Usage {
            rss_bytes: field("VmRSS:")? * 1024,
            threads: field("Threads:")?,
            descriptors: fs::read_dir(format!("/proc/{}/fd", self.pid)).ok()?.count() as u64,
        })
    }
}

/// Whether `pid` is a process of the run in `run_dir`: its command names the folder.
#[must_use]
pub fn belongs_to(pid: i32, run_dir: &Path) -> bool {
    let Ok(command) = fs::read(format!("/proc/{pid}/cmdline")) else {
        return false;
    };
    let wanted = run_dir.as_os_str().as_encoded_bytes();
    command
        .split(|byte| *byte == 0)
        .any(|argument| argument == wanted)
}

/// All living processes whose command names `run_dir`, whoever their parent is.
#[must_use]
pub fn all_of(run_dir: &Path) -> Vec<Identity> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| belongs_to(*pid, run_dir))
        .filter_map(Identity::of)
        .collect()
}

/// Takes note of the ends of adopted processes, or they would stay as zombies: those whose parent this process has become.
pub(crate) fn reap(adopted: &mut Vec<i32>) {
    use nix::sys::wait::{WaitPidFlag, waitpid};
    adopted.retain(|pid| {
        let own = stat(*pid).is_some_and(|stat| stat.parent == std::process::id() as i32);
        if own {
            let _ = waitpid(Pid::from_raw(*pid), Some(WaitPidFlag::WNOHANG));
        }
        stat(*pid).is_some()
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_child_is_seen_alive_stopped_and_dead() {
        let folder = tempfile::tempdir().unwrap();
        let mut child = Command::new("tail")
            .args(["-f", "/dev/null"])
            .arg(folder.path())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let identity = Identity::of(child.id() as i32).unwrap();
        assert_ne!(identity.state(), State::Dead);
        assert!(identity.signal(Signal::SIGSTOP));
        while identity.state() != State::Stopped {
            std::thread::yield_now();
        }
        assert!(identity.usage().unwrap().threads >= 1);
        assert_eq!(all_of(folder.path()), [identity]);
        assert!(identity.signal(Signal::SIGKILL));
        child.wait().unwrap();
        assert_eq!(identity.state(), State::Dead);
        assert!(!identity.signal(Signal::SIGKILL));
        assert!(all_of(folder.path()).is_empty());
    }
}
