//! The parts of messages: members, tasks, reports, statuses and views, to and from their archived forms.

use everstep_optim::ComputeDtype;
use everstep_protocol::policy::History;
use everstep_protocol::{
    BlockStatus, Digest, Epoch, GradientReport, Lineage, Member, Placement, Repair, Role,
    SlotRange, Status, Step, Task, Testimony, View,
};

use super::WireError;
use super::body;
use crate::topology::{ActorAddress, ActorRole};

pub(super) fn range(start: u32, end: u32) -> Result<SlotRange, WireError> {
    if start < end {
        Ok(SlotRange { start, end })
    } else {
        Err(WireError::Field {
            field: "range.end",
            value: end.into(),
        })
    }
}

pub(super) fn role_to_wire(role: ActorRole) -> u8 {
    match role {
        ActorRole::Coordinator => 0,
        ActorRole::Loader => 1,
        ActorRole::Worker => 2,
        ActorRole::Shard => 3,
    }
}

pub(super) fn role_from_wire(role: u8) -> Result<ActorRole, WireError> {
    Ok(match role {
        0 => ActorRole::Coordinator,
        1 => ActorRole::Loader,
        2 => ActorRole::Worker,
        3 => ActorRole::Shard,
        other => {
            return Err(WireError::Field {
                field: "role",
                value: other.into(),
            });
        }
    })
}

pub(super) fn address_to_wire(address: ActorAddress) -> body::Address {
    body::Address {
        role: role_to_wire(address.role),
        index: address.index,
    }
}

pub(super) fn address_from_wire(wire: &body::Address) -> Result<ActorAddress, WireError> {
    Ok(ActorAddress {
        role: role_from_wire(wire.role)?,
        index: wire.index,
    })
}

pub(super) fn member_to_wire(member: Member) -> body::Member {
    body::Member {
        role: role_to_wire(member.role.into()),
        index: member.index,
        incarnation: member.incarnation,
    }
}

pub(super) fn member_from_wire(wire: &body::Member) -> Result<Member, WireError> {
    let role: Option<Role> = role_from_wire(wire.role)?.protocol();
    let role = role.ok_or(WireError::Field {
        field: "member.role",
        value: wire.role.into(),
    })?;
    Ok(Member {
        role,
        index: wire.index,
        incarnation: wire.incarnation,
    })
}

pub(super) fn members_from_wire(wire: &[body::Member]) -> Result<Vec<Member>, WireError> {
    wire.iter().map(member_from_wire).collect()
}

fn members_to_wire(members: Vec<Member>) -> Vec<body::Member> {
    members.into_iter().map(member_to_wire).collect()
}

pub(super) fn testimonies_to_wire(testimonies: Vec<Testimony>) -> Vec<body::Testimony> {
    let to_wire = |testimony: Testimony| body::Testimony {
        slot: testimony.slot,
        worker: member_to_wire(testimony.worker),
        digest: testimony.digest.0,
    };
    testimonies.into_iter().map(to_wire).collect()
}

pub(super) fn testimonies_from_wire(wire: &[body::Testimony]) -> Result<Vec<Testimony>, WireError> {
    let from_wire = |wire: &body::Testimony| {
        Ok(Testimony {
            slot: wire.slot,
            worker: member_from_wire(&wire.worker)?,
            digest: Digest(wire.digest),
        })
    };
    wire.iter().map(from_wire).collect()
}

pub(super) fn task_to_wire(task: Task) -> body::Task {
    match task {
        Task::Slot(index) => body::Task {
            kind: 0,
            index,
            run: 0,
        },
        Task::Audit { slot, run } => body::Task {
            kind: 2,
            index: slot,
            run,
        },
        Task::Evaluate(index) => body::Task {
            kind: 1,
            index,
            run: 0,
        },
    }
}

pub(super) fn task_from_wire(wire: &body::Task) -> Result<Task, WireError> {
    match wire.kind {
        0 => Ok(Task::Slot(wire.index)),
        1 => Ok(Task::Evaluate(wire.index)),
        2 => Ok(Task::Audit {
            slot: wire.index,
            run: wire.run,
        }),
        other => Err(WireError::Field {
            field: "task.kind",
            value: other.into(),
        }),
    }
}

pub(super) fn dtype_to_wire(dtype: ComputeDtype) -> u8 {
    match dtype {
        ComputeDtype::Float32 => 0,
        ComputeDtype::Bfloat16 => 1,
    }
}

