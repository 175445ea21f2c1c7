//! A toy that spells out what was summed and applied, and short names for members and views.

use crate::ids::{BlockId, Epoch, Lineage, Member, Role, Step};
use crate::message::{Decision, Digest, GradientReport, Numerics, Placement, View, ViewId};
use crate::policy::History;
use crate::random::mix;

#[derive(Clone, Debug)]
pub(crate) struct Words;

impl Numerics for Words {
    type Gradient = String;
    type Parameters = String;
    type State = String;

    fn sum(&self, left: String, right: String) -> String {
        format!("({left}{right})")
    }

    fn report(&self, _block: BlockId, gradient: &String) -> GradientReport {
        report(gradient.len() as f64)
    }

    fn decide(&self, step: Step, reports: &[GradientReport]) -> Decision {
        let norm = reports.iter().fold(step.0 as f64, |norm, report| {
            norm * 100.0 + report.squared_norm
        });
        decision(norm)
    }

    fn apply(
        &self,
        block: BlockId,
        step: Step,
        _decision: &Decision,
        gradient: &String,
        state: &mut String,
    ) {
        *state = format!("{state} {block}@{}:{gradient}", step.0);
    }

    fn parameters(&self, _block: BlockId, state: &String) -> String {
        state.clone()
    }

    fn digest(&self, gradients: &[String]) -> Digest {
        let text = gradients.concat();
        let hash = |seed| {
            text.bytes()
                .fold(seed, |hash, byte| mix(hash ^ u64::from(byte)))
        };
        Digest([hash(1), hash(2)])
    }
}

pub(crate) fn report(squared_norm: f64) -> GradientReport {
    GradientReport {
        squared_norm,
        finite: true,
        loss_sum: 0.0,
        tokens: 1,
        load_excess: 0.0,
        history: History::default(),
    }
}

pub(crate) fn decision(gradient_norm: f64) -> Decision {
    Decision {
        apply: true,
        scale: 1.0,
        gradient_norm,
        loss: 0.0,
        tokens: 1,
        load_excess: 0.0,
        is_spike: false,
        history: History::default(),
    }
}

fn member(role: Role, index: u32) -> Member {
    Member {
        role,
        index,
        incarnation: 1,
    }
}

pub(crate) fn coordinator(index: u32) -> Member {
    member(Role::Coordinator, index)
}

pub(crate) fn shard(index: u32) -> Member {
    member(Role::Shard, index)
}

pub(crate) fn worker(index: u32) -> Member {
    member(Role::Worker, index)
}

/// The next life.
pub(crate) fn reborn(member: Member) -> Member {
    Member {
        incarnation: member.incarnation + 1,
        ..member
    }
}

pub(crate) fn placement(primary: u32, backups: &[u32], joining: &[u32]) -> Placement {
    Placement {
        primary: shard(primary),
        backups: backups.iter().copied().map(shard).collect(),
        joining: joining.iter().copied().map(shard).collect(),
    }
}

pub(crate) const LINE: Lineage = Lineage(1 << 40);

/// A view of epoch 1.
pub(crate) fn view(number: u64, placements: Vec<Placement>) -> View {
    View {
        epoch: Epoch(1),
        number,
        leader: coordinator(0),
        lineage: LINE,
        restored_from: Step(0),
        repair: None,
        quarantined: Vec::new(),
        placements,
    }
}

pub(crate) fn view_id(number: u64) -> ViewId {
    ViewId {
        epoch: Epoch(1),
        number,
    }
}
