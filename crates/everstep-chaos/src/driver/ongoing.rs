//! What of a fault is still to be done, checked or taken back.

use everstep_cluster::control::Injection;
use nix::sys::signal::Signal;

use super::Driver;
use super::network::BadLinks;
use crate::process::State;

/// Death, or a stop, shows within this time, in seconds, or the fault had no effect.
const EFFECT_SECONDS: f64 = 5.0;

/// A drained node's processes are gone within this time, in seconds, or the fault had no effect.
const LEAVE_SECONDS: f64 = 60.0;

/// A fault that is not over.
#[derive(Debug)]
pub(super) struct Ongoing {
    /// Its place among the records.
    pub(super) record: usize,
    pub(super) todo: Todo,
    /// When this stage began.
    pub(super) since: f64,
}

/// What is to be done next.
#[derive(Debug)]
pub(super) enum Todo {
    /// See whether the victims died.
    SeeDeath,
    /// See whether the victims left.
    SeeLeave,
    /// See whether the victims stopped, and let them go on then.
    SeeStop { resume_at: Option<f64> },
    /// Let the victims go on then.
    Resume { at: f64 },
    /// Kill the leader that is elected after this epoch.
    Successor { after_epoch: u64 },
    /// Kill these one after the other, each when the one before is back and a step was committed since.
    InTurn { left: Vec<String> },
    /// Put the store's folder back then.
    RestoreStore { at: f64 },
    /// Leave the store's requests alone then; so many had suffered before.
    MendRequests { at: f64, before: u64 },
    /// Mend the links then.
    MendLinks { at: f64, bad: Box<BadLinks> },
    /// Tell the victims to behave then.
    Calm { at: f64, calm: Injection },
    /// Nothing.
    Nothing,
}

impl Ongoing {
    /// Whether the store is away or troubled because of it.
    pub(super) fn holds_store(&self) -> bool {
        matches!(
            self.todo,
            Todo::RestoreStore { .. } | Todo::MendRequests { .. }
        )
    }

    /// Whether links are bad because of it.
    pub(super) fn holds_links(&self) -> bool {
        matches!(self.todo, Todo::MendLinks { .. })
    }
}

impl Driver<'_> {
    /// Goes on with a fault; true if nothing of it is left.
    pub(super) fn go_on(&mut self, ongoing: &mut Ongoing, now: f64) -> bool {
        let late = now - ongoing.since > EFFECT_SECONDS;
        match &mut ongoing.todo {
            Todo::SeeDeath => self.saw_all(ongoing.record, State::Dead) || late,
            Todo::SeeLeave => {
                self.saw_all(ongoing.record, State::Dead) || now - ongoing.since > LEAVE_SECONDS
            }
            Todo::SeeStop { resume_at } => {
                let resume_at = *resume_at;
                if !self.saw_all(ongoing.record, State::Stopped) && !late {
                    return false;
                }
                match resume_at {
                    Some(at) => ongoing.todo = Todo::Resume { at },
                    None => return true,
                }
                false
            }
            Todo::Resume { at } => {
                if now < *at {
                    return false;
                }
                self.take_back(ongoing, now);
                true
            }
            Todo::Successor { after_epoch } => {
                let after_epoch = *after_epoch;
                self.saw_all(ongoing.record, State::Dead);
                let leader = self.observer.leader.clone();
                let Some((name, _)) = leader.filter(|(_, epoch)| *epoch > after_epoch) else {
                    return false;
                };
                if self.kill_by_name(ongoing.record, &name, now) {
                    ongoing.todo = Todo::SeeDeath;
                    ongoing.since = now;
                }
                false
            }
            Todo::InTurn { left } => {
                let is_back = self.faults[ongoing.record]
                    .victims
                    .last()
                    .is_none_or(|victim| {
                        let back = victim.replaced_at;
                        back.is_some_and(|back| {
                            self.observer
                                .commits
                                .last()
                                .is_some_and(|last| last.at > back)
                        })
                    });
                if !is_back {
                    self.saw_all(ongoing.record, State::Dead);
                    return false;
                }
                let Some(name) = left.first().cloned() else {
                    return self.saw_all(ongoing.record, State::Dead);
                };
                if self.kill_by_name(ongoing.record, &name, now) {
                    left.remove(0);
                }
                false
            }
            Todo::RestoreStore { at }
            | Todo::MendRequests { at, .. }
            | Todo::Calm { at, .. }
            | Todo::MendLinks { at, .. } => {
                if now < *at {
                    return false;
                }
                self.take_back(ongoing, now);
                true
            }
            Todo::Nothing => true,
        }
    }

    /// Undoes what lasts.
    pub(super) fn take_back(&mut self, ongoing: &mut Ongoing, now: f64) {
        match &ongoing.todo {
            Todo::Resume { .. } | Todo::SeeStop { .. } => {
                for victim in &self.faults[ongoing.record].victims {
                    let _ = victim.identity.signal(Signal::SIGCONT);
                }
                self.faults[ongoing.record].until = Some(now);
            }
            Todo::RestoreStore { .. } => self.put_store_back(ongoing.record, now),
            Todo::MendRequests { before, .. } => self.mend_requests(ongoing.record, *before, now),
            Todo::MendLinks { bad, .. } => self.mend_links(ongoing.record, bad, now),
            Todo::Calm { calm, .. } => {
                let victims = self.faults[ongoing.record].victims.iter();
                for victim in victims {
                    // A victim that died meanwhile behaves in its next life.
                    let _ = self.ask(&victim.node, &victim.process, calm);
                }
                self.faults[ongoing.record].until = Some(now);
            }
            Todo::Nothing => {}
            Todo::SeeDeath | Todo::SeeLeave | Todo::Successor { .. } | Todo::InTurn { .. } => {
                self.saw_all(ongoing.record, State::Dead);
            }
        }
    }

    /// Notes which victims are in `state` by now; true if all are, or were before.
    fn saw_all(&mut self, record: usize, state: State) -> bool {
        let record = &mut self.faults[record];
        for victim in &mut record.victims {
            victim.took_effect |= victim.identity.state() == state;
        }
        let all = record
            .victims
            .iter()
            .all(|victim| victim.was_alive && victim.took_effect);
        record.happened = all && !record.victims.is_empty();
        all
    }

    /// Kills a process if it is alive and notes it as a victim.
    fn kill_by_name(&mut self, record: usize, name: &str, now: f64) -> bool {
        let alive = self.observer.alive();
        let Some(victim) = alive.into_iter().find(|alive| alive.name == name) else {
            return false;
        };
        let struck = self.kill_one(victim, now);
        match struck {
            Some(victim) => {
                self.faults[record].happened = false;
                self.faults[record].victims.push(victim);
                true
            }
            None => false,
        }
    }
}
