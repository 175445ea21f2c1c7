//! When something was wrong: windows of time by cause, and when the workers were away.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use super::{Cause, seconds};
use crate::events::Event;

/// A process that is back is still at loading its libraries and warming up.
const SETTLE: Duration = Duration::from_secs(1);
/// A shard that was given no block after this long will not get one.
const SEEDING_MAX: Duration = Duration::from_secs(30);

/// A time in which something was wrong.
struct Window {
    start: SystemTime,
    end: SystemTime,
    cause: Cause,
    counts: bool,
}

/// A process that is away, or whose work is not taken up yet.
struct Away {
    since: SystemTime,
    cause: Cause,
    /// It led: over when somebody leads.
    led: bool,
    /// When it started again, if it waits for its blocks.
    seeding_since: Option<SystemTime>,
}

/// The windows of one session.
pub(super) struct Windows {
    windows: Vec<Window>,
    workers: BTreeSet<String>,
    /// When worker processes were away.
    absences: Vec<(SystemTime, SystemTime)>,
}

impl Windows {
    /// Reads the windows off the events, which are in order of time; those still open close at `end`.
    pub(super) fn of(events: &[(SystemTime, &Event)], end: SystemTime) -> Self {
        let mut reader = Reader::default();
        for (at, event) in events {
            reader.take(*at, event);
        }
        for (process, away) in std::mem::take(&mut reader.away) {
            reader.close(&process, &away, end, end);
        }
        for draining in std::mem::take(&mut reader.draining).into_values() {
            reader.windows.push(Window {
                start: draining.since,
                end: draining.until.map_or(end, |until| until + SETTLE),
                cause: Cause::Drain,
                counts: true,
            });
        }
        Self {
            windows: reader.windows,
            workers: reader.workers,
            absences: reader.absences,
        }
    }

    /// The gravest cause whose window touches the time between two commits.
    pub(super) fn gravest(&self, since: SystemTime, until: SystemTime) -> Option<Cause> {
        self.windows
            .iter()
            .filter(|window| window.start <= until && window.end > since)
            .map(|window| window.cause)
            .max()
    }

    /// How often each cause happened.
    pub(super) fn counts(&self) -> impl Iterator<Item = (Cause, u64)> + '_ {
        self.windows
            .iter()
            .filter(|window| window.counts)
            .map(|window| (window.cause, 1))
    }

    /// Seconds that worker processes were there between two points of time, and how many there could be.
    pub(super) fn presence(&self, from: SystemTime, to: SystemTime) -> (f64, f64) {
        let expected = self.workers.len() as f64 * seconds(from, to);
        let away: f64 = self
            .absences
            .iter()
            .map(|(start, end)| seconds((*start).max(from), (*end).min(to)))
            .sum();
        ((expected - away).max(0.0), expected)
    }
}

#[derive(Default)]
struct Reader {
    windows: Vec<Window>,
    away: BTreeMap<String, Away>,
    workers: BTreeSet<String>,
    absences: Vec<(SystemTime, SystemTime)>,
    /// What each process does.
    roles: BTreeMap<String, Vec<String>>,
    leader: Option<String>,
    draining: BTreeMap<String, Draining>,
}

/// A node that is being left.
struct Draining {
    since: SystemTime,
    /// When the last of its processes ended.
    until: Option<SystemTime>,
}

impl Reader {
    fn take(&mut self, at: SystemTime, event: &Event) {
        match event {
            Event::ProcessStarted { process, roles, .. } => {
                if is(roles, "worker") {
                    self.workers.insert(process.clone());
                }
                self.roles.insert(process.clone(), roles.clone());
                self.started(at, process, roles);
            }
            Event::ProcessHung {
                process, seconds, ..
            } => self.hung(at, process, *seconds),
            Event::ProcessWoke { process, .. } if self.is_hung(process) => {
                self.end(process, at, at);
            }
            Event::PreemptionNotice { node, .. } | Event::DrainStarted { node, .. } => {
                let began = Draining {
                    since: at,
                    until: None,
                };
                self.draining.entry(node.clone()).or_insert(began);
            }
            Event::ProcessStopped { node, .. } | Event::DrainFinished { node, .. } => {
                if let Some(draining) = self.draining.get_mut(node) {
                    draining.until = Some(at);
                }
            }
            Event::ProcessLost { process, roles, .. } => self.lost(at, process, roles),
            Event::BackupSeeded { process, .. } if self.is_seeding(process) => {
                self.end(process, at, at);
            }
            Event::LeaderElected { process, .. } => {
                self.leader = Some(process.clone());
                let leaderless: Vec<String> = self
                    .away
                    .iter()
                    .filter(|(_, away)| away.led)
                    .map(|(process, _)| process.clone())
                    .collect();
                for process in leaderless {
                    self.end(&process, at, at);
                }
            }
            Event::Rollback { .. } => self.point(at, Cause::Rollback, true),
            // Slots of a process that is gone are part of that loss.
            Event::SlotReassigned { .. } if self.away.is_empty() => {
                self.point(at, Cause::Straggler, true);
            }
            Event::CheckpointAbandoned { .. } | Event::CheckpointDamaged { .. } => {
                self.point(at, Cause::Store, true);
            }
            Event::AuditMismatch { .. } => self.point(at, Cause::Audit, true),
            // The step is computed again, in part or whole.
            Event::WorkerQuarantined { .. } => self.point(at, Cause::Audit, false),
            _ => {}
        }
    }