pub(super) fn dtype_from_wire(dtype: u8) -> Result<ComputeDtype, WireError> {
    match dtype {
        0 => Ok(ComputeDtype::Float32),
        1 => Ok(ComputeDtype::Bfloat16),
        other => Err(WireError::Field {
            field: "dtype",
            value: other.into(),
        }),
    }
}

pub(super) fn history_to_wire(history: History) -> body::History {
    let History {
        num_losses,
        loss_mean,
        loss_variance,
        num_skipped,
    } = history;
    body::History {
        num_losses,
        num_skipped,
        loss_mean,
        loss_variance,
    }
}

pub(super) fn history_from_wire(wire: &body::History) -> History {
    History {
        num_losses: wire.num_losses,
        loss_mean: wire.loss_mean,
        loss_variance: wire.loss_variance,
        num_skipped: wire.num_skipped,
    }
}

pub(super) fn report_to_wire(report: GradientReport) -> body::Report {
    let GradientReport {
        squared_norm,
        finite,
        loss_sum,
        tokens,
        load_excess,
        history,
    } = report;
    body::Report {
        squared_norm,
        finite,
        loss_sum,
        tokens,
        load_excess,
        history: history_to_wire(history),
    }
}

pub(super) fn report_from_wire(wire: &body::Report) -> GradientReport {
    GradientReport {
        squared_norm: wire.squared_norm,
        finite: wire.finite,
        loss_sum: wire.loss_sum,
        tokens: wire.tokens,
        load_excess: wire.load_excess,
        history: history_from_wire(&wire.history),
    }
}

pub(super) fn status_to_wire(status: Status) -> body::Status {
    match status {
        Status::Shard {
            lineage,
            blocks,
            quarantined,
        } => body::Status::Shard {
            lineage: lineage.0,
            quarantined: members_to_wire(quarantined),
            blocks: blocks
                .into_iter()
                .map(|status| body::BlockStatus {
                    block: status.block,
                    version: status.version.0,
                    last: status.last.map(report_to_wire),
                    reduced: status.reduced.map(report_to_wire),
                })
                .collect(),
        },
        Status::Worker {
            lineage,
            step,
            held,
        } => body::Status::Worker {
            lineage: lineage.0,
            step: step.0,
            held: held
                .into_iter()
                .map(|range| (range.start, range.end))
                .collect(),
        },
    }
}

pub(super) fn status_from_wire(wire: body::Status) -> Result<Status, WireError> {
    Ok(match wire {
        body::Status::Shard {
            lineage,
            blocks,
            quarantined,
        } => Status::Shard {
            lineage: Lineage(lineage),
            quarantined: members_from_wire(&quarantined)?,
            blocks: blocks
                .iter()
                .map(|status| BlockStatus {
                    block: status.block,
                    version: Step(status.version),
                    last: status.last.as_ref().map(report_from_wire),
                    reduced: status.reduced.as_ref().map(report_from_wire),
                })
                .collect(),
        },
        body::Status::Worker {
            lineage,
            step,
            held,
        } => Status::Worker {
            lineage: Lineage(lineage),
            step: Step(step),
            held: held
                .into_iter()
                .map(|(start, end)| range(start, end))
                .collect::<Result<_, _>>()?,
        },
    })
}

pub(super) fn view_to_wire(view: View) -> body::View {
    body::View {
        epoch: view.epoch.0,
        number: view.number,
        leader: member_to_wire(view.leader),
        lineage: view.lineage.0,
        restored_from: view.restored_from.0,
        repair: view.repair.map(|repair| (repair.from.0, repair.recompute)),
        quarantined: members_to_wire(view.quarantined),
        placements: view
            .placements
            .into_iter()
            .map(|placement| body::Placement {
                primary: member_to_wire(placement.primary),
                backups: members_to_wire(placement.backups),
                joining: members_to_wire(placement.joining),
            })
            .collect(),
    }
}

pub(super) fn view_from_wire(wire: body::View) -> Result<View, WireError> {
    let placement = |placement: &body::Placement| {
        Ok(Placement {
            primary: member_from_wire(&placement.primary)?,
            backups: members_from_wire(&placement.backups)?,
            joining: members_from_wire(&placement.joining)?,
        })
    };
    Ok(View {
        epoch: Epoch(wire.epoch),
        number: wire.number,
        leader: member_from_wire(&wire.leader)?,
        lineage: Lineage(wire.lineage),
        restored_from: Step(wire.restored_from),
        repair: wire.repair.map(|(from, recompute)| Repair {
            from: Step(from),
            recompute,
        }),
        quarantined: members_from_wire(&wire.quarantined)?,
        placements: wire
            .placements
            .iter()
            .map(placement)
            .collect::<Result<_, WireError>>()?,
    })
}
