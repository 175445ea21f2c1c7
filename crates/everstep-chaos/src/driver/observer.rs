//! What a run tells of itself: its files, read as they grow.

use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::PathBuf;
use std::time::SystemTime;

use everstep_cluster::{LeaderStatus, ProcessStatus, RunDir};
use everstep_telemetry::{Event, EventReader, EventRecord, StepMetrics};

use crate::process::{self, Identity, State};
use crate::record::{Commit, Life};

/// Follows a run.
#[derive(Debug)]
pub(crate) struct Observer {
    run_dir: RunDir,
    origin: SystemTime,
    metrics: Tail,
    reader: EventReader,
    /// Commits in the order in which they were logged.
    pub(crate) commits: Vec<Commit>,
    /// Events with their times.
    pub(crate) events: Vec<(f64, EventRecord)>,
    /// What the agents say of their processes.
    pub(crate) processes: Vec<ProcessStatus>,
    /// Every life that was seen.
    pub(crate) lives: Vec<Life>,
    /// The last leader that was elected, and its epoch.
    pub(crate) leader: Option<(String, u64)>,
    /// When that was.
    elected_at: f64,
}

/// A new leader has written its status within this time; one that nobody followed has left it to the old one again, in seconds.
const SETTLED_SECONDS: f64 = 3.0;

/// A process that is alive now.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Alive {
    pub(crate) name: String,
    pub(crate) node: String,
    pub(crate) roles: Vec<String>,
    pub(crate) identity: Identity,
}

impl Observer {
    pub(crate) fn new(run_dir: RunDir, origin: SystemTime) -> Self {
        Self {
            metrics: Tail::new(run_dir.metrics()),
            reader: EventReader::new(run_dir.events()),
            run_dir,
            origin,
            commits: Vec::new(),
            events: Vec::new(),
            processes: Vec::new(),
            lives: Vec::new(),
            leader: None,
            elected_at: 0.0,
        }
    }

    /// Seconds since the run was started.
    pub(crate) fn now(&self) -> f64 {
        self.seconds(SystemTime::now())
    }

    fn seconds(&self, at: SystemTime) -> f64 {
        match at.duration_since(self.origin) {
            Ok(after) => after.as_secs_f64(),
            Err(before) => -before.duration().as_secs_f64(),
        }
    }

    /// Steps committed.
    pub(crate) fn step(&self) -> u64 {
        self.commits.last().map_or(0, |commit| commit.step)
    }

    /// Reads what is new.
    pub(crate) fn look(&mut self) {
        for line in self.metrics.lines() {
            let Ok(metrics) = serde_json::from_slice::<StepMetrics>(&line) else {
                continue;
            };
            let at = humantime(&metrics.time).unwrap_or_else(SystemTime::now);
            self.commits.push(Commit {
                at: self.seconds(at),
                step: metrics.step,
            });
        }
        for record in self.reader.poll().unwrap_or_default() {
            let at = record
                .at()
                .map_or_else(|| self.now(), |at| self.seconds(at));
            if let Event::LeaderElected { process, epoch, .. } = &record.event {
                self.leader = Some((process.clone(), *epoch));
                self.elected_at = at;
            }
            self.events.push((at, record));
        }
        self.look_at_processes();
    }

