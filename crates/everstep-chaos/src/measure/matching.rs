//! Which event tells of which fault, and whether the run recovered from it.
//!
//! An event tells of one fault only. A fault that must be noticed counts as recovered only if it was noticed within its window.

use std::collections::BTreeSet;

use everstep_telemetry::{Event, EventRecord};
use serde::Serialize;

use super::{gap, kind};
use crate::driver::Observed;
use crate::record::{FaultRecord, Victim};

/// Events are written down in whole milliseconds, so that one may seem to come right before its cause, in seconds.
const ROUNDING_SECONDS: f64 = 0.002;

/// An event that comes later than this after the end of a fault tells of something else, in seconds.
const LATE_SECONDS: f64 = 1.0;

/// A death, a stop or a cut link is noticed within this time, in seconds.
const NOTICE_SECONDS_MAX: f64 = 5.0;

/// A compute thread that hangs is told from a slow one within this time, in seconds.
const HANG_NOTICE_SECONDS_MAX: f64 = 20.0;

/// An agent, or everything, is back within this time, in seconds; it is away for a second.
const RETURN_SECONDS_MAX: f64 = 30.0;

/// Stops and cuts that are at least so long must be noticed, in seconds; shorter ones may pass unseen.
const LONG_SECONDS: f64 = 3.0;

/// Steps are committed again, and who was killed is replaced, within this time after a fault is noticed or over, in seconds.
const RECOVERY_SECONDS_MAX: f64 = 60.0;

/// A fault and what came of it.
#[derive(Debug, Clone, Serialize)]
pub struct FaultReport {
    /// The fault.
    #[serde(flatten)]
    pub record: FaultRecord,
    /// Until the first event that tells of it.
    pub detection_seconds: Option<f64>,
    /// The kind of that event.
    pub detected_by: Option<String>,
    /// Until the first commit after the detection, or after the fault if nothing tells of it.
    pub recovery_seconds: Option<f64>,
    /// What tells of the recovery: `recovered`, `leader_elected`, `drain_finished`, `store_back` or `checkpoint_committed`, or else a commit.
    pub recovered_by: Option<String>,
    /// The longest time between two commits that this fault was in or right before.
    pub gap_seconds: Option<f64>,
    /// Whether the run went on: what must be noticed was, a step was committed, and whoever ended was replaced, all in time.
    pub recovered: bool,
}

/// Measures every fault.
#[must_use]
pub fn faults(observed: &Observed) -> Vec<FaultReport> {
    let mut claimed = BTreeSet::new();
    let mut found = vec![Vec::new(); observed.faults.len()];
    // Faults that may pass unseen are left what no other needs.
    for must in [true, false] {
        for (record, found) in observed.faults.iter().zip(&mut found) {
            let noticing = Noticing::of(record, observed);
            if record.happened && noticing.must == must {
                *found = noticing.find(record, observed, &mut claimed);
            }
        }
    }
    let found = observed.faults.iter().zip(found);
    found
        .map(|(record, found)| report(record, &found, observed))
        .collect()
}

/// `found`: the event that tells of each victim, or of all.
fn report(record: &FaultRecord, found: &[Option<usize>], observed: &Observed) -> FaultReport {
    let mut report = FaultReport {
        record: record.clone(),
        detection_seconds: None,
        detected_by: None,
        recovery_seconds: None,
        recovered_by: None,
        gap_seconds: None,
        recovered: false,
    };
    if !record.happened {
        return report;
    }
    let noticing = Noticing::of(record, observed);
    let first = found.iter().flatten().copied().min();
    let noticed_at = first.map_or(record.at, |index| observed.events[index].0);
    report.detection_seconds = first.map(|_| (noticed_at - record.at).max(0.0));
    report.detected_by = first.map(|index| kind(&observed.events[index].1));
    let next_fault = observed.faults.iter().map(|other| other.at);
    let next_fault = next_fault.into_iter().find(|at| *at > record.at);
    report.gap_seconds = gap(record.at, next_fault, &observed.commits);
    let commit = observed
        .commits
        .iter()
        .find(|commit| commit.at > noticed_at);
    report.recovery_seconds = commit.map(|commit| commit.at - record.at);
    report.recovered_by = ending(record, noticed_at, observed).or(commit.map(|_| "commit".into()));

    // A run that ends well soon after a fault has recovered from it.
    let begin = noticed_at.max(record.until.unwrap_or(record.at));
    let finished_soon =
        observed.failure.is_none() && observed.seconds - begin <= RECOVERY_SECONDS_MAX;
    let in_time = |at: f64| at - begin <= RECOVERY_SECONDS_MAX;
    let replaced = record
        .victims
        .iter()
        .all(|victim| victim.replaced_at.is_some_and(in_time));
    let noticed = !noticing.must || found.iter().all(Option::is_some);
    let goes_on = commit.is_some_and(|commit| in_time(commit.at)) || finished_soon;
    report.recovered = noticed && goes_on && (!ends_victims(record) || replaced || finished_soon);
    report
}

