//! What a seed stands for: a topology, a workload, timings, and the faults that are enabled.

use std::collections::BTreeSet;
use std::fmt;

use everstep_protocol::random::{Purpose, Stream};

/// Kinds of faults. A seed enables a random subset; every kind must occur in a campaign.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A worker's process dies and comes back empty.
    CrashWorker,
    /// A shard's process dies and comes back empty.
    CrashShard,
    /// A coordinator's process dies and comes back as standby.
    CrashCoordinator,
    /// All shards die at once: every replica is lost.
    CrashAllShards,
    /// All replicas of one block die, other shards live on.
    CrashBlock,
    /// Everything dies at once.
    CrashAll,
    /// A process dies in the middle of carrying out effects.
    CrashMidway,
    /// A process stands still, then goes on as if nothing had happened.
    Freeze,
    /// Some processes cannot reach the others for a while.
    Partition,
    /// One direction between two processes is cut for a while.
    OneWayCut,
    /// A live member is declared lost.
    FalseSuspicion,
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
    /// A worker computes many times slower than the others.
    SlowWorker,
    /// A shard or worker starts long after the run has begun.
    LateJoin,
    /// The store is slow.
    SlowStore,
}

impl Fault {
    /// All kinds.
    pub const ALL: [Fault; 19] = [
        Fault::CrashWorker,
        Fault::CrashShard,
        Fault::CrashCoordinator,
        Fault::CrashAllShards,
        Fault::CrashBlock,
        Fault::CrashAll,
        Fault::CrashMidway,
        Fault::Freeze,
        Fault::Partition,
        Fault::OneWayCut,
        Fault::FalseSuspicion,
        Fault::Aftershock,
        Fault::Drop,
        Fault::Duplicate,
        Fault::Reorder,
        Fault::Delay,
        Fault::SlowWorker,
        Fault::LateJoin,
        Fault::SlowStore,
    ];

    /// Kinds that strike at a moment; the others are conditions of the whole chaos phase.
    pub(crate) fn strikes(self) -> bool {
        !matches!(
            self,
            Fault::Aftershock
                | Fault::Drop
                | Fault::Duplicate
                | Fault::Reorder
                | Fault::Delay
                | Fault::SlowWorker
                | Fault::LateJoin
                | Fault::SlowStore
        )
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Everything that a seed decides before the run begins.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The seed.
    pub seed: u64,
    /// Workers of the topology.
    pub num_workers: u32,
    /// Shards of the topology.
    pub num_shards: u32,
    /// Coordinators: 1 (static), or a leader and standbys.
    pub num_coordinators: u32,
    /// Slots per step.
    pub num_slots: u32,
    /// Blocks.
    pub num_blocks: u32,
    /// Steps.
    pub num_steps: u64,
    /// Replicas wanted per block.
    pub replication: u32,
    /// Checkpoint period.
    pub checkpoint_every: u64,
    /// Evaluation period.
    pub evaluate_every: u64,
    /// Chunks of an evaluation.
    pub num_chunks: u32,
    /// Whether worker 0 and shard 0 share a process.
    pub colocated: bool,
    /// Whether every coordinator reads the same metrics log; otherwise each knows only the steps that it logged itself.
    pub shares_log: bool,
    /// Longest ordinary message delay.
    pub latency_max_ms: u64,
    /// Longest additional delay of a whole block on its way to a joining replica.
    pub seed_max_ms: u64,
    /// Longest computation of one task on an ordinary worker.
    pub compute_max_ms: u64,
    /// Longest store operation.
    pub store_max_ms: u64,
    /// Enabled faults.
    pub faults: BTreeSet<Fault>,
    /// When each strike happens.
    pub strikes: Vec<(u64, Fault)>,
    /// When chaos ends and everything heals.
    pub chaos_ms: u64,
    /// Share of messages that vanish, in thousandths.
    pub drop_permille: u64,
    /// Share of messages that arrive twice, in thousandths.
    pub duplicate_permille: u64,
}

/// Repeats of unanswered messages, in the simulated cluster.
pub(crate) const RESEND_MS: u64 = 50;
/// A lease older than this goes to an idle worker too.
pub(crate) const LEASE_MS: u64 = 400;
/// A new leader waits this long for shards.
pub(crate) const GATHER_MS: u64 = 300;

impl Scenario {
    /// The scenario of a seed, always the same.
    pub fn new(seed: u64) -> Self {
        let mut random = Stream::new(seed, Purpose::Fault, &[0]);
        let mut pick = |low: u64, high: u64| low + random.below(high - low + 1);
        let num_shards = pick(1, 4) as u32;
        let num_steps = pick(2, 12);
        let compute_max_ms = pick(2, 20);
        let num_slots = pick(1, 20) as u32;
        let num_workers = pick(1, 4) as u32;
        let faults: BTreeSet<Fault> = match pick(0, 9) {
            // Undisturbed runs, and runs with everything, are scenarios too.
            0 => BTreeSet::new(),
            1 => Fault::ALL.into_iter().collect(),
            _ => Fault::ALL.into_iter().filter(|_| pick(0, 3) == 0).collect(),
        };
        // About as long as the undisturbed run, so that strikes meet it at every stage, and sometimes much longer.
        let per_step_ms =
            20 + compute_max_ms * u64::from(num_slots).div_ceil(u64::from(num_workers));
        let chaos_ms = if faults.is_empty() {
            0
        } else {
            num_steps * per_step_ms * pick(1, 4) + pick(0, 500)
        };
        let striking: Vec<Fault> = faults
            .iter()
            .copied()
            .filter(|fault| fault.strikes())
            .collect();
        let num_strikes = if striking.is_empty() { 0 } else { pick(1, 12) };
        let mut strikes: Vec<(u64, Fault)> = (0..num_strikes)
            .map(|_| {
                let kind = striking[pick(0, striking.len() as u64 - 1) as usize];
                (pick(0, chaos_ms), kind)
            })
            .collect();
        strikes.sort();
        Self {
            seed,
            num_workers,
            num_shards,
            num_coordinators: pick(1, 3) as u32,
            num_slots,
            num_blocks: pick(1, 5) as u32,
            num_steps,
            replication: pick(1, 3) as u32,
            checkpoint_every: pick(0, 5),
            evaluate_every: pick(0, 4),
            num_chunks: pick(1, 5) as u32,
            colocated: pick(0, 3) == 0,
            shares_log: pick(0, 3) != 0,
            latency_max_ms: pick(1, 10),
            seed_max_ms: if pick(0, 2) == 0 { 300 } else { 0 },
            compute_max_ms,
            store_max_ms: if faults.contains(&Fault::SlowStore) {
                pick(200, 1500)
            } else {
                pick(5, 60)
            },
            chaos_ms,
            drop_permille: if faults.contains(&Fault::Drop) {
                pick(10, 250)
            } else {
                0
            },
            duplicate_permille: if faults.contains(&Fault::Duplicate) {
                pick(10, 300)
            } else {
                0
            },
            faults,
            strikes,
        }
    }
}