    fn look_at_processes(&mut self) {
        let now = self.now();
        let mut processes = Vec::new();
        for entry in fs::read_dir(self.run_dir.status())
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("node-")
                && name.ends_with(".json")
                && let Ok(bytes) = fs::read(entry.path())
                && let Ok(found) = serde_json::from_slice::<Vec<ProcessStatus>>(&bytes)
            {
                processes.extend(found);
            }
        }
        if !processes.is_empty() {
            self.processes = processes;
        }
        for life in self.lives.iter_mut().filter(|life| life.to.is_none()) {
            if life.identity.state() == State::Dead {
                life.to = Some(now);
            }
        }
        for alive in self.alive() {
            self.note_life(alive);
        }
    }

    /// Notes a life that was not seen before.
    pub(crate) fn note_life(&mut self, alive: Alive) {
        let known = self.lives.iter().rev();
        if known
            .take(64)
            .any(|life| life.identity == alive.identity && life.to.is_none())
        {
            return;
        }
        let from = self.now();
        self.lives.push(Life {
            process: alive.name,
            node: alive.node,
            roles: alive.roles,
            identity: alive.identity,
            from,
            to: None,
            usage: Vec::new(),
        });
    }

    /// The processes that run now; those stopped by a signal are among them.
    pub(crate) fn alive(&self) -> Vec<Alive> {
        let running = self
            .processes
            .iter()
            .filter(|process| process.state.is_alive());
        running
            .filter_map(|process| {
                let pid = i32::try_from(process.pid?).ok()?;
                // A pid in an old status file may have been given to somebody else.
                let identity = process::belongs_to(pid, self.run_dir.path())
                    .then(|| Identity::of(pid))
                    .flatten()?;
                Some(Alive {
                    name: process.name.clone(),
                    node: process.node.clone(),
                    roles: process.roles.clone(),
                    identity,
                })
            })
            .collect()
    }

    /// Takes a sample of what every living process uses.
    pub(crate) fn sample_usage(&mut self) {
        let now = self.now();
        for life in self.lives.iter_mut().filter(|life| life.to.is_none()) {
            if let Some(usage) = life.identity.usage() {
                life.usage.push((now, usage));
            }
        }
    }

    /// Who leads: the last one that was elected, unless another writes the status since. That is so if it was cut off and nobody followed it.
    pub(crate) fn leader_name(&self) -> Option<String> {
        let read = || -> Option<LeaderStatus> {
            let bytes = fs::read(self.run_dir.status().join("leader.json")).ok()?;
            serde_json::from_slice(&bytes).ok()
        };
        let status = read().filter(|status| !status.leader.is_empty());
        let Some((elected, _)) = &self.leader else {
            return status.map(|status| status.leader);
        };
        let is_settled = self.now() - self.elected_at > SETTLED_SECONDS;
        let status = status.filter(|_| is_settled);
        Some(status.map_or_else(|| elected.clone(), |status| status.leader))
    }
}

fn humantime(text: &str) -> Option<SystemTime> {
    let record = EventRecord {
        time: text.to_owned(),
        event: Event::Unknown,
    };
    record.at()
}

/// The whole lines of a file that grows.
#[derive(Debug)]
struct Tail {
    path: PathBuf,
    read_bytes: u64,
    pending: Vec<u8>,
}

impl Tail {
    fn new(path: PathBuf) -> Self {
        Self {
            path,
            read_bytes: 0,
            pending: Vec::new(),
        }
    }

    /// The lines that were completed since the last call.
    fn lines(&mut self) -> Vec<Vec<u8>> {
        let fresh = fs::File::open(&self.path).and_then(|mut file| {
            // A restarted coordinator cuts a torn last line off; what comes then begins where this reader's last whole line ended.
            if file.metadata()?.len() < self.read_bytes {
                self.read_bytes -= self.pending.len() as u64;
                self.pending.clear();
            }
            file.seek(SeekFrom::Start(self.read_bytes))?;
            let mut fresh = Vec::new();
            file.read_to_end(&mut fresh)?;
            Ok(fresh)
        });
        let Ok(fresh) = fresh else { return Vec::new() };
        self.read_bytes += fresh.len() as u64;
        self.pending.extend(fresh);
        let Some(end) = self.pending.iter().rposition(|byte| *byte == b'\n') else {
            return Vec::new();
        };
        let whole: Vec<u8> = self.pending.drain(..=end).collect();
        whole
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .map(<[u8]>::to_vec)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn a_tail_gives_whole_lines_and_survives_a_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines");
        let mut tail = Tail::new(path.clone());
        assert!(tail.lines().is_empty());
        let mut file = fs::File::create(&path).unwrap();
        file.write_all(b"one\ntwo\nthr").unwrap();
        assert_eq!(tail.lines(), [b"one", b"two"]);
        file.set_len(8).unwrap();
        assert!(tail.lines().is_empty());
        let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"3\n").unwrap();
        assert_eq!(tail.lines(), [b"3"]);
    }
}
