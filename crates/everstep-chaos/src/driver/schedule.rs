//! Which fault is due when.

use std::path::Path;

use everstep_cluster::RunDir;
use everstep_protocol::random::{Purpose, Stream};

use super::PATIENCE_SECONDS;
use super::observer::Observer;
use super::phase;
use crate::record::FaultRecord;
use crate::scenario::{Fault, Moment, Scenario, Spacing, Storm};

/// A fault that is due.
#[derive(Debug, Clone)]
pub(super) struct Due {
    pub(super) fault: Fault,
    /// When it was first tried; what cannot happen is tried again for some time.
    since: f64,
    is_of_storm: bool,
}

#[derive(Debug)]
pub(super) struct Schedule {
    /// Single faults that have not struck yet.
    planned: Vec<Fault>,
    storm: Option<StormState>,
    /// What could not happen when it was due, or waits for its phase.
    held: Vec<Due>,
}

#[derive(Debug)]
struct StormState {
    storm: Storm,
    random: Stream,
    /// When the storm began.
    began: Option<f64>,
    next_at: f64,
    next_step: u64,
    /// How many it has sent.
    num_sent: usize,
}

impl Schedule {
    pub(super) fn new(scenario: &Scenario, seed: u64) -> Self {
        Self {
            planned: scenario.faults.clone(),
            storm: scenario.storm.clone().map(|storm| StormState {
                storm,
                random: Stream::new(seed, Purpose::Fault, &[0]),
                began: None,
                next_at: 0.0,
                next_step: 0,
                num_sent: 0,
            }),
            held: Vec::new(),
        }
    }

    /// Whether there was a storm that ends by itself, and nothing of the scenario is left to happen.
    pub(super) fn is_storm_over(&self, now: f64) -> bool {
        let is_over =
            |storm: &StormState| storm.began.is_some_and(|began| storm.is_over(began, now));
        self.planned.is_empty() && self.held.is_empty() && self.storm.as_ref().is_some_and(is_over)
    }

    /// The faults that are due now; each is handed out once and comes back by `missed`.
    pub(super) fn due(
        &mut self,
        observer: &Observer,
        run_dir: &RunDir,
        store: Option<&Path>,
    ) -> Vec<Due> {
        let now = observer.now();
        let holds = |moment: &Moment| {
            is_reached(moment, observer, now)
                && moment
                    .phase
                    .is_none_or(|wanted| phase::holds(wanted, observer, run_dir, store))
        };
        let mut due = Vec::new();
        let mut num_given_up = 0;
        self.held.retain(|held| {
            let ready = held
                .fault
                .moment
                .phase
                .is_none_or(|wanted| phase::holds(wanted, observer, run_dir, store));
            if ready {
                due.push(held.clone());
            }
            // A storm does not wait for a phase that does not come; another fault takes the place.
            let is_given_up = held.is_of_storm && now - held.since > PATIENCE_SECONDS;
            num_given_up += usize::from(is_given_up && !ready);
            !ready && !is_given_up
        });
        if let Some(storm) = &mut self.storm {
            storm.num_sent -= num_given_up;
        }
        // In the order of the file: the next one waits for the one before.
        if let Some(first) = self.planned.first()
            && holds(&first.moment)
        {
            due.push(Due {
                fault: self.planned.remove(0),
                since: now,
                is_of_storm: false,
            });
        }
        if let Some(storm) = &mut self.storm
            && let Some(fault) = storm.next(observer, now)
        {
            let fault = Due {
                fault,
                since: now,
                is_of_storm: true,
            };
            if fault.fault.moment.phase.is_some() {
                self.held.push(fault);
            } else {
                due.push(fault);
            }
        }
        due
    }

    /// A fault could not happen: it is tried again, and given up at last.
    pub(super) fn missed(
        &mut self,
        due: Due,
        now: f64,
        reason: String,
        faults: &mut Vec<FaultRecord>,
    ) {
        if now - due.since < PATIENCE_SECONDS {
            self.held.push(due);
            return;
        }
        if let (true, Some(storm)) = (due.is_of_storm, &mut self.storm) {
            // Another takes its place.
            storm.num_sent = storm.num_sent.saturating_sub(1);
        }
        faults.push(FaultRecord {
            label: due.fault.label(),
            kind: due.fault.action.kind().to_owned(),
            place: due.fault.place,
            at: now,
            until: None,
            step: 0,
            victims: Vec::new(),
            happened: false,
            network: None,
            requests: None,
            object: None,
            note: Some(reason),
        });
    }
}

fn is_reached(moment: &Moment, observer: &Observer, now: f64) -> bool {
    let first = observer.commits.first().map(|commit| commit.at);
    observer.step() >= moment.after_step
        && (moment.after_seconds == 0.0
            || first.is_some_and(|first| now - first >= moment.after_seconds))
}

impl StormState {
    fn is_over(&self, began: f64, now: f64) -> bool {
        let storm = &self.storm;
        storm.for_seconds.is_some_and(|length| now - began > length)
            || storm.count_max.is_some_and(|max| self.num_sent >= max)
    }

    /// The next fault, if its time has come.
    fn next(&mut self, observer: &Observer, now: f64) -> Option<Fault> {
        if observer.commits.is_empty() || !is_reached(&self.storm.from, observer, now) {
            return None;
        }
        let step = observer.step();
        if self.began.is_none() {
            self.began = Some(now);
            self.next_at = now;
            self.next_step = step;
        }
        let began = self.began?;
        if self.is_over(began, now) {
            return None;
        }
        match self.storm.spacing {
            Spacing::EverySteps(steps) => {
                if step < self.next_step {
                    return None;
                }
                self.next_step = step + steps;
            }
            Spacing::EverySeconds(seconds) => {
                if now < self.next_at {
                    return None;
                }
                self.next_at += seconds;
            }
            Spacing::RandomSeconds(mean) => {
                if now < self.next_at {
                    return None;
                }
                self.next_at += -mean * (1.0 - self.random.unit_f64()).ln();
            }
        }
        self.num_sent += 1;
        let total: f64 = self.storm.faults.iter().map(|(weight, _)| weight).sum();
        let mut drawn = self.random.unit_f64() * total;
        for (weight, fault) in &self.storm.faults {
            if drawn < *weight {
                return Some(fault.clone());
            }
            drawn -= weight;
        }
        self.storm.faults.last().map(|(_, fault)| fault.clone())
    }
}
