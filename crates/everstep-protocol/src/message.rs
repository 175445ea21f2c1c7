//! What members say to each other, and the payloads they move.

use std::fmt;

use crate::ids::{BlockId, Epoch, Lineage, Member, SlotRange, Step};
use crate::policy::History;
pub use crate::view::{Placement, Repair, ReplicaRole, View, ViewId};

/// The arithmetic behind the protocol. The machines decide when something is summed or applied; this decides what that
/// means. The trainer's implementation works on `f32` blocks, the simulator's on a toy with a known result.
pub trait Numerics {
    /// The gradient of a slot range in one block, with what the decision needs to know of it.
    type Gradient: Clone + fmt::Debug;
    /// One block of parameters in compute dtype: what workers read.
    type Parameters: Clone + fmt::Debug;
    /// One block's whole state: master parameters and optimizer state.
    type State: Clone + fmt::Debug;

    /// The sum of two neighbouring ranges, `left` before `right`.
    fn sum(&self, left: Self::Gradient, right: Self::Gradient) -> Self::Gradient;
    /// What the decision needs to know of a block's complete sum. The replica adds the history of its state.
    fn report(&self, block: BlockId, gradient: &Self::Gradient) -> GradientReport;
    /// The decision on step `step` from the reports of all blocks, in block order. A pure function.
    fn decide(&self, step: Step, reports: &[GradientReport]) -> Decision;
    /// Applies a decided step to a block's state.
    fn apply(
        &self,
        block: BlockId,
        step: Step,
        decision: &Decision,
        gradient: &Self::Gradient,
        state: &mut Self::State,
    );
    /// The parameters that workers read.
    fn parameters(&self, block: BlockId, state: &Self::State) -> Self::Parameters;
    /// What the state says of the steps before its version; the same in every block.
    fn history(&self, state: &Self::State) -> History {
        let _ = state;
        History::default()
    }
    /// Keeps what a decision, to apply or to skip, adds to the history.
    fn remember(&self, decision: &Decision, state: &mut Self::State) {
        let _ = (decision, state);
    }
    /// A digest of a slot's gradient over all blocks, in block order: what audits compare.
    fn digest(&self, gradients: &[Self::Gradient]) -> Digest;
}

/// 128 bits of a digest of a slot's gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u64; 2]);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}{:016x}", self.0[0], self.0[1])
    }
}

/// What a worker's gradient of an audited slot was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Testimony {
    /// The slot.
    pub slot: u32,
    /// The worker that computed it.
    pub worker: Member,
    /// Its digest.
    pub digest: Digest,
}

/// What a primary tells the leader of a block's complete gradient. `loss_sum` and `tokens` are the same in every block's
/// report; they travel with the gradient so that they are summed along the same tree.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GradientReport {
    /// Sum of squares of the gradient of the summed token losses.
    pub squared_norm: f64,
    /// Whether every element is finite.
    pub finite: bool,
    /// Sum of the token losses of all slots, in nats.
    pub loss_sum: f64,
    /// Number of target tokens of all slots.
    pub tokens: u64,
    /// Of a block of routers' biases: its greatest value, by how much the fullest expert's load lies above the mean. Else 0.
    pub load_excess: f64,
    /// What the block's state says of the steps before.
    pub history: History,
}

/// What the shards do with a reduced step; a deterministic function of the blocks' reports.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    /// Whether to apply the update (otherwise the step is skipped and state stays as it is).
    pub apply: bool,
    /// Factor on the gradient sum: 1 / tokens, times the clipping factor.
    pub scale: f32,
    /// Global norm of the mean gradient before clipping.
    pub gradient_norm: f64,
    /// Mean token loss, in nats.
    pub loss: f64,
    /// Number of target tokens.
    pub tokens: u64,
    /// Greatest [`GradientReport::load_excess`].
    pub load_excess: f64,
    /// Whether it is skipped because its loss is a spike.
    pub is_spike: bool,
    /// The history with this step. It is the one before if a spike was skipped, but for the number of skips.
    pub history: History,
}

/// Sums of an evaluation, or of one of its chunks.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EvaluationSums {
    /// Of token losses, in nats.
    pub loss_sum: f64,
    /// Number of target tokens.
    pub tokens: u64,
    /// How often each expert was chosen, layer after layer; empty in a model without.
    pub expert_choices: Vec<u64>,
}

