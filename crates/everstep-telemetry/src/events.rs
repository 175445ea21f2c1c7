//! The event log: what happened to a run, one JSON object per line of `events.jsonl`.
//!
//! Several processes may append to one file. Readers skip what a crash left half-written.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::error::TelemetryError;
use crate::jsonl;

/// Something that happened to the run.
///
/// In the file each is an object with `time`, `kind` (the variant in snake case) and the variant's fields; optional
/// fields are left out when they are not known. `step` is the step that was being worked on, `epoch` the leader's
/// epoch, `seconds` a wall time, `reason` a sentence for people.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
#[allow(
    missing_docs,
    reason = "the fields are named after what they hold, and shared ones are explained above"
)]
pub enum Event {
    /// A run begins, or goes on: then `resumed_step` is the committed step that it goes on from.
    RunStarted {
        run: String,
        steps: u64,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        resumed_step: Option<u64>,
    },
    /// The last step is committed.
    RunFinished { step: u64, seconds: f64 },
    /// The run ends before its last step: a signal, or an error that nothing could recover from.
    RunStopped { step: u64, reason: String },
    /// A process is up and has joined. `incarnation` counts its starts in this run, from 0.
    ProcessStarted {
        process: String,
        node: String,
        pid: u32,
        roles: Vec<String>,
        incarnation: u64,
    },
    /// A process ended as it was told to.
    ProcessStopped { process: String, node: String },
    /// A process is gone: it died, was killed, or no longer answers.
    ProcessLost {
        process: String,
        node: String,
        roles: Vec<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        step: Option<u64>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        epoch: Option<u64>,
        reason: String,
    },
    /// The agent started a lost process again, `seconds` after it was lost. `restarts` counts them.
    ProcessRestarted {
        process: String,
        node: String,
        pid: u32,
        restarts: u32,
        seconds: f64,
    },
    /// A process died too often and stays down until it is told otherwise.
    ProcessQuarantined {
        process: String,
        node: String,
        restarts: u32,
        reason: String,
    },
    /// An agent found a process that an earlier agent had started, and watches it from now on.
    ProcessAdopted {
        process: String,
        node: String,
        pid: u32,
    },
    /// A process is alive and has done nothing for `seconds`: its agent ends it now, or, if it is stopped by a signal, once it has been
    /// stopped for as long as the topology file's `agent.stopped_seconds` says.
    ProcessHung {
        process: String,
        node: String,
        reason: String,
        seconds: f64,
    },
    /// A process that was stopped goes on, after `seconds`, before its agent had to end it.
    ProcessWoke {
        process: String,
        node: String,
        seconds: f64,
    },
    /// `source` (`sigterm`, `slurm`, `aws`, `gcp`, `azure`) says that the machine will be taken away.
    PreemptionNotice {
        source: String,
        node: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seconds_left: Option<u64>,
    },
    /// A process shall leave: what it holds is handed over while training goes on. `seconds_left` until it is taken away, if it is.
    DrainStarted {
        process: String,
        node: String,
        step: u64,
        epoch: u64,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seconds_left: Option<u64>,
    },
    /// Nobody can take the state that leaving shards hold: the run waits at `step` until that is checkpointed, and for others to come.
    DrainHolds { step: u64, epoch: u64 },
    /// A process that was to leave holds nothing any more and is gone, `seconds` after it was asked for. Others hold the `blocks_moved`
    /// replicas that it held.
    DrainFinished {
        process: String,
        node: String,
        step: u64,
        epoch: u64,
        seconds: f64,
        blocks_moved: u64,
    },
    /// A slot's lease moved to another worker, since the first was lost or is slow.
    SlotReassigned {
        step: u64,
        epoch: u64,
        slot: u64,
        from: String,
        reason: String,
    },
    /// A backup became the primary of these blocks.
    ShardPromoted {
        process: String,
        node: String,
        blocks: Vec<u32>,
        step: u64,
        epoch: u64,
        view: u64,
    },
    /// A new backup holds the blocks and follows their log.
    BackupSeeded {
        process: String,
        node: String,
        blocks: Vec<u32>,
        step: u64,
        epoch: u64,
    },
    /// A process became the leader of `epoch`, at `step`.
    LeaderElected {
        process: String,
        node: String,
        epoch: u64,
        step: u64,
    },
    /// A process that led `epoch` has learnt that another one leads `by`, and leads no more.
    LeaderDeposed {
        process: String,
        node: String,
        epoch: u64,
        by: u64,
    },
    /// `process`, which follows or leads `epoch`, refused what `from` said: a leader that is deposed, or a life that was declared lost.
    /// Logged once for each that is refused, however much it says.
    StaleRefused {
        process: String,
        node: String,
        from: String,
        epoch: u64,
        reason: String,
    },
    /// A step committed again after something was lost: the end of that loss's story. `cause` says what was lost (`worker`, `shard`,
    /// `leader`, `rollback`), `noticed_seconds` how long it took to notice, `seconds` the time from then to the first commit after
    /// it, and the counts what had to be computed again.
    Recovered {
        cause: String,
        process: String,
        node: String,
        step: u64,
        epoch: u64,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        noticed_seconds: Option<f64>,
        seconds: f64,
        slots_recomputed: u64,
        steps_recomputed: u64,
    },
    /// Snapshots for a checkpoint are being taken.
    CheckpointStarted { step: u64, epoch: u64 },
    /// The checkpoint's manifest exists.
    CheckpointCommitted {
        step: u64,
        epoch: u64,
        bytes: u64,
        seconds: f64,
    },
    /// `process` has read so many blocks of a committed checkpoint, `local_blocks` of them from its node's own disk.
    StateRestored {
        process: String,
        step: u64,
        blocks: u64,
        local_blocks: u64,
    },
    /// A checkpoint was given up; what it left is garbage.
    CheckpointAbandoned {
        step: u64,
        epoch: u64,
        reason: String,
    },
    /// An object of a committed checkpoint is missing or does not verify.
    CheckpointDamaged {
        step: u64,
        object: String,
        reason: String,
    },
    /// A checkpoint was removed, since newer ones are kept instead.
    CheckpointPruned { step: u64 },
    /// The store has not answered `process` since `since`; training goes on, and checkpoints wait.
    StoreUnreachable {
        process: String,
        since: String,
        reason: String,
    },
    /// The store answers again, after `seconds`; the newest committed checkpoint is `lag_steps` behind.
    StoreBack {
        process: String,
        seconds: f64,
        lag_steps: u64,
    },
    /// The run went back from `from_step` to the committed `to_step` and replays.
    Rollback {
        from_step: u64,
        to_step: u64,
        epoch: u64,
        reason: String,
    },
    /// The decision of `step` was to leave the parameters as they are.
    StepSkipped {
        step: u64,
        epoch: u64,
        reason: String,
    },
    /// What a process had on its disk cannot be trusted. It was set aside, and the process joined as a new one, under an incarnation that it
    /// never had.
    LedgerDamaged {
        process: String,
        node: String,
        reason: String,
        incarnation: u64,
    },
    /// The mean loss of `step` was so many standard deviations (`sd`) above the weighted `mean` of the losses before it that `[policy]` calls it
    /// a spike; a `step_skipped` follows.
    LossSpike {
        step: u64,
        epoch: u64,
        #[serde(with = "crate::metrics::number")]
        loss: f64,
        #[serde(with = "crate::metrics::number")]
        mean: f64,
        #[serde(with = "crate::metrics::number")]
        sd: f64,
    },
    /// A fault that was asked for happened (`[chaos] allow`). `fault` is its name as in the control interface.
    FaultInjected {
        process: String,
        node: String,
        fault: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        step: Option<u64>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        slot: Option<u64>,
    },
    /// Computations of one slot gave different digests. `digests` tells what each worker said, in the order of arrival.
    AuditMismatch {
        step: u64,
        epoch: u64,
        slot: u64,
        digests: Vec<String>,
    },
    /// A worker's device lied: its gradient of `slot` in `step` was not the one that the others computed. It is not leased anything any
    /// more. `permanent` is false if it is the only worker: then all that it said of the step is computed again.
    WorkerQuarantined {
        worker: String,
        process: String,
        node: String,
        step: u64,
        epoch: u64,
        slot: u64,
        lied: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        truth: Option<String>,
        permanent: bool,
    },
    /// Loss on held-out text with the parameters after `step`; `tokens` is how many were scored.
    Evaluation {
        step: u64,
        #[serde(with = "crate::metrics::number")]
        loss: f64,
        tokens: u64,
        seconds: f64,
        /// By layer with experts, how many times the mean of its layer each of them was chosen.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        expert_loads: Vec<Vec<f64>>,
    },
    /// A kind that this version does not know; its fields are not kept.
    #[serde(other)]
    Unknown,
}

