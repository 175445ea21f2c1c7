//! Rare branches of the protocol's recovery, counted from what members say and do.

use std::fmt;

use crate::summary::COVERAGE_SEEDS_MIN;

/// A branch that only an unlucky run takes. A campaign must have seen each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Branch {
    /// A backup was promoted while the step's gradient was on its way between replicas.
    PromotedWhileReplicating,
    /// A worker sent a partial sum to a second primary, since the first is not primary any more.
    ResentAfterPromotion,
    /// The view changed while a replica was being seeded.
    ViewChangedWhileSeeding,
    /// A replica that counts had a gap in its log and was seeded again.
    GapSeeded,
    /// Replicas were lost again while a rollback was being restored.
    RollbackWhileRestoring,
    /// A leader was lost while it gathered, and the next one took over.
    FailoverWhileGathering,
    /// A leader was lost while shards restored, and the next one took over.
    FailoverWhileRestoring,
    /// A rollback went back to the initial weights.
    RolledBackToStart,
    /// What a dead worker had delivered was in doubt after a promotion, and was computed again.
    DoubtSettled,
    /// A leader that was replaced woke up, or could be reached again.
    DeposedLeaderWoke,
    /// A message of an earlier leader was refused.
    StaleLeaderFenced,
    /// A new leader derived an earlier leader's decision again, for replicas that had not applied it.
    DecisionRederived,
    /// A decision that nobody had logged was logged by the next leader.
    DecisionLoggedLate,
    /// A new leader took over sums that workers held.
    HeldSumsAdopted,
    /// A snapshot was given to another replica, since the one that was to store it is gone.
    SnapshotReassigned,
    /// A partial sum came before its primary had applied the step before.
    EarlyPartial,
    /// A message of a line of state that was given up came late.
    StaleLine,
    /// A shard that had left a line of state was sent back to it, and had to start again.
    LeftLineRejoined,
    /// A member that lives was taken out of a block's replicas, for one that holds less.
    ReplicaTrimmed,
    /// A primary that lives gave a block to its backup.
    PrimaryMoved,
    /// A shard joined while others restored.
    JoinedWhileRestoring,
    /// A coordinator found a lease there that it had tried to create.
    LeaseLost,
    /// A leader found a manifest there that it had tried to create.
    ManifestExisted,
    /// A damaged checkpoint was passed over for the one before.
    OlderCheckpointUsed,
    /// A shard found a damaged object while it loaded.
    DamageFoundWhileLoading,
    /// A step was skipped because its loss was a spike.
    SpikeSkipped,
}

impl Branch {
    /// All of them.
    pub const ALL: [Branch; 26] = [
        Branch::PromotedWhileReplicating,
        Branch::ResentAfterPromotion,
        Branch::ViewChangedWhileSeeding,
        Branch::GapSeeded,
        Branch::RollbackWhileRestoring,
        Branch::FailoverWhileGathering,
        Branch::FailoverWhileRestoring,
        Branch::RolledBackToStart,
        Branch::DoubtSettled,
        Branch::DeposedLeaderWoke,
        Branch::StaleLeaderFenced,
        Branch::DecisionRederived,
        Branch::DecisionLoggedLate,
        Branch::HeldSumsAdopted,
        Branch::SnapshotReassigned,
        Branch::EarlyPartial,
        Branch::StaleLine,
        Branch::LeftLineRejoined,
        Branch::ReplicaTrimmed,
        Branch::PrimaryMoved,
        Branch::JoinedWhileRestoring,
        Branch::LeaseLost,
        Branch::ManifestExisted,
        Branch::OlderCheckpointUsed,
        Branch::DamageFoundWhileLoading,
        Branch::SpikeSkipped,
    ];
}

impl Branch {
    /// Campaigns of at least this many seeds must have taken it: about ten times what one occurrence takes, 5,000 at least.
    pub(crate) fn seeds_min(self) -> u64 {
        match self {
            Branch::LeftLineRejoined => 30_000,
            Branch::DamageFoundWhileLoading => 100_000,
            _ => COVERAGE_SEEDS_MIN,
        }
    }
}

impl fmt::Display for Branch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
