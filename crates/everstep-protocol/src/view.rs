//! Views: who holds which block, according to one leader.

use crate::ids::{Epoch, Lineage, Member, Step};

/// Who holds a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Reduces, and reports to the leader.
    pub primary: Member,
    /// Hold every reduced gradient before the step is decided.
    pub backups: Vec<Member>,
    /// Are being seeded; nothing waits for them.
    pub joining: Vec<Member>,
}

/// Who does what, from one leader. Ordered by `(epoch, number)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// The leader's epoch.
    pub epoch: Epoch,
    /// Number of the view in this epoch.
    pub number: u64,
    /// The leader.
    pub leader: Member,
    /// The line of state that this view continues.
    pub lineage: Lineage,
    /// Where that line began: a primary or backup that does not hold a block in `lineage` loads it from this checkpoint
    /// (version 0: initial weights).
    pub restored_from: Step,
    /// What the last repair of that line made void, if there was one.
    pub repair: Option<Repair>,
    /// Workers whose devices lied, in the life in which they did. No life of them is leased anything.
    pub quarantined: Vec<Member>,
    /// Placement by block.
    pub placements: Vec<Placement>,
}

/// What a repair makes void.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repair {
    /// Sums of this step, which is not decided, and later ones are void.
    pub from: Step,
    /// Whether workers' gradients are void too.
    pub recompute: bool,
}

impl View {
    /// Its name.
    pub fn id(&self) -> ViewId {
        ViewId {
            epoch: self.epoch,
            number: self.number,
        }
    }

    /// Whether the device of this worker, in any life, has lied.
    pub fn is_quarantined(&self, worker: Member) -> bool {
        self.quarantined.iter().any(|liar| liar.same_actor(&worker))
    }
}

/// What a shard is to a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaRole {
    /// Reduces and reports.
    Primary,
    /// Holds every reduced gradient before the step is decided.
    Backup,
    /// Is being seeded.
    Joining,
}

impl Placement {
    /// The replicas that count: the primary, then the backups.
    pub fn replicas(&self) -> impl Iterator<Item = Member> + '_ {
        std::iter::once(self.primary).chain(self.backups.iter().copied())
    }

    /// Backups, then joining replicas: all that the primary feeds.
    pub fn followers(&self) -> impl Iterator<Item = Member> + '_ {
        self.backups.iter().chain(&self.joining).copied()
    }

    /// The replica that stores this block's part of a checkpoint: the last backup, so that the primary is left alone, else the primary.
    pub fn storer(&self) -> Member {
        self.backups.last().copied().unwrap_or(self.primary)
    }

    /// What `member` is to this block.
    pub fn role_of(&self, member: Member) -> Option<ReplicaRole> {
        if self.primary == member {
            Some(ReplicaRole::Primary)
        } else if self.backups.contains(&member) {
            Some(ReplicaRole::Backup)
        } else if self.joining.contains(&member) {
            Some(ReplicaRole::Joining)
        } else {
            None
        }
    }
}

/// Names a view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ViewId {
    /// The leader's epoch.
    pub epoch: Epoch,
    /// Number of the view in this epoch.
    pub number: u64,
}