/// Whether its victims do not live on.
fn ends_victims(record: &FaultRecord) -> bool {
    match record.kind.as_str() {
        "kill" | "hang_device" => true,
        // One that nobody resumed was ended.
        "pause" => record.until.is_none(),
        _ => false,
    }
}

/// What tells of a fault.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Sign {
    /// An event that names the victim.
    Victim,
    /// A new agent.
    Agent,
    /// The run starts again.
    Run,
    /// A step is skipped.
    Skip,
    /// Somebody misses the store.
    Store,
    /// Somebody finds the damaged object.
    Damage,
}

/// What tells of a fault, whether it must, and how soon.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Noticing {
    sign: Sign,
    must: bool,
    seconds_max: f64,
}

/// Until when something that happened at `at` must be noticed: while nobody watches, because the agents were killed as well, no time passes.
fn deadline(at: f64, seconds_max: f64, observed: &Observed) -> f64 {
    let kills = observed
        .faults
        .iter()
        .filter(|other| other.happened && matches!(&*other.label, "kill agent" | "kill all"));
    let mut until = at + seconds_max;
    for kill in kills {
        let backs = kill.victims.iter().filter_map(|victim| victim.replaced_at);
        let back = backs.fold(kill.at, f64::max);
        if back > at && kill.at <= until {
            until = until.max(back + seconds_max);
        }
    }
    until
}

impl Noticing {
    fn of(record: &FaultRecord, observed: &Observed) -> Self {
        let is = |sign, must, seconds_max| Self {
            sign,
            must,
            seconds_max,
        };
        let length = record
            .until
            .map_or(f64::INFINITY, |until| until - record.at);
        match (record.kind.as_str(), record.label.as_str()) {
            (_, "kill agent") => is(Sign::Agent, true, RETURN_SECONDS_MAX),
            (_, "kill all") => is(Sign::Run, true, RETURN_SECONDS_MAX),
            ("kill", _) => is(Sign::Victim, true, NOTICE_SECONDS_MAX),
            ("pause", _) => is(Sign::Victim, length >= LONG_SECONDS, NOTICE_SECONDS_MAX),
            ("hang_device", _) => is(Sign::Victim, true, HANG_NOTICE_SECONDS_MAX),
            ("non_finite", _) => is(Sign::Skip, true, NOTICE_SECONDS_MAX),
            ("drain", _) => is(Sign::Victim, true, NOTICE_SECONDS_MAX),
            // A store that nobody asked for anything is not missed; one that is slow, or fails now and then, is bridged.
            ("store_outage" | "store_slow" | "store_errors", _) => {
                is(Sign::Store, false, f64::INFINITY)
            }
            // What nobody loads is not missed.
            ("damage", _) => is(Sign::Damage, false, f64::INFINITY),
            ("partition", _) => {
                // Nobody watches loaders and standbys but their agent, which is not cut off. A link that comes and goes may be bridged.
                let flaps = record
                    .network
                    .is_some_and(|counts| counts.cut < counts.datagrams);
                let is_member = record
                    .victims
                    .iter()
                    .all(|victim| record.label.contains("leader") || was_member(victim, observed));
                let must = length >= LONG_SECONDS && is_member && !flaps;
                is(Sign::Victim, must, NOTICE_SECONDS_MAX)
            }
            // An actor that its supervisor starts again at once may not be missed.
            ("panic", _) => is(Sign::Victim, false, NOTICE_SECONDS_MAX),
            _ => is(Sign::Victim, false, f64::INFINITY),
        }
    }

    /// The event that tells of each victim, or the one that tells of all.
    fn find(
        self,
        record: &FaultRecord,
        observed: &Observed,
        claimed: &mut BTreeSet<usize>,
    ) -> Vec<Option<usize>> {
        let events = &observed.events;
        let until = record.until.unwrap_or(f64::INFINITY) + LATE_SECONDS;
        let mut first = |from: f64, tells: &dyn Fn(&EventRecord) -> bool| {
            let until = until.min(deadline(from, self.seconds_max, observed));
            let found = events.iter().enumerate().find(|(index, (at, event))| {
                *at >= from - ROUNDING_SECONDS
                    && *at <= until
                    && !claimed.contains(index)
                    && tells(event)
            });
            let found = found.map(|(index, _)| index);
            claimed.extend(found);
            found
        };
        match self.sign {
            Sign::Victim => record
                .victims
                .iter()
                .map(|victim| first(victim.at, &|event| tells_of(record, victim, event)))
                .collect(),
            Sign::Agent => {
                // Several processes are adopted at once, and tell of one agent.
                let is_agent = |event: &EventRecord| {
                    matches!(
                        event.event,
                        Event::ProcessAdopted { .. } | Event::RunStarted { .. }
                    )
                };
                vec![first(record.at, &is_agent)]
            }
            Sign::Run => vec![first(record.at, &|event| {
                matches!(event.event, Event::RunStarted { .. })
            })],
            Sign::Store => vec![first(record.at, &|event| {
                matches!(
                    event.event,
                    Event::StoreUnreachable { .. } | Event::CheckpointAbandoned { .. }
                )
            })],
            Sign::Damage => vec![first(
                record.at,
                &|event| matches!(&event.event, Event::CheckpointDamaged { object, .. } if Some(object) == record.object.as_ref()),
            )],
            Sign::Skip => vec![first(record.at, &|event| {
                matches!(event.event, Event::StepSkipped { .. })
            })],
        }
    }
}

