//! A run of the simulator, given from outside: topology, workload, timings and faults.

use std::fmt;

use everstep_protocol::coordinator::Domain;
use everstep_protocol::{BlockId, Role};

use crate::phase::Phase;
use crate::weather::Condition;

mod text;

pub use text::PlanError;

/// Everything about a simulated run but its random draws, which come from the seed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Who takes part.
    pub topology: Topology,
    /// What is computed.
    pub workload: Workload,
    /// How long things take.
    pub timing: Timing,
    /// What goes wrong.
    pub faults: Vec<PlannedFault>,
    /// When chaos ends and everything heals, in virtual milliseconds; `None`: when the last fault has happened and is over.
    pub chaos_ms: Option<u64>,
}

/// Who takes part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Worker processes.
    pub num_workers: u32,
    /// Shard processes.
    pub num_shards: u32,
    /// Coordinators: a leader and standbys.
    pub num_coordinators: u32,
    /// Replicas wanted per block.
    pub replication: u32,
    /// Whether worker 0 and shard 0 share a process.
    pub colocated: bool,
}

impl Topology {
    /// Where the shards run: two on a node, each in its own process.
    pub(crate) fn shard_domains(&self) -> Vec<Domain> {
        (0..self.num_shards)
            .map(|index| Domain {
                node: index / 2,
                process: index,
            })
            .collect()
    }
}

impl Default for Topology {
    fn default() -> Self {
        Self {
            num_workers: 3,
            num_shards: 3,
            num_coordinators: 2,
            replication: 2,
            colocated: false,
        }
    }
}

/// What is computed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Slots per step.
    pub num_slots: u32,
    /// Blocks.
    pub num_blocks: u32,
    /// Steps.
    pub num_steps: u64,
    /// Checkpoint period, in steps; 0: only the last version.
    pub checkpoint_every: u64,
    /// Evaluation period, in steps; 0: none.
    pub evaluate_every: u64,
    /// Chunks of an evaluation.
    pub num_chunks: u32,
    /// Share of slots that are audited, in thousandths.
    pub audit_permille: u64,
}

impl Default for Workload {
    fn default() -> Self {
        Self {
            num_slots: 8,
            num_blocks: 4,
            num_steps: 10,
            checkpoint_every: 4,
            evaluate_every: 0,
            num_chunks: 2,
            audit_permille: 0,
        }
    }
}

/// How long things take, in virtual milliseconds. A member's unanswered message is said again after 50 ms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Longest ordinary message delay.
    pub latency_max_ms: u64,
    /// Longest additional delay of a whole block on its way to a joining replica.
    pub seed_max_ms: u64,
    /// Longest computation of one task.
    pub compute_max_ms: u64,
    /// Longest store operation.
    pub store_max_ms: u64,
    /// Whether every coordinator reads the same metrics log; otherwise each knows only the steps that it logged itself.
    pub shares_log: bool,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            latency_max_ms: 3,
            seed_max_ms: 50,
            compute_max_ms: 10,
            store_max_ms: 30,
            shares_log: true,
        }
    }
}

/// A fault, whom it meets and when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedFault {
    /// What happens.
    pub action: Action,
    /// To whom.
    pub target: Target,
    /// When.
    pub moment: Moment,
    /// Names its random draws, so that they stay the same when other faults are left out.
    pub salt: u64,
}