impl EvaluationSums {
    /// Adds those of the next chunk. In chunk order the sums have the same bits whoever computed what.
    pub fn add(&mut self, next: &Self) {
        self.loss_sum += next.loss_sum;
        self.tokens += next.tokens;
        let len = self.expert_choices.len().max(next.expert_choices.len());
        self.expert_choices.resize(len, 0);
        for (sum, next) in self.expert_choices.iter_mut().zip(&next.expert_choices) {
            *sum += next;
        }
    }

    /// Mean token loss, in nats; 0 if there are no tokens.
    pub fn loss(&self) -> f64 {
        match self.tokens {
            0 => 0.0,
            tokens => self.loss_sum / tokens as f64,
        }
    }
}

/// A shard's account of one block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockStatus {
    /// The block.
    pub block: BlockId,
    /// Version of its state: the number of steps applied or skipped.
    pub version: Step,
    /// Report of the step applied last (`version - 1`), if any.
    pub last: Option<GradientReport>,
    /// Report of the reduced gradient of step `version`, if it is here.
    pub reduced: Option<GradientReport>,
}

/// What a member holds, told to a leader that does not know it.
#[derive(Clone, Debug, PartialEq)]
pub enum Status {
    /// A shard's blocks in its line of state.
    Shard {
        /// Its line of state.
        lineage: Lineage,
        /// Its blocks; empty after a start.
        blocks: Vec<BlockStatus>,
        /// Workers that it knows to be quarantined, in any life.
        quarantined: Vec<Member>,
    },
    /// A worker's partial sums that are not known to be committed.
    Worker {
        /// Its line of state.
        lineage: Lineage,
        /// The step they belong to.
        step: Step,
        /// The ranges it holds.
        held: Vec<SlotRange>,
    },
}

impl Status {
    /// The member's line of state.
    pub fn lineage(&self) -> Lineage {
        match self {
            Status::Shard { lineage, .. } | Status::Worker { lineage, .. } => *lineage,
        }
    }
}

/// A unit of work at one version of the parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Task {
    /// Gradient of a slot.
    Slot(u32),
    /// Loss of a chunk of the validation split.
    Evaluate(u32),
    /// Gradient of a slot once more, of which only the digest is told.
    Audit {
        /// The slot.
        slot: u32,
        /// Tells computations of one slot by one worker apart.
        run: u32,
    },
}

/// Everything that members say. Facts that a rollback takes back carry their line of state, so that a late one is told from a new one;
/// parameters and stored objects need none, because version `t` has the same bits on every line.
///
/// A message is for one life of an actor: the shell drops what is addressed to an earlier incarnation.
#[derive(Clone, Debug)]
pub enum Message<N: Numerics> {
    // Leader and members.
    /// Leader to everybody, at its start and as a heartbeat: says who leads. A member that has not answered this epoch answers `Hello`.
    Announce {
        /// The leader's epoch.
        epoch: Epoch,
    },
    /// Member to leader (and, after a member's start, to every coordinator until one leads).
    Hello {
        /// The highest epoch the member has seen.
        epoch: Epoch,
        /// What it holds.
        status: Status,
    },
    /// Leader to a member that was declared lost: it must start again under a new incarnation.
    Expelled {
        /// The leader's epoch.
        epoch: Epoch,
    },
    /// Leader to members.
    View(View),
    /// Member to leader: the view is here and, at a shard, every block that it gives to it as primary or backup. The leader says
    /// the view again until then.
    ViewReady {
        /// The view.
        view: ViewId,
    },
    /// Leader to worker.
    Lease {
        /// The leader's epoch.
        epoch: Epoch,
        /// The line of state.
        lineage: Lineage,
        /// Version of the parameters that the tasks read.
        step: Step,
        /// The tasks.
        tasks: Vec<Task>,
    },
    /// Worker to leader: every block's primary has acknowledged this range.
    Delivered {
        /// The view whose primaries they are.
        view: ViewId,
        /// The step.
        step: Step,
        /// The range.
        range: SlotRange,
    },
    /// Worker to leader: the loss of a validation chunk.
    Evaluated {
        /// Version of the parameters.
        step: Step,
        /// The chunk.
        chunk: u32,
        /// What it gave.
        sums: EvaluationSums,
    },
    /// Worker to leader: the digest of a slot that it was asked to audit.
    Audited {
        /// The step.
        step: Step,
        /// The slot.
        slot: u32,
        /// Which of the computations that were asked for.
        run: u32,
        /// The digest.
        digest: Digest,
    },
    /// Primary to leader: a block's gradient is complete and on all replicas of the view.
    Reduced {
        /// The view in which the replicas are counted.
        view: ViewId,
        /// The step.
        step: Step,
        /// The block.
        block: BlockId,
        /// Its report.
        report: GradientReport,
        /// Whose gradients of audited slots are in the sums of these replicas.
        testimonies: Vec<Testimony>,
    },
    /// Leader to shards and workers: what becomes of a step.
    Decide {
        /// The leader's view.
        view: ViewId,
        /// The line of state.
        lineage: Lineage,
        /// The step.
        step: Step,
        /// What to do.
        decision: Decision,
        /// Whether version `step + 1` is to be snapshotted for a checkpoint.
        snapshot: bool,
    },
    /// Shard to leader: it applied (or skipped) `step` in all its blocks.
    Applied {
        /// The line of state.
        lineage: Lineage,
        /// The step.
        step: Step,
    },
    /// Leader to shard: snapshot these blocks if they are still at `version`.
    Snapshot {
        /// The leader's epoch.
        epoch: Epoch,
        /// The version.
        version: Step,
        /// The blocks.
        blocks: Vec<BlockId>,
    },
    /// Shard to leader: these blocks of a checkpoint are stored; `object` names where (opaque to the protocol).
    Stored {
        /// The checkpoint's version.
        version: Step,
        /// The blocks.
        blocks: Vec<BlockId>,
        /// What the manifest says of the object.
        object: Vec<u8>,
    },
    /// Leader to everybody: the last version is committed, the run is over and processes may stop. A fact, so it is taken from any epoch.
    Finish {
        /// The leader's epoch.
        epoch: Epoch,
    },