/// Whether it was a worker or shard process that had joined, and the cluster trained since.
fn was_member(victim: &Victim, observed: &Observed) -> bool {
    let joined = observed.events.iter().find(|(_, event)| {
        matches!(&event.event, Event::ProcessStarted { process, pid, roles, .. }
            if *process == victim.process
                && i64::from(*pid) == i64::from(victim.identity.pid)
                && roles.iter().any(|role| role == "worker" || role == "shard"))
    });
    joined.is_some_and(|(joined, _)| {
        let mut commits = observed.commits.iter();
        commits.any(|commit| commit.at > *joined && commit.at <= victim.at)
    })
}

/// Whether an event tells of a victim's trouble.
fn tells_of(record: &FaultRecord, victim: &Victim, event: &EventRecord) -> bool {
    // An injection's own event is the fault, not its discovery; others tell of the return.
    if matches!(
        event.event,
        Event::FaultInjected { .. }
            | Event::ProcessAdopted { .. }
            | Event::ProcessStarted { .. }
            | Event::ProcessRestarted { .. }
            | Event::ProcessStopped { .. }
            | Event::BackupSeeded { .. }
            | Event::ShardPromoted { .. }
            | Event::Recovered { .. }
    ) {
        return false;
    }
    if let Event::LeaderElected { process, .. } = &event.event {
        // A new leader is how the loss of the old one shows, if the same one did not come back under a new epoch.
        return record.label.contains("leader") && *process != victim.process;
    }
    let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(event) else {
        return false;
    };
    fields
        .iter()
        .any(|(name, value)| name != "kind" && value.as_str() == Some(&victim.process))
}

