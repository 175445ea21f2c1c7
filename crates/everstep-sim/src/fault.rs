//! Kinds of faults, as they are counted.

use std::fmt;

use everstep_protocol::Role;

use crate::phase::Phase;
use crate::plan::{Action, Target};

/// Kinds of faults. A seed enables a random subset; every kind must occur in a campaign.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A worker's process dies and comes back empty.
    KillWorker,
    /// A shard's process dies and comes back empty.
    KillShard,
    /// A coordinator's process, leading or not, dies and comes back as standby.
    KillCoordinator,
    /// The leader's process dies.
    KillLeader,
    /// The leader's and its likely successor's process die at once.
    KillLeaderAndSuccessor,
    /// All workers die at once.
    KillAllWorkers,
    /// All shards die at once: every replica is lost.
    KillAllShards,
    /// All coordinators die at once.
    KillAllCoordinators,
    /// All replicas of one block die, other shards live on.
    KillBlock,
    /// Everything dies at once.
    KillAll,
    /// A process dies in the middle of carrying out effects.
    KillMidway,
    /// One process after the other is killed.
    RollingRestart,
    /// A fault was aimed at a phase of the protocol, and met it.
    InPhase(Phase),
    /// A process stands still, then goes on as if nothing had happened.
    Freeze,
    /// A process that was declared lost while it stood still wakes up.
    Zombie,
    /// A leader that was replaced while it stood still wakes up.
    ZombieLeader,
    /// Some processes cannot reach the others for a while.
    Partition,
    /// One direction is cut for a while.
    OneWayCut,
    /// A partition comes and goes.
    Flap,
    /// A live member is declared lost.
    FalseSuspicion,
    /// A process is told to leave, and comes back later as another.
    Drain,
    /// While the cluster recovers from one fault, the next one strikes.
    Aftershock,
    /// Messages vanish.
    Drop,
    /// Messages arrive twice.
    Duplicate,
    /// Messages overtake each other.
    Reorder,
    /// Messages take very long now and then.
    Delay,
    /// Messages are damaged on their way, and refused.
    Corrupt,
    /// A damaged message tears its connection with all that is on its way.
    Tear,
    /// Tensors crawl over thin links.
    SlowLink,
    /// A worker computes many times slower than the others.
    SlowWorker,
    /// A worker's device flips a bit of audited slots' gradients, another one each time.
    LyingWorker,
    /// A process starts long after the run has begun.
    LateJoin,
    /// The store is slow.
    SlowStore,
    /// Store operations fail for a while.
    StoreOutage,
    /// A store operation succeeds and its answer is lost.
    LostReply,
    /// A listing of the store is out of date.
    StaleList,
    /// Two coordinators try to create the same lease.
    LeaseRace,
    /// A committed checkpoint has an object with wrong bytes.
    DamagedObject,
    /// A committed checkpoint lacks an object.
    MissingObject,
}

impl Fault {
    /// All kinds.
    pub fn all() -> impl Iterator<Item = Fault> {
        const PLAIN: [Fault; 38] = [
            Fault::KillWorker,
            Fault::KillShard,
            Fault::KillCoordinator,
            Fault::KillLeader,
            Fault::KillLeaderAndSuccessor,
            Fault::KillAllWorkers,
            Fault::KillAllShards,
            Fault::KillAllCoordinators,
            Fault::KillBlock,
            Fault::KillAll,
            Fault::KillMidway,
            Fault::RollingRestart,
            Fault::Freeze,
            Fault::Zombie,
            Fault::ZombieLeader,
            Fault::Partition,
            Fault::OneWayCut,
            Fault::Flap,
            Fault::FalseSuspicion,
            Fault::Drain,
            Fault::Aftershock,
            Fault::Drop,
            Fault::Duplicate,
            Fault::Reorder,
            Fault::Delay,
            Fault::Corrupt,
            Fault::Tear,
            Fault::SlowLink,
            Fault::SlowWorker,
            Fault::LyingWorker,
            Fault::LateJoin,
            Fault::SlowStore,
            Fault::StoreOutage,
            Fault::LostReply,
            Fault::StaleList,
            Fault::LeaseRace,
            Fault::DamagedObject,
            Fault::MissingObject,
        ];
        PLAIN
            .into_iter()
            .chain(Phase::ALL.into_iter().map(Fault::InPhase))
    }

    /// What a strike is counted as when it has met `role` (of the first process, if several); `None` for what is counted when it happens.
    pub(crate) fn of(action: &Action, target: Target, role: Role) -> Option<Fault> {
        Some(match action {
            Action::Kill { .. } => match target {
                Target::Leader => Fault::KillLeader,
                Target::LeaderAndSuccessor => Fault::KillLeaderAndSuccessor,
                Target::Replicas(_) => Fault::KillBlock,
                Target::AllOf(Role::Worker) => Fault::KillAllWorkers,
                Target::AllOf(Role::Shard) => Fault::KillAllShards,
                Target::AllOf(Role::Coordinator) => Fault::KillAllCoordinators,
                Target::All => Fault::KillAll,
                Target::Role(role) | Target::Actor(role, _) => Self::killed(role),
                Target::Primary(_) => Fault::KillShard,
                Target::Successor => Fault::KillCoordinator,
                Target::Any | Target::Concerned => Self::killed(role),
            },
            Action::RollingRestart { .. } => Fault::RollingRestart,
            Action::Freeze { .. } => Fault::Freeze,
            Action::Partition { .. } => Fault::Partition,
            Action::OneWayCut { .. } => Fault::OneWayCut,
            Action::Flap { .. } => Fault::Flap,
            Action::FalseSuspicion => Fault::FalseSuspicion,
            Action::Drain => Fault::Drain,
            Action::Reorder { .. } => Fault::Reorder,
            Action::SlowStore { .. } => Fault::SlowStore,
            Action::LateJoin { .. } => Fault::LateJoin,
            Action::DamageCheckpoint { missing: true } => Fault::MissingObject,
            Action::DamageCheckpoint { missing: false } => Fault::DamagedObject,
            Action::KillMidway
            | Action::Drop { .. }
            | Action::Duplicate { .. }
            | Action::Delay { .. }
            | Action::Corrupt { .. }
            | Action::SlowLink { .. }
            | Action::SlowWorker { .. }
            | Action::LyingWorker { .. }
            | Action::StoreOutage { .. }
            | Action::LostReply { .. }
            | Action::StaleList { .. }
            | Action::StoreRace
            | Action::Aftershock { .. } => return None,
        })
    }

    fn killed(role: Role) -> Fault {
        match role {
            Role::Worker => Fault::KillWorker,
            Role::Shard => Fault::KillShard,
            Role::Coordinator => Fault::KillCoordinator,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::InPhase(phase) => write!(f, "in phase {phase}"),
            other => fmt::Debug::fmt(other, f),
        }
    }
}
