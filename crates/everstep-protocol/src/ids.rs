//! Identifiers. All are plain numbers with a meaning; none is reused.

use std::fmt;

/// What an actor does in the step protocol. Loaders and checkpointers take no part in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Leads or stands by.
    Coordinator,
    /// Computes slots.
    Worker,
    /// Owns replicas of blocks.
    Shard,
}

/// One life of one actor. A restart, of the actor or of its process, is a new member with a higher incarnation,
/// and starts empty; members that were declared lost never come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    /// Role.
    pub role: Role,
    /// Number of the actor among those of its role in the topology.
    pub index: u32,
    /// Which life it is; grows with every restart.
    pub incarnation: u64,
}

impl Member {
    /// Whether both are lives of the same actor.
    pub fn same_actor(&self, other: &Member) -> bool {
        self.role == other.role && self.index == other.index
    }
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let role = match self.role {
            Role::Coordinator => "coordinator",
            Role::Worker => "worker",
            Role::Shard => "shard",
        };
        write!(f, "{role}-{}#{}", self.index, self.incarnation)
    }
}

/// A term of leadership. Every message of a leader carries it; older ones are refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

/// An optimizer step, counted from 0. Version `t` of the parameters is what step `t` reads; applying step `t` makes version `t + 1`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Step(pub u64);

impl Step {
    /// The step after this one.
    pub fn next(self) -> Step {
        Step(self.0 + 1)
    }
}

/// A line of state. A declared rollback begins a new one; shards that still hold another line's state are empty in this one.
///
/// A repair continues a line under the next number: state stays, what was summed of the undecided step is void.
/// Bits, from the top: epoch, rollback in this epoch ([`Self::PART_BITS`]), repair of this line ([`Self::PART_BITS`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lineage(pub u64);

impl Lineage {
    /// Bits of the number of a rollback in its epoch, and of a repair in its line.
    pub const PART_BITS: u32 = 20;

    /// The line that the `rollback`-th rollback of an epoch begins.
    pub fn new(epoch: Epoch, rollback: u64) -> Self {
        Self((epoch.0 << (2 * Self::PART_BITS)) | (rollback << Self::PART_BITS))
    }

    /// The epoch in which it began.
    pub fn epoch(self) -> Epoch {
        Epoch(self.0 >> (2 * Self::PART_BITS))
    }

    /// How often it was repaired.
    pub fn repairs(self) -> u64 {
        self.0 & ((1 << Self::PART_BITS) - 1)
    }

    /// The line before any repair: lines with equal roots share their decided steps.
    pub fn root(self) -> Self {
        Self(self.0 - self.repairs())
    }

    /// The line after one more repair.
    pub fn repaired(self) -> Self {
        Self(self.0 + 1)
    }
}

/// Number of a block in the run's layout.
pub type BlockId = u32;

/// An aligned range of slots: the leaves `start..end` under one node of the canonical tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotRange {
    /// First slot.
    pub start: u32,
    /// One past the last slot.
    pub end: u32,
}
