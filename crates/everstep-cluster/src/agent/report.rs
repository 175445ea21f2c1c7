//! What the agent tells: events, status files, the last words of its processes.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};

use everstep_telemetry::Event;

use super::Agent;
use crate::status::{ProcessStatus, write_processes};
use crate::topology::Process;

/// As much of the end of a log is looked at.
const LAST_WORDS_BYTES: u64 = 4096;

impl Agent {
    /// What a process that a user's mistake ended said last.
    pub(super) fn last_error(&self, process: &str) -> String {
        let log = std::fs::read_to_string(self.options.run_dir.log(process)).unwrap_or_default();
        let line = log
            .lines()
            .rev()
            .find_map(|line| line.strip_prefix("error: "));
        line.map_or_else(
            || format!("process {process} cannot run with this configuration; see its log"),
            str::to_owned,
        )
    }

    /// The error that a process ended with, if that is the last line of its log.
    pub(super) fn last_words(&self, process: &str) -> Option<String> {
        let mut log = File::open(self.options.run_dir.log(process)).ok()?;
        let begin = log.metadata().ok()?.len().saturating_sub(LAST_WORDS_BYTES);
        log.seek(SeekFrom::Start(begin)).ok()?;
        let mut tail = Vec::new();
        log.read_to_end(&mut tail).ok()?;
        let tail = String::from_utf8_lossy(&tail);
        let line = tail.lines().next_back()?;
        line.strip_prefix("error: ").map(str::to_owned)
    }

    pub(super) fn spec(&self, slot: usize) -> &Process {
        &self.options.topology.processes[self.slots[slot].process as usize]
    }

    pub(super) fn name(&self, slot: usize) -> String {
        self.spec(slot).name.clone()
    }

    pub(super) fn node(&self, slot: usize) -> String {
        self.spec(slot).node.clone()
    }

    pub(super) fn roles(&self, slot: usize) -> Vec<String> {
        let names = self.spec(slot).roles.iter();
        names.map(|role| role.name().to_owned()).collect()
    }

    pub(super) fn log(&self, event: &Event) {
        if let Err(error) = self.events.append(event) {
            tracing::error!(%error, "an event could not be logged");
        }
    }

    pub(super) fn write_status(&mut self) {
        self.status_is_old = false;
        for node in &self.options.nodes {
            let own = (0..self.slots.len()).filter(|slot| self.spec(*slot).node == *node);
            let status = |index: usize| {
                let slot = &self.slots[index];
                ProcessStatus {
                    name: self.name(index),
                    node: node.clone(),
                    roles: self.roles(index),
                    pid: slot.alive.as_ref().map(|alive| alive.body.pid),
                    state: slot.state,
                    restarts: slot.restarts,
                    last_reason: slot.last_reason.clone(),
                }
            };
            let processes: Vec<ProcessStatus> = own.map(status).collect();
            if let Err(error) = write_processes(&self.options.run_dir, node, &processes) {
                tracing::warn!(%error, "the status file cannot be written");
            }
        }
    }
}
