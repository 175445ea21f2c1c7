//! Members that shall leave: what they hold is moved while training goes on, then they are released.
//!
//! ```text
//!  draining worker   no new leases; finishes what it has, or hands it over if time is short ─────────────────▶ released
//!  draining shard    others join its blocks ─▶ seeded: backups ─▶ between two steps it leaves the placements ─▶ released
//!                    nobody can take them: checkpoint of the next version, the run waits there ─▶ committed ─▶ released
//! ```

use super::machine::{Coordinator, Phase};
use super::{Effect, Note};
use crate::ids::{Member, Role, Step};
use crate::message::Numerics;
use crate::retry::Retry;

/// A member that shall leave.
#[derive(Debug)]
pub(super) struct Drain {
    since_ms: u64,
    /// When it is taken away.
    deadline_ms: Option<u64>,
    /// Replicas that others hold in its place.
    pub(super) num_moved: u32,
    /// Repeats the release.
    released: Option<Retry>,
}

impl Drain {
    pub(super) fn is_released(&self) -> bool {
        self.released.is_some()
    }
}

impl<N: Numerics> Coordinator<N> {
    /// Members that shall leave, and whether they may.
    pub fn draining(&self) -> impl Iterator<Item = (Member, bool)> + '_ {
        self.draining
            .iter()
            .map(|(member, drain)| (*member, drain.is_released()))
    }

    pub(super) fn on_drain(
        &mut self,
        now_ms: u64,
        members: Vec<Member>,
        seconds_left: Option<u64>,
    ) {
        let deadline_ms = seconds_left.map(|seconds| now_ms.saturating_add(seconds * 1000));
        let mut new = Vec::new();
        for member in members {
            let is_lost = self
                .lost
                .get(&(member.role, member.index))
                .is_some_and(|lost| member.incarnation <= *lost);
            if member.role == Role::Coordinator || is_lost {
                continue;
            }
            let drain = self.draining.entry(member).or_insert_with(|| {
                new.push(member);
                Drain {
                    since_ms: now_ms,
                    deadline_ms,
                    num_moved: 0,
                    released: None,
                }
            });
            drain.deadline_ms = match (drain.deadline_ms, deadline_ms) {
                (Some(known), Some(told)) => Some(known.min(told)),
                (known, told) => known.or(told),
            };
        }
        if new.is_empty() {
            return;
        }
        for member in new {
            self.note(Note::DrainStarted { member });
        }
        self.tend_drain(now_ms);
    }

    /// Whether draining shards hold blocks that nobody else could take.
    pub(super) fn is_stranded(&self) -> bool {
        self.staying(Role::Shard).is_empty()
            && self
                .draining
                .keys()
                .any(|member| member.role == Role::Shard && self.is_live(*member))
    }

    /// Whether a released shard is still on its way out: what it holds is as good as lost.
    fn is_leaving(&self) -> bool {
        self.draining.iter().any(|(member, drain)| {
            member.role == Role::Shard && drain.is_released() && self.is_live(*member)
        })
    }

    /// Whether the run waits at the open step's version for its checkpoint, because its shards leave and there are no others.
    pub(super) fn is_held(&self) -> bool {
        self.hold == Some(self.work.step) && !self.is_last(self.work.step)
    }

    fn hold(&mut self, version: Step) {
        if self.hold != Some(version) {
            self.hold = Some(version);
            self.note(Note::DrainHolds { version });
        }
    }

    /// Carries drains on, as far as they get.
    pub(super) fn tend_drain(&mut self, now_ms: u64) {
        if self.phase != Phase::Training {
            return;
        }
        if self.is_stranded() {
            self.tend_stranded(now_ms);
        } else if self.hold.is_some() && !self.is_leaving() {
            // Somebody came who can take what is left.
            self.hold = None;
            self.try_decide(now_ms);
            self.assign(now_ms);
        }
        if self.draining.is_empty() {
            return;
        }
        self.seed_elsewhere(now_ms);
        self.hand_over_leases(now_ms);
        let members: Vec<Member> = self
            .draining
            .keys()
            .copied()
            .filter(|member| self.is_live(*member))
            .collect();
        for member in members {
            let is_free = !self.is_referred(member);
            self.release(now_ms, member, is_free);
        }
    }

    /// The run stops at a version that it then commits, so that nothing is computed in vain.
    fn tend_stranded(&mut self, now_ms: u64) {
        let step = self.work.step;
        if self.is_last(step) {
            // What is left is its evaluation and its checkpoint, which are due in any case.
            return;
        }
        if self.committed >= step {
            // After a rollback a checkpoint of the line before may be further than this one: the run goes on from there.
            return self.hold(step);
        }
        if self.is_held() || self.staying(Role::Worker).is_empty() {
            // Without workers the open step may never end.
            self.hold(step);
            // If the snapshot was lost, take it again: the version stays.
            self.checkpoint_next = true;
            self.begin_checkpoint_here(now_ms);
            self.checkpoint_next = false;
            // Everything may be stored, and have waited for its evaluation.
            self.try_commit(step);
            return;
        }
        self.checkpoint_next = true;
        self.hold(step.next());
    }

    fn is_referred(&self, member: Member) -> bool {
        let stranded_safely = self.is_held() && self.committed >= self.work.step;
        match member.role {
            Role::Worker => {
                // Without other workers the step may never end.
                let is_last = self.staying(Role::Worker).is_empty();
                let has_done_all = is_last && self.is_idle(member);
                self.has_part(member) && !stranded_safely && !has_done_all
            }
            Role::Shard => {
                let is_placed = self.view.as_ref().is_some_and(|view| {
                    view.placements
                        .iter()
                        .any(|placement| placement.role_of(member).is_some())
                });
                self.stores(member) || (is_placed && !stranded_safely)
            }
            Role::Coordinator => true,
        }
    }

    fn release(&mut self, now_ms: u64, member: Member, is_free: bool) {
        let resend_ms = self.config.resend_ms;
        let Some(drain) = self.draining.get_mut(&member) else {
            return;
        };
        if let Some(retry) = &mut drain.released {
            if retry.fires(now_ms) {
                self.out.push(Effect::Release { member });
            }
            return;
        }
        if !is_free {
            return;
        }
        drain.released = Some(Retry::new(now_ms, resend_ms));
        let took_ms = now_ms.saturating_sub(drain.since_ms);
        let (num_moved, has_deadline) = (drain.num_moved, drain.deadline_ms.is_some());
        self.note(Note::DrainFinished {
            member,
            took_ms,
            num_moved,
        });
        self.out.push(Effect::Release { member });
        if has_deadline && member.role == Role::Shard && self.hold.is_none() {
            // The state is with others; with the next version committed too, even their loss costs little.
            self.checkpoint_next = true;
        }
    }

    /// Leases that cannot be finished in the time that is left go to others now; placements change within the step if it will not end
    /// in time.
    fn hand_over_leases(&mut self, now_ms: u64) {
        // Without workers the step would never end.
        let mut leaves_now = self.staying(Role::Worker).is_empty();
        let due: Vec<(Member, u64)> = self
            .draining
            .iter()
            .filter(|(member, drain)| !drain.is_released() && self.is_live(**member))
            .filter_map(|(member, drain)| Some((*member, drain.deadline_ms?)))
            .collect();
        for (member, deadline_ms) in due {
            let left_ms = deadline_ms.saturating_sub(now_ms) as f64;
            match member.role {
                Role::Worker => {
                    let need_ms = self.outstanding_ms(member);
                    if need_ms.is_some_and(|need_ms| need_ms > left_ms) || left_ms <= 0.0 {
                        self.hand_over(now_ms, member);
                    }
                }
                Role::Shard => {
                    let step_ms = self.step_ms.unwrap_or(0.0);
                    leaves_now |= left_ms < 2.0 * step_ms;
                }
                Role::Coordinator => {}
            }
        }
        if leaves_now && !self.is_held() {
            self.settle_placement(now_ms);
        }
    }
}