    fn is_seeding(&self, process: &str) -> bool {
        let away = self.away.get(process);
        away.is_some_and(|away| away.seeding_since.is_some())
    }

    fn is_hung(&self, process: &str) -> bool {
        let away = self.away.get(process);
        away.is_some_and(|away| away.cause == Cause::Hang)
    }

    /// What the run loses with a process; none with a standby, since nothing waits for it.
    fn cause_of(&self, process: &str, roles: &[String]) -> Option<Cause> {
        if self.leader.as_deref() == Some(process) {
            // The leader cannot report its own end; whatever else the process did counts less.
            Some(Cause::LeaderLost)
        } else if is(roles, "shard") {
            Some(Cause::ShardLost)
        } else if is(roles, "worker") {
            Some(Cause::WorkerLost)
        } else if is(roles, "loader") {
            Some(Cause::LoaderLost)
        } else {
            None
        }
    }

    fn lost(&mut self, at: SystemTime, process: &str, roles: &[String]) {
        if let Some(cause) = self.cause_of(process, roles) {
            self.leaves(at, process, cause);
        }
    }

    /// It was noticed `seconds` after it had begun, unless others had taken it for lost before.
    fn hung(&mut self, at: SystemTime, process: &str, seconds: f64) {
        let roles = self.roles.get(process).cloned().unwrap_or_default();
        if self.cause_of(process, &roles).is_none() {
            return;
        }
        let since = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        let since = at.checked_sub(since).unwrap_or(at);
        self.leaves(since, process, Cause::Hang);
    }

    fn leaves(&mut self, since: SystemTime, process: &str, cause: Cause) {
        // The agent and the leader both tell of one loss, the leader once per role.
        if let Some(away) = self.away.get_mut(process)
            && away.seeding_since.is_none()
        {
            away.cause = away.cause.max(cause);
            away.since = away.since.min(since);
            return;
        }
        self.end(process, since, since);
        let away = Away {
            since,
            cause,
            led: self.leader.as_deref() == Some(process),
            seeding_since: None,
        };
        self.away.insert(process.to_owned(), away);
    }

    fn started(&mut self, at: SystemTime, process: &str, roles: &[String]) {
        let Some(away) = self.away.get_mut(process) else {
            return;
        };
        if away.led {
            // Over when somebody leads.
            return;
        }
        if is(roles, "shard") && away.seeding_since.is_none() {
            if is(roles, "worker") {
                self.absences.push((away.since, at));
            }
            away.seeding_since = Some(at);
            return;
        }
        self.end(process, at, at);
    }

    fn end(&mut self, process: &str, at: SystemTime, back: SystemTime) {
        if let Some(away) = self.away.remove(process) {
            self.close(process, &away, at, back);
        }
    }

    fn close(&mut self, process: &str, away: &Away, at: SystemTime, back: SystemTime) {
        if self.workers.contains(process) && away.seeding_since.is_none() {
            self.absences.push((away.since, back));
        }
        let end = match away.seeding_since {
            Some(since) => at.min(since + SEEDING_MAX),
            None => at,
        };
        self.windows.push(Window {
            start: away.since,
            end: end + SETTLE,
            cause: away.cause,
            counts: true,
        });
    }

    fn point(&mut self, at: SystemTime, cause: Cause, counts: bool) {
        self.windows.push(Window {
            start: at,
            // Windows end after their last moment.
            end: at + Duration::from_millis(1),
            cause,
            counts,
        });
    }
}

fn is(roles: &[String], role: &str) -> bool {
    roles.iter().any(|known| known == role)
}