/// What happens. Those with `for_ms` last that long, in virtual milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// The process dies at once and is started again, empty, after `down_ms` (`None`: 20 to 700 ms).
    Kill {
        /// Time until its agent starts it again.
        down_ms: Option<u64>,
    },
    /// The process dies in the middle of what it does next: some of its messages are sent, the others never.
    KillMidway,
    /// One target process after the other is killed.
    RollingRestart {
        /// Time between two of them.
        pause_ms: u64,
    },
    /// The process stands still, then goes on as if nothing had happened. Longer than 300 ms: it was declared lost meanwhile.
    Freeze {
        /// How long.
        for_ms: u64,
    },
    /// The targets and all other processes cannot reach each other. With `Target::Any`: two random sides.
    Partition {
        /// How long.
        for_ms: u64,
    },
    /// What the targets say reaches nobody else, but they hear the others. With `Target::Any`: one random direction of one pair.
    OneWayCut {
        /// How long.
        for_ms: u64,
    },
    /// A partition that comes and goes.
    Flap {
        /// How long.
        for_ms: u64,
        /// Time of a cut, and of the pause after it.
        period_ms: u64,
    },
    /// Live members are declared lost.
    FalseSuspicion,
    /// Processes are told to leave, and come back later as others.
    Drain,
    /// Messages of the targets' links vanish.
    Drop {
        /// How long.
        for_ms: u64,
        /// Share of messages, in thousandths.
        permille: u64,
    },
    /// Messages of the targets' links arrive twice.
    Duplicate {
        /// How long.
        for_ms: u64,
        /// Share of messages, in thousandths.
        permille: u64,
    },
    /// Messages of the targets' links take very long now and then.
    Delay {
        /// How long.
        for_ms: u64,
        /// Share of messages, in thousandths.
        permille: u64,
    },
    /// Messages of the targets' links overtake each other.
    Reorder {
        /// How long.
        for_ms: u64,
    },
    /// Messages of the targets' links are damaged: the receiver's checksum refuses them, and some tear the connection with all that is on
    /// its way.
    Corrupt {
        /// How long.
        for_ms: u64,
        /// Share of messages, in thousandths.
        permille: u64,
    },
    /// The targets' links are thin: gradients, parameters and blocks take their time one after the other; control messages go first.
    SlowLink {
        /// How long.
        for_ms: u64,
        /// Transfer time of one gradient; a whole block takes four times as long.
        tensor_ms: u64,
    },
    /// Target workers compute `factor` times slower.
    SlowWorker {
        /// How long.
        for_ms: u64,
        /// How many times.
        factor: u64,
    },
    /// Devices of target workers flip a bit of a gradient now and then, in slots that are audited.
    LyingWorker {
        /// How long.
        for_ms: u64,
        /// Share of those slots, in thousandths.
        permille: u64,
    },
    /// The target processes start that long after the others, whatever the fault's moment.
    LateJoin {
        /// When.
        at_ms: u64,
    },
    /// Store operations take up to `max_ms`.
    SlowStore {
        /// How long.
        for_ms: u64,
        /// Longest operation.
        max_ms: u64,
    },
    /// Every store operation fails and is tried again.
    StoreOutage {
        /// How long.
        for_ms: u64,
    },
    /// Store operations succeed, but their answers are lost: they are tried again and find their own work.
    LostReply {
        /// How long.
        for_ms: u64,
        /// Share of operations, in thousandths.
        permille: u64,
    },
    /// Listings of the store show what it held when this began.
    StaleList {
        /// How long.
        for_ms: u64,
    },
    /// All coordinators stand for election at once, whoever leads, and race for the same lease.
    StoreRace,
    /// One object of the newest committed checkpoint (never of the run's last) is damaged for good.
    DamageCheckpoint {
        /// Whether it is gone; otherwise its bytes are wrong.
        missing: bool,
    },
    /// While the cluster recovers from other faults, the next one strikes, up to `times` times.
    Aftershock {
        /// At most so many.
        times: u64,
    },
}

/// Whom a fault meets. A target that does not exist at the moment is not met, and the fault is not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// One random live process.
    Any,
    /// One random live process of a role.
    Role(Role),
    /// One actor's process.
    Actor(Role, u32),
    /// The leader's process.
    Leader,
    /// A standby's process: the one that would stand for election first.
    Successor,
    /// The leader's and the successor's process.
    LeaderAndSuccessor,
    /// The process of a block's primary; `None`: of a random block.
    Primary(Option<BlockId>),
    /// The processes of all replicas of a block; `None`: of a random block.
    Replicas(Option<BlockId>),
    /// All processes of a role.
    AllOf(Role),
    /// All processes.
    All,
    /// The process that the phase of the fault's moment concerns.
    Concerned,
}

/// When a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// At this virtual time, in milliseconds.
    At(u64),
    /// As soon as this many steps are committed.
    Step(u64),
    /// When a phase is reached.
    Phase {
        /// The phase.
        phase: Phase,
        /// Only once this many steps are committed.
        from_step: u64,
        /// Times that it is let pass then.
        skip: u64,
    },
}

impl Plan {
    /// Adds a fault.
    pub fn push(&mut self, action: Action, target: Target, moment: Moment) {
        let salt = self.faults.iter().map(|fault| fault.salt + 1).max();
        self.faults.push(PlannedFault {
            action,
            target,
            moment,
            salt: salt.unwrap_or(0),
        });
    }
}

impl Action {
    /// Whether it is a condition that lasts, rather than a blow.
    pub fn is_condition(&self) -> bool {
        Condition::of(self).is_some() || matches!(self, Action::Aftershock { .. })
    }

    /// How long it lasts, in virtual milliseconds, once it has struck.
    pub fn duration_ms(&self) -> u64 {
        match *self {
            Action::Freeze { for_ms }
            | Action::Partition { for_ms }
            | Action::OneWayCut { for_ms }
            | Action::Flap { for_ms, .. }
            | Action::Drop { for_ms, .. }
            | Action::Duplicate { for_ms, .. }
            | Action::Delay { for_ms, .. }
            | Action::Reorder { for_ms }
            | Action::Corrupt { for_ms, .. }
            | Action::SlowLink { for_ms, .. }
            | Action::SlowWorker { for_ms, .. }
            | Action::LyingWorker { for_ms, .. }
            | Action::SlowStore { for_ms, .. }
            | Action::StoreOutage { for_ms }
            | Action::LostReply { for_ms, .. }
            | Action::StaleList { for_ms } => for_ms,
            Action::LateJoin { at_ms } => at_ms,
            Action::Kill { down_ms } => down_ms.unwrap_or(0),
            // Long enough for a handful of processes.
            Action::RollingRestart { pause_ms } => pause_ms.saturating_mul(12),
            Action::KillMidway
            | Action::FalseSuspicion
            | Action::Drain
            | Action::StoreRace
            | Action::DamageCheckpoint { .. }
            | Action::Aftershock { .. } => 0,
        }
    }
}

impl fmt::Display for PlannedFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        text::write_fault(self, f)
    }
}
