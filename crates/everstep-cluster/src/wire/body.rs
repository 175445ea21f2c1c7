//! The archived forms. Fixed-width integers only; variants keep their place for ever, new ones are added at the end.

use rkyv::{Archive, Deserialize, Serialize};

#[derive(Archive, Serialize, Deserialize, Debug)]
pub(super) struct Envelope {
    pub(super) run_id: u64,
    pub(super) from: Address,
    pub(super) from_incarnation: u64,
    pub(super) to: Address,
    pub(super) to_incarnation: Option<u64>,
    pub(super) trace_id: [u8; 16],
    pub(super) span_id: [u8; 8],
    pub(super) trace_flags: u8,
    pub(super) body: Body,
}

#[derive(Archive, Serialize, Deserialize, Debug)]
pub(super) struct Address {
    pub(super) role: u8,
    pub(super) index: u32,
}

#[derive(Archive, Serialize, Deserialize, Debug)]
pub(super) struct Member {
    pub(super) role: u8,
    pub(super) index: u32,
    pub(super) incarnation: u64,
}

#[derive(Archive, Serialize, Deserialize, Debug)]
pub(super) struct History {
    pub(super) num_losses: u32,
    pub(super) num_skipped: u32,
    pub(super) loss_mean: f64,
    pub(super) loss_variance: f64,
}

#[derive(Archive, Serialize, Deserialize, Debug)]
pub(super) struct Report {
    pub(super) squared_norm: f64,
    pub(super) finite: bool,
    pub(super) loss_sum: f64,
    pub(super) tokens: u64,
    pub(super) load_excess: f64,
    pub(super) history: History,
}

#[derive(Archive, Serialize, Deserialize, Debug)]
pub(super) struct BlockStatus {
    pub(super) block: u32,
    pub(super) version: u64,
    pub(super) last: Option<Report>,
    pub(super) reduced: Option<Report>,
}

#[derive(Archive, Serialize, Deserialize, Debug)]
pub(super) enum Status {
    Shard {
        lineage: u64,
        blocks: Vec<BlockStatus>,
        quarantined: Vec<Member>,
    },
    Worker {
        lineage: u64,
        step: u64,
        held: Vec<(u32, u32)>,
    },
}

#[derive(Archive, Serialize, Deserialize, Debug)]
pub(super) struct Placement {
    pub(super) primary: Member,
    pub(super) backups: Vec<Member>,
    pub(super) joining: Vec<Member>,
}

#[derive(Archive, Serialize, Deserialize, Debug)]
pub(super) struct View {
    pub(super) epoch: u64,
    pub(super) number: u64,
    pub(super) leader: Member,
    pub(super) lineage: u64,
    pub(super) restored_from: u64,
    /// Step from which sums are void, and whether gradients are void too.
    pub(super) repair: Option<(u64, bool)>,
    pub(super) quarantined: Vec<Member>,
    pub(super) placements: Vec<Placement>,
}

#[derive(Archive, Serialize, Deserialize, Debug)]
pub(super) struct Task {
    /// 0: slot, 1: evaluation chunk, 2: audit of a slot.
    pub(super) kind: u8,
    pub(super) index: u32,
    /// Of an audit, else 0.
    pub(super) run: u32,
}

#[derive(Archive, Serialize, Deserialize, Debug)]
pub(super) struct Testimony {
    pub(super) slot: u32,
    pub(super) worker: Member,
    pub(super) digest: [u64; 2],
}

#[derive(Archive, Serialize, Deserialize, Debug)]
pub(super) struct Decision {
    pub(super) apply: bool,
    pub(super) scale: f32,
    pub(super) gradient_norm: f64,
    pub(super) loss: f64,
    pub(super) tokens: u64,
    pub(super) load_excess: f64,
    pub(super) is_spike: bool,
    pub(super) history: History,
}

#[derive(Archive, Serialize, Deserialize, Debug)]
pub(super) enum Body {
    Announce {
        epoch: u64,
    },
    Hello {
        epoch: u64,
        status: Status,
    },
    Expelled {
        epoch: u64,
    },
    View(View),
    ViewReady {
        epoch: u64,
        number: u64,
    },
    Lease {
        epoch: u64,
        lineage: u64,
        step: u64,
        tasks: Vec<Task>,
    },
    Delivered {
        epoch: u64,
        number: u64,
        step: u64,
        start: u32,
        end: u32,
    },
    Evaluated {
        step: u64,
        chunk: u32,
        loss_sum: f64,
        tokens: u64,
        expert_choices: Vec<u64>,
    },
    Reduced {
        epoch: u64,
        number: u64,
        step: u64,
        block: u32,
        report: Report,
        testimonies: Vec<Testimony>,
    },
    Decide {
        epoch: u64,
        number: u64,
        lineage: u64,
        step: u64,
        decision: Decision,
        snapshot: bool,
    },
    Applied {
        lineage: u64,
        step: u64,
    },
    Snapshot {
        epoch: u64,
        version: u64,
        blocks: Vec<u32>,
    },
    Stored {
        version: u64,
        blocks: Vec<u32>,
        object: Vec<u8>,
    },
    Finish {
        epoch: u64,
    },
    Pull {
        version: u64,
        blocks: Vec<u32>,
    },
    Parameters {
        version: u64,
        block: u32,
        dtype: u8,
    },
    Partial {
        lineage: u64,
        step: u64,
        start: u32,
        end: u32,
        block: u32,
        loss_sum: f64,
        tokens: u64,
        digests: Vec<(u32, [u64; 2])>,
    },
    PartialAck {
        lineage: u64,
        step: u64,
        start: u32,
        end: u32,
        block: u32,
    },
    Replicate {
        lineage: u64,
        step: u64,
        block: u32,
        loss_sum: f64,
        tokens: u64,
        testimonies: Vec<Testimony>,
    },
    ReplicateAck {
        lineage: u64,
        step: u64,
        block: u32,
        testimonies: Vec<Testimony>,
    },
    SeedRequest {
        lineage: u64,
        block: u32,
    },
    Seed {
        lineage: u64,
        block: u32,
        version: u64,
        lens: [u32; 4],
        last: Option<Report>,
        history: History,
    },
    Seeded {
        lineage: u64,
        block: u32,
        version: u64,
    },
    BatchRequest {
        step: u64,
        task: Task,
    },
    Batch {
        step: u64,
        task: Task,
    },
    Audited {
        step: u64,
        slot: u32,
        run: u32,
        digest: [u64; 2],
    },
    Drain {
        processes: Vec<(u32, u64)>,
        seconds_left: Option<u64>,
    },
    Released,
    Failed {
        reason: String,
    },
}