/// An event and when it was written down.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EventRecord {
    /// RFC 3339, UTC, milliseconds, by the clock of the process that wrote it.
    pub time: String,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

impl EventRecord {
    /// `time` as a point in time; none if it is not RFC 3339.
    #[must_use]
    pub fn at(&self) -> Option<SystemTime> {
        humantime::parse_rfc3339(&self.time).ok()
    }
}

/// An open `events.jsonl`, to append to. Appending from several threads and processes is fine.
#[derive(Debug)]
pub struct EventLog {
    file: File,
    path: PathBuf,
}

impl EventLog {
    /// Opens or creates the file and its folder. If its last line is torn, it is ended, so that what is appended
    /// starts on a line of its own.
    ///
    /// # Errors
    /// [`TelemetryError::Io`] if the file cannot be opened, read or written.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, TelemetryError> {
        let path = path.as_ref();
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)
                .map_err(TelemetryError::io("create the folder of", path))?;
        }
        let mut file = OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .open(path)
            .map_err(TelemetryError::io("open", path))?;
        if jsonl::is_torn(&file).map_err(TelemetryError::io("read", path))? {
            file.write_all(b"\n")
                .map_err(TelemetryError::io("append to", path))?;
        }
        Ok(Self {
            file,
            path: path.to_path_buf(),
        })
    }

    /// Appends an event with the time of now.
    ///
    /// # Errors
    /// [`TelemetryError::Io`] if the line was not written whole; a part of it may stand in the file, ended, and
    /// readers skip it.
    pub fn append(&self, event: &Event) -> Result<(), TelemetryError> {
        self.append_at(SystemTime::now(), event)
    }

    /// Appends an event that happened at `time`.
    ///
    /// # Errors
    /// As [`append`](Self::append).
    pub fn append_at(&self, time: SystemTime, event: &Event) -> Result<(), TelemetryError> {
        let record = EventRecord {
            time: jsonl::timestamp(time),
            event: event.clone(),
        };
        let line = jsonl::line(&record).map_err(TelemetryError::io("append to", &self.path))?;
        let written = jsonl::write_line(&self.file, &line);
        if written.is_err() {
            // The next line must not be glued to the torn one. If this fails too, the next `open` mends it.
            let _ = (&self.file).write_all(b"\n");
        }
        written.map_err(TelemetryError::io("append to", &self.path))
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All whole events of a file, in file order; none if the file does not exist.
    ///
    /// # Errors
    /// [`TelemetryError::Io`] if the file exists and cannot be read.
    pub fn read(path: impl AsRef<Path>) -> Result<Vec<EventRecord>, TelemetryError> {
        EventReader::new(path).poll()
    }
}

