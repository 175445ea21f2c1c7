//! Phases of the protocol at which a fault can be aimed.

use std::fmt;
use std::str::FromStr;

/// A phase of the protocol. The member that brings it about is the one it concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// A lease is on its way; it concerns its worker.
    LeaseSent,
    /// A partial sum is on its way to a primary; it concerns the worker.
    PartialPushed,
    /// A reduced gradient is on its way to a backup; it concerns the primary.
    Replicating,
    /// The last block's report is on its way to the leader; it concerns that block's primary.
    AllReduced,
    /// A step is decided and applied nowhere; it concerns the leader.
    Decided,
    /// A snapshot is on its way to the store; it concerns the shard.
    Snapshot,
    /// A manifest is being written; it concerns the leader.
    Manifest,
    /// A coordinator tries to win an epoch; it concerns that one.
    Election,
    /// A leader gathers what the members hold; it concerns the leader.
    Gathering,
    /// A shard loads its blocks, from a checkpoint or from initial weights; it concerns the shard.
    Restoring,
    /// A whole block is on its way to a joining replica; it concerns the replica.
    Seeding,
    /// A backup was made primary; it concerns the new primary.
    Promotion,
}

impl Phase {
    /// All of them, in the order of a step, then of a recovery.
    pub const ALL: [Phase; 12] = [
        Phase::LeaseSent,
        Phase::PartialPushed,
        Phase::Replicating,
        Phase::AllReduced,
        Phase::Decided,
        Phase::Snapshot,
        Phase::Manifest,
        Phase::Election,
        Phase::Gathering,
        Phase::Restoring,
        Phase::Seeding,
        Phase::Promotion,
    ];

    /// Its name in plans and scenario files.
    pub fn name(self) -> &'static str {
        match self {
            Phase::LeaseSent => "lease-sent",
            Phase::PartialPushed => "partial-pushed",
            Phase::Replicating => "replicating",
            Phase::AllReduced => "all-reduced",
            Phase::Decided => "decided",
            Phase::Snapshot => "snapshot",
            Phase::Manifest => "manifest",
            Phase::Election => "election",
            Phase::Gathering => "gathering",
            Phase::Restoring => "restoring",
            Phase::Seeding => "seeding",
            Phase::Promotion => "promotion",
        }
    }

    pub(crate) fn bit(self) -> u32 {
        1 << self as u32
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Phase {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Phase::ALL
            .into_iter()
            .find(|phase| phase.name() == text)
            .ok_or_else(|| {
                let names: Vec<&str> = Phase::ALL.iter().map(|phase| phase.name()).collect();
                format!("unknown phase `{text}`; one of {}", names.join(", "))
            })
    }
}
