//! What a seed, and a campaign of seeds, showed.

use std::collections::BTreeMap;
use std::fmt;

use everstep_protocol::Member;

use crate::coverage::Branch;
use crate::fault::Fault;
use crate::plan::Action;

/// Ways in which the protocol recovered. Every one must occur in a campaign.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Recovery {
    /// Slots of a lost worker were leased again.
    SlotsReleased,
    /// Slots of a slow worker were leased a second time.
    SlotsDoubled,
    /// A backup became primary.
    ShardPromoted,
    /// A joining replica was seeded and became a backup.
    BackupSeeded,
    /// Blocks were declared to have fewer replicas than configured.
    Degraded,
    /// The run went back to a committed checkpoint, or to its initial weights.
    Rollback,
    /// A later leader went on from what the shards held.
    Resumed,
    /// A leader learned that a later epoch exists.
    Deposed,
    /// A member was told that it had been declared lost.
    Expelled,
    /// A checkpoint was committed.
    CheckpointCommitted,
    /// A checkpoint could not be completed.
    CheckpointAbandoned,
    /// A process loaded a checkpoint other than the initial weights.
    CheckpointLoaded,
    /// Digests of an audited slot differed.
    AuditMismatch,
    /// A worker that lied was quarantined, and its step repaired.
    WorkerQuarantined,
    /// The only worker lied, and its step was computed again.
    StepRecomputed,
    /// A draining process was released and left.
    Drained,
    /// The run waited at a version, because nobody could take what draining shards held.
    DrainHeld,
}

impl Recovery {
    /// All kinds.
    pub const ALL: [Recovery; 17] = [
        Recovery::SlotsReleased,
        Recovery::SlotsDoubled,
        Recovery::ShardPromoted,
        Recovery::BackupSeeded,
        Recovery::Degraded,
        Recovery::Rollback,
        Recovery::Resumed,
        Recovery::Deposed,
        Recovery::Expelled,
        Recovery::CheckpointCommitted,
        Recovery::CheckpointAbandoned,
        Recovery::CheckpointLoaded,
        Recovery::AuditMismatch,
        Recovery::WorkerQuarantined,
        Recovery::StepRecomputed,
        Recovery::Drained,
        Recovery::DrainHeld,
    ];
}

impl fmt::Display for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What became of the result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Digest {
    /// The run did not get to its end.
    #[default]
    Unfinished,
    /// The last checkpoint has the bits of the undisturbed run.
    Undisturbed,
    /// It has not.
    Differs,
}

/// A fault that happened at a moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Strike {
    /// When, in virtual milliseconds.
    pub at_ms: u64,
    /// What.
    pub fault: Fault,
    /// How.
    pub action: Action,
    /// Whom it met, as of then.
    pub members: Vec<Member>,
    /// How long it took until a leader gave one of them up, if one did.
    pub detected_ms: Option<u64>,
    /// How long it took until the next step was decided, if one was.
    pub recovered_ms: Option<u64>,
}

/// What one seed showed.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// The first invariant that did not hold, and how.
    pub violation: Option<String>,
    /// What became of the result.
    pub digest: Digest,
    /// Faults in the plan.
    pub num_planned: u64,
    /// Those of them that found their moment and their target.
    pub num_struck: u64,
    /// Faults that happened at a moment, in order; conditions that last are only counted.
    pub strikes: Vec<Strike>,
    /// Strikes that the first decision after them has been seen of.
    pub(crate) num_recovered: usize,
    /// When everything healed, in virtual milliseconds.
    pub healed_ms: u64,
    /// Virtual time until the last process was done.
    pub virtual_ms: u64,
    /// Events handled.
    pub num_events: u64,
    /// Steps decided, repeats included.
    pub num_decisions: u64,
    /// Slots leased again.
    pub slots_recomputed: u64,
    /// How often each fault happened.
    pub faults: BTreeMap<Fault, u64>,
    /// How often each recovery happened.
    pub recoveries: BTreeMap<Recovery, u64>,
    /// How often each rare branch was taken.
    pub branches: BTreeMap<Branch, u64>,
}

impl Outcome {
    /// A leader gives a member up.
    pub(crate) fn detected(&mut self, now_ms: u64, member: Member) {
        for strike in self.strikes.iter_mut().rev() {
            if strike.members.contains(&member) {
                strike.detected_ms.get_or_insert(now_ms - strike.at_ms);
                return;
            }
        }
    }

    /// A step is decided.
    pub(crate) fn recovered(&mut self, now_ms: u64) {
        for strike in &mut self.strikes[self.num_recovered..] {
            strike.recovered_ms = Some(now_ms - strike.at_ms);
        }
        self.num_recovered = self.strikes.len();
    }
}