/// Follows an `events.jsonl` that others append to.
#[derive(Debug)]
pub struct EventReader {
    path: PathBuf,
    file: Option<File>,
    pending: Vec<u8>,
    num_damaged: usize,
}

impl EventReader {
    /// A reader at the file's beginning. The file need not exist yet.
    #[must_use]
    pub fn new(path: impl AsRef<Path>) -> Self {
        Self {
            path: path.as_ref().to_path_buf(),
            file: None,
            pending: Vec::new(),
            num_damaged: 0,
        }
    }

    /// The events that were completed since the last call, in file order. A line that is not whole yet is kept for a
    /// later call; a whole line that is no event is skipped and counted.
    ///
    /// # Errors
    /// [`TelemetryError::Io`] if the file exists and cannot be read.
    pub fn poll(&mut self) -> Result<Vec<EventRecord>, TelemetryError> {
        let mut file = match &self.file {
            Some(file) => file,
            None => match File::open(&self.path) {
                Ok(file) => self.file.insert(file),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
                Err(error) => return Err(TelemetryError::io("open", &self.path)(error)),
            },
        };
        file.read_to_end(&mut self.pending)
            .map_err(TelemetryError::io("read", &self.path))?;
        let Some(end) = self.pending.iter().rposition(|&b| b == b'\n') else {
            return Ok(Vec::new());
        };
        let mut records = Vec::new();
        for line in self.pending[..end]
            .split(|&b| b == b'\n')
            .filter(|line| !line.is_empty())
        {
            match serde_json::from_slice(line) {
                Ok(record) => records.push(record),
                Err(_) => self.num_damaged += 1,
            }
        }
        self.pending.drain(..=end);
        Ok(records)
    }

    /// How many whole lines were skipped, since they are no events: what crashes left.
    #[must_use]
    pub fn num_damaged(&self) -> usize {
        self.num_damaged
    }
}

#[cfg(test)]
mod tests;
