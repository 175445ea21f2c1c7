//! The coordinator: membership, placement, leases, decisions, checkpoints.
//!
//! ```text
//!  standby ──Elected──▶ gathering ──every block has a full replica──▶ training ──last version──▶ finished
//!     ▲                  │    ▲     at one version ≥ high water        ▲   │      committed and
//!     │                  │    │                                        │   │      evaluated
//!     │   nothing, or    │    └──── a block has no replica left ───────│───┤
//!     │   not enough     ▼                                             │   │
//!     │        gathering, CheckpointFound awaited                      │   │
//!     │                   ▼                                            │   │
//!     │               restoring ──every replica has loaded─────────────┘   │
//!     │               (new line of state, from the committed checkpoint)   │
//!     └──────────────────── a higher epoch was seen: Deposed ──────────────┘
//!
//!  one step:  lease ─▶ Delivered… ─▶ Reduced of every block in this view, evaluation chunks ─▶ LogStep, Decide, lease of t + 1
//!  one slot:  free ─▶ leased (once; twice if slow) ─▶ delivered ─▶ free again if its holder died and a primary changed
//! ```
//!
//! Everything here is soft state. What a leader must not forget is in the shards (state, reduced gradients), in the store
//! (checkpoints) and in the metrics log (decided steps); a new leader asks for it.

mod audit;
mod checkpoint;
mod drain;
mod leases;
mod machine;
mod members;
pub mod placement;
mod recovery;
mod shares;
mod step;

pub use machine::{Coordinator, Phase};
pub use placement::Domain;

use crate::audit::AuditPlan;
use crate::ids::{BlockId, Epoch, Lineage, Member, Step};
use crate::message::{Decision, Digest, EvaluationSums, Message, Numerics};

/// What a coordinator knows of the run; the same in every process.
#[derive(Clone, Debug)]
pub struct CoordinatorConfig {
    /// Slots per step (`V`).
    pub num_slots: u32,
    /// Blocks of the layout.
    pub num_blocks: u32,
    /// Steps of the run, at least 1; version `num_steps` is the result.
    pub num_steps: u64,
    /// Replicas wanted per block, the primary included; fewer while shards are missing (then declared degraded).
    pub replication: u32,
    /// A checkpoint is taken of every version that is a multiple of this, and of the last; 0: only of the last.
    pub checkpoint_every: u64,
    /// Versions that are multiples of this, and the last, are evaluated; 0: none.
    pub evaluate_every: u64,
    /// Chunks of an evaluation.
    pub num_evaluation_chunks: u32,
    /// Shards in the topology.
    pub num_shards: u32,
    /// Where each shard runs, by its index; one that is not listed is alone on its node.
    pub shard_domains: Vec<Domain>,
    /// A new leader waits this long for shards that have not said what they hold.
    pub gather_ms: u64,
    /// A lease older than this is given to a second, idle worker too, as long as no slot's time is known; then a multiple of that.
    pub lease_ms: u64,
    /// Unanswered messages are said again after this long.
    pub resend_ms: u64,
    /// Which slots are computed twice.
    pub audit: AuditPlan,
    /// After so many skipped steps in a row the run is given up; 0: never.
    pub skip_limit: u32,
}

/// What happens to a coordinator.
#[derive(Debug)]
pub enum Event<N: Numerics> {
    /// It has won an epoch (store lease or static ledger). It is enough to know the newest checkpoint roughly: nothing is loaded
    /// before `FindCheckpoint` was answered, so that a leader starts without a store as long as the shards hold the state.
    Elected {
        /// The epoch.
        epoch: Epoch,
        /// Version of the newest committed checkpoint that this process knows of, 0 if it knows of none.
        checkpoint: Step,
        /// One past the highest step ever decided, as far as this process can tell.
        high_water: Step,
        /// Workers that this process knows to be quarantined.
        quarantined: Vec<Member>,
    },
    /// Workers that were quarantined earlier, if they are found only after the election.
    Quarantined {
        /// They, in any life.
        workers: Vec<Member>,
    },
    /// A member said something.
    Message {
        /// Who.
        from: Member,
        /// What.
        message: Message<N>,
    },
    /// A member's process died, its connection broke, or it stopped answering.
    Lost {
        /// Who.
        member: Member,
    },
    /// These members shall leave: nothing new is given to them, what they hold is moved, and each is released when nothing refers to it.
    /// Saying it again changes nothing but the time left. Other lives of the same actors are not meant.
    Drain {
        /// Who; coordinators among them are left to their shell.
        members: Vec<Member>,
        /// Seconds until they are taken away, if that is so.
        seconds_left: Option<u64>,
    },
    /// The shell's clock says that a checkpoint is due: the next version is checkpointed.
    CheckpointDue,
    /// The manifest that `CommitManifest` asked for is committed (or was already).
    ManifestCommitted {
        /// The version.
        version: Step,
    },
    /// The manifest that `CommitManifest` asked for cannot be committed: objects that it names are gone.
    ManifestRefused {
        /// The version.
        version: Step,
    },
    /// The answer to `FindCheckpoint`.
    CheckpointFound {
        /// Version of the newest checkpoint that is intact, 0 if there is none (initial weights).
        version: Step,
    },
    /// Time passed.
    Tick,
}