    // Workers and shards.
    /// Worker to shard: wants these blocks at `version`; the shard answers when it has that version.
    Pull {
        /// The version.
        version: Step,
        /// The blocks.
        blocks: Vec<BlockId>,
    },
    /// Shard to worker.
    Parameters {
        /// The version.
        version: Step,
        /// The block.
        block: BlockId,
        /// The values.
        parameters: N::Parameters,
    },
    /// Worker to primary: the sum of a slot range.
    Partial {
        /// The line of state.
        lineage: Lineage,
        /// The step.
        step: Step,
        /// The range.
        range: SlotRange,
        /// The block.
        block: BlockId,
        /// The sum.
        gradient: N::Gradient,
        /// Digests of the range's audited slots.
        digests: Vec<(u32, Digest)>,
    },
    /// Primary to worker.
    PartialAck {
        /// The line of state.
        lineage: Lineage,
        /// The step.
        step: Step,
        /// The range.
        range: SlotRange,
        /// The block.
        block: BlockId,
    },

    // Replicas of a block.
    /// Primary to backup (or joining replica): the complete sum.
    Replicate {
        /// The line of state.
        lineage: Lineage,
        /// The step.
        step: Step,
        /// The block.
        block: BlockId,
        /// The sum.
        gradient: N::Gradient,
        /// Whose gradients of audited slots are in it.
        testimonies: Vec<Testimony>,
    },
    /// Backup to primary: it holds the reduced gradient of `step`, or is past it.
    ReplicateAck {
        /// The line of state.
        lineage: Lineage,
        /// The step.
        step: Step,
        /// The block.
        block: BlockId,
        /// Whose gradients of audited slots are in what it holds.
        testimonies: Vec<Testimony>,
    },
    /// Joining or lagging replica to primary: wants a whole block.
    SeedRequest {
        /// The line of state.
        lineage: Lineage,
        /// The block.
        block: BlockId,
    },
    /// Primary to joining replica: a whole block.
    Seed {
        /// The line of state.
        lineage: Lineage,
        /// The block.
        block: BlockId,
        /// Version of the state.
        version: Step,
        /// Report of the step applied last.
        last: Option<GradientReport>,
        /// The state.
        state: N::State,
    },
    /// Joining replica to leader: it follows the log from here and can serve as a backup.
    Seeded {
        /// The line of state.
        lineage: Lineage,
        /// The block.
        block: BlockId,
        /// Version of its state.
        version: Step,
    },
}