/// The event that ends the story of a victim.
fn ending(record: &FaultRecord, noticed_at: f64, observed: &Observed) -> Option<String> {
    let is_victim = |process: &str| record.victims.iter().any(|v| v.process == process);
    let later = observed.events.iter().filter(|(at, _)| *at >= noticed_at);
    later
        .filter(|(at, _)| *at - noticed_at <= RECOVERY_SECONDS_MAX)
        .find(|(_, event)| match &event.event {
            Event::Recovered { process, .. } | Event::DrainFinished { process, .. } => {
                is_victim(process)
            }
            Event::LeaderElected { .. } => record.label.contains("leader"),
            Event::StoreBack { .. } | Event::CheckpointCommitted { .. } => {
                record.kind.starts_with("store_")
            }
            _ => false,
        })
        .map(|(_, event)| kind(event))
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::process::Identity;
    use crate::record::Commit;

    fn victim(process: &str, at: f64, replaced_at: Option<f64>) -> Victim {
        Victim {
            process: process.into(),
            node: "n".into(),
            identity: Identity {
                pid: 1,
                started_ticks: 1,
            },
            at,
            was_alive: true,
            took_effect: true,
            replaced_at,
        }
    }

    fn fault(kind: &str, at: f64, victims: Vec<Victim>) -> FaultRecord {
        FaultRecord {
            label: format!("{kind} worker"),
            kind: kind.into(),
            place: "fault 1".into(),
            at,
            until: None,
            step: 1,
            victims,
            happened: true,
            network: None,
            requests: None,
            object: None,
            note: None,
        }
    }

    fn lost(at: f64, process: &str) -> (f64, EventRecord) {
        let event = Event::ProcessLost {
            process: process.into(),
            node: "n".into(),
            roles: vec![],
            step: None,
            epoch: None,
            reason: "gone".into(),
        };
        let time = String::new();
        (at, EventRecord { time, event })
    }

    fn observed(faults: Vec<FaultRecord>, events: Vec<(f64, EventRecord)>) -> Observed {
        let commits = (0..200).map(|step| Commit {
            at: f64::from(step),
            step: step as u64,
        });
        Observed {
            faults,
            commits: commits.collect(),
            events,
            lives: vec![],
            seconds: 200.0,
            origin: SystemTime::UNIX_EPOCH,
            failure: None,
        }
    }

    #[test]
    fn an_event_tells_of_one_fault_only() {
        let kill = |at| fault("kill", at, vec![victim("w", at, Some(at + 0.5))]);
        let once = observed(vec![kill(10.1), kill(11.1)], vec![lost(11.3, "w")]);
        let reports = faults(&once);
        assert!(reports[0].recovered && !reports[1].recovered);
        let twice = observed(
            vec![kill(10.1), kill(11.1)],
            vec![lost(10.3, "w"), lost(11.3, "w")],
        );
        let reports = faults(&twice);
        assert!(reports.iter().all(|report| report.recovered));
        assert!((reports[1].detection_seconds.unwrap() - 0.2).abs() < 1e-9);
        assert_eq!(reports[1].recovered_by.as_deref(), Some("commit"));
    }

    #[test]
    fn what_is_noticed_too_late_or_of_another_is_not_recovered() {
        let kill = || fault("kill", 10.1, vec![victim("w", 10.1, Some(10.5))]);
        for events in [vec![], vec![lost(10.3, "v")], vec![lost(19.0, "w")]] {
            assert!(!faults(&observed(vec![kill()], events))[0].recovered);
        }
        let not_replaced = fault("kill", 10.1, vec![victim("w", 10.1, None)]);
        assert!(!faults(&observed(vec![not_replaced], vec![lost(10.3, "w")]))[0].recovered);
    }

    #[test]
    fn what_may_pass_unseen_takes_no_event_from_what_must_be_noticed() {
        let panic = fault("panic", 10.1, vec![victim("w", 10.1, None)]);
        let kill = fault("kill", 11.1, vec![victim("w", 11.1, Some(11.5))]);
        let reports = faults(&observed(vec![panic, kill], vec![lost(11.3, "w")]));
        assert!(reports.iter().all(|report| report.recovered));
        assert_eq!(reports[0].detection_seconds, None);
        assert!(reports[1].detection_seconds.is_some());
    }

    #[test]
    fn no_time_passes_while_the_agent_is_away() {
        let hang = || fault("hang_device", 10.1, vec![victim("w", 10.1, Some(41.0))]);
        let agent = || FaultRecord {
            label: "kill agent".into(),
            ..fault("kill", 29.0, vec![victim("agent n", 29.0, Some(30.0))])
        };
        let adopted = || {
            let event = Event::ProcessAdopted {
                process: "v".into(),
                node: "n".into(),
                pid: 2,
            };
            let time = String::new();
            (30.5, EventRecord { time, event })
        };
        let events = || vec![adopted(), lost(40.5, "w")];
        assert!(!faults(&observed(vec![hang()], events()))[0].recovered);
        let reports = faults(&observed(vec![hang(), agent()], events()));
        assert!(reports.iter().all(|report| report.recovered));
        let late = vec![adopted(), lost(51.0, "w")];
        assert!(!faults(&observed(vec![hang(), agent()], late))[0].recovered);
    }

    #[test]
    fn every_victim_must_be_noticed_unless_it_passes_unseen() {
        let both = || {
            let victims = vec![victim("s", 10.1, Some(11.0)), victim("t", 10.1, Some(11.0))];
            fault("kill", 10.1, victims)
        };
        assert!(!faults(&observed(vec![both()], vec![lost(10.3, "s")]))[0].recovered);
        let events = vec![lost(10.3, "s"), lost(10.4, "t")];
        assert!(faults(&observed(vec![both()], events))[0].recovered);

        // Links of a member that are cut for long must be noticed, those of somebody who has not joined need not.
        let partition = || FaultRecord {
            until: Some(20.1),
            ..fault("partition", 10.1, vec![victim("w", 10.1, None)])
        };
        let joined = |at| {
            let event = Event::ProcessStarted {
                process: "w".into(),
                node: "n".into(),
                pid: 1,
                roles: vec!["worker".into()],
                incarnation: 1,
            };
            let time = String::new();
            (at, EventRecord { time, event })
        };
        assert!(!faults(&observed(vec![partition()], vec![joined(2.0)]))[0].recovered);
        assert!(faults(&observed(vec![partition()], vec![joined(10.05)]))[0].recovered);
        let noticed = vec![joined(2.0), lost(11.6, "w")];
        assert!(faults(&observed(vec![partition()], noticed))[0].recovered);

        let pause = |until| FaultRecord {
            until: Some(until),
            ..fault("pause", 10.1, vec![victim("w", 10.1, None)])
        };
        assert!(faults(&observed(vec![pause(11.1)], vec![]))[0].recovered);
        assert!(!faults(&observed(vec![pause(20.1)], vec![]))[0].recovered);
    }
}