/// What a coordinator wants done.
#[derive(Debug)]
pub enum Effect<N: Numerics> {
    /// Say something to a member.
    Send {
        /// To whom.
        to: Member,
        /// What.
        message: Message<N>,
    },
    /// Say it to every actor of the topology that can be reached, known member or not.
    Broadcast {
        /// What.
        message: Message<N>,
    },
    /// A step is decided: log its metrics before anything else is done. Never asked twice for a step in one epoch, but a new
    /// leader may ask again.
    LogStep {
        /// The step.
        step: Step,
        /// Its decision.
        decision: Decision,
    },
    /// All chunks of an evaluation are here.
    LogEvaluation {
        /// The version.
        version: Step,
        /// Of all chunks.
        sums: EvaluationSums,
    },
    /// Every object of a checkpoint is stored: write its manifest, then say `ManifestCommitted`.
    CommitManifest {
        /// The version.
        version: Step,
        /// What the shards said of their objects.
        objects: Vec<Vec<u8>>,
    },
    /// The state must come from a checkpoint: find the newest one that is intact, however long the store takes, then say
    /// `CheckpointFound`. Asked again, an earlier search that has not ended is void.
    FindCheckpoint,
    /// Nothing refers to a draining member any more: it may go. Said again until it is gone.
    Release {
        /// Who.
        member: Member,
    },
    /// Something that the event log should tell.
    Note(Note),
    /// The last version is checkpointed and committed. The run is over.
    Finished,
    /// So many steps in a row were skipped that the run is not worth going on. Nothing is decided any more; every leader comes to this.
    GaveUp {
        /// The step that is not decided.
        step: Step,
        /// Steps skipped in a row before it.
        num_skipped: u32,
    },
    /// A higher epoch exists: this coordinator no longer leads.
    Deposed {
        /// The epoch that was seen.
        by: Epoch,
    },
}

/// Facts for the event log and the status.
#[derive(Clone, Debug, PartialEq)]
pub enum Note {
    /// A member said hello.
    MemberJoined {
        /// Who.
        member: Member,
    },
    /// A member is gone.
    MemberLost {
        /// Who.
        member: Member,
    },
    /// A released member is gone, as it should be.
    MemberLeft {
        /// Who.
        member: Member,
    },
    /// A member begins to drain.
    DrainStarted {
        /// Who.
        member: Member,
    },
    /// A draining member is released.
    DrainFinished {
        /// Who.
        member: Member,
        /// How long it took.
        took_ms: u64,
        /// Blocks that it held and others hold now.
        num_moved: u32,
    },
    /// Nobody could take what draining shards hold: the run waits at a version that is being committed.
    DrainHolds {
        /// The version.
        version: Step,
    },
    /// A life that was declared lost spoke: nothing came of it, and it is told to end.
    Expelled {
        /// Who.
        member: Member,
    },
    /// A leader that is deposed spoke as if it led.
    Refused {
        /// Who.
        from: Member,
        /// The epoch that it believes to lead.
        epoch: Epoch,
    },
    /// Slots of a step were leased again because their holder is gone or slow.
    SlotsReassigned {
        /// The step.
        step: Step,
        /// The slots.
        slots: Vec<u32>,
        /// From whom.
        from: Member,
        /// Whether the holder is lost (otherwise slow).
        lost: bool,
    },
    /// A backup became a block's primary.
    ShardPromoted {
        /// The new primary.
        member: Member,
        /// Its new blocks.
        blocks: Vec<BlockId>,
    },
    /// A replica finished joining.
    BackupSeeded {
        /// The replica.
        member: Member,
        /// Its blocks.
        blocks: Vec<BlockId>,
    },
    /// Fewer replicas than configured hold these blocks.
    Degraded {
        /// The blocks.
        blocks: Vec<BlockId>,
        /// Replicas left of the block that has fewest.
        replicas: u32,
    },
    /// Training goes on in this epoch from `step`.
    Resumed {
        /// The epoch.
        epoch: Epoch,
        /// The step.
        step: Step,
    },
    /// State was lost: the run continues from a checkpoint, on a new line.
    Rollback {
        /// The new line.
        lineage: Lineage,
        /// The checkpoint's version.
        to: Step,
        /// The highest step known before.
        from: Step,
    },
    /// Computations of one slot gave different digests.
    AuditMismatch {
        /// The step.
        step: Step,
        /// The slot.
        slot: u32,
        /// What each of them gave.
        testimonies: Vec<(Member, Digest)>,
    },
    /// A worker's device lied.
    WorkerQuarantined {
        /// Who.
        worker: Member,
        /// The step.
        step: Step,
        /// The slot.
        slot: u32,
        /// What it said.
        lied: Digest,
        /// What the others agree on; `None` if it contradicted itself.
        truth: Option<Digest>,
        /// Whether it is leased nothing any more; otherwise it is the only worker, and what it said of the step is void.
        permanent: bool,
    },
    /// A checkpoint could not be completed; the next one will be.
    CheckpointAbandoned {
        /// The version.
        version: Step,
    },
    /// A checkpoint was given up for a newer one, since the store is slower than checkpoints are due.
    CheckpointSuperseded {
        /// The version.
        version: Step,
        /// The newer one.
        by: Step,
    },
    /// A checkpoint is complete.
    CheckpointCommitted {
        /// The version.
        version: Step,
    },
}

#[cfg(test)]
mod tests;
