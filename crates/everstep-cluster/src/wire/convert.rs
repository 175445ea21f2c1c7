//! Between domain types and archived forms.

use std::sync::Arc;

use bytes::Bytes;
use everstep_data::TokenBatch;
use everstep_optim::ComputeDtype;
use everstep_protocol::{
    BlockStatus, Decision, Epoch, GradientReport, Lineage, Member, Message, Placement, Role,
    SlotRange, Status, Step, Task, View, ViewId,
};
use everstep_telemetry::TraceContext;

use super::body::{self, Body};
use super::{Envelope, WireError};
use crate::message::{ClusterMessage, StepMessage};
use crate::topology::{ActorAddress, ActorRole};

pub(super) fn envelope_to_wire(envelope: &Envelope, body: Body) -> body::Envelope {
    let TraceContext {
        trace_id,
        span_id,
        flags,
    } = envelope.trace;
    body::Envelope {
        run_id: envelope.run_id,
        from: address_to_wire(envelope.from),
        from_incarnation: envelope.from_incarnation,
        to: address_to_wire(envelope.to),
        to_incarnation: envelope.to_incarnation,
        trace_id,
        span_id,
        trace_flags: flags,
        body,
    }
}

/// The archived body of a message, and its tensors.
pub(super) fn to_wire(message: ClusterMessage) -> (Body, Option<Bytes>) {
    match message {
        ClusterMessage::Protocol(message) => {
            let payload = super::payload_of(&message);
            (step_to_wire(message), payload)
        }
        ClusterMessage::BatchRequest { step, task } => (
            Body::BatchRequest {
                step: step.0,
                task: task_to_wire(task),
            },
            None,
        ),
        ClusterMessage::Batch { step, task, batch } => (
            Body::Batch {
                step: step.0,
                task: task_to_wire(task),
            },
            Some(batch.to_bytes().into()),
        ),
    }
}

fn step_to_wire(message: StepMessage) -> Body {
    match message {
        Message::Announce { epoch } => Body::Announce { epoch: epoch.0 },
        Message::Hello { epoch, status } => Body::Hello {
            epoch: epoch.0,
            status: status_to_wire(status),
        },
        Message::Expelled { epoch } => Body::Expelled { epoch: epoch.0 },
        Message::View(view) => Body::View(view_to_wire(view)),
        Message::ViewReady { view } => Body::ViewReady {
            epoch: view.epoch.0,
            number: view.number,
        },
        Message::Lease {
            epoch,
            lineage,
            step,
            tasks,
        } => Body::Lease {
            epoch: epoch.0,
            lineage: lineage.0,
            step: step.0,
            tasks: tasks.into_iter().map(task_to_wire).collect(),
        },
        Message::Delivered { view, step, range } => Body::Delivered {
            epoch: view.epoch.0,
            number: view.number,
            step: step.0,
            start: range.start,
            end: range.end,
        },
        Message::Evaluated {
            step,
            chunk,
            loss_sum,
            tokens,
        } => Body::Evaluated {
            step: step.0,
            chunk,
            loss_sum,
            tokens,
        },
        Message::Reduced {
            view,
            step,
            block,
            report,
        } => Body::Reduced {
            epoch: view.epoch.0,
            number: view.number,
            step: step.0,
            block,
            report: report_to_wire(report),
        },
        Message::Decide {
            epoch,
            lineage,
            step,
            decision,
            snapshot,
        } => {
            let Decision {
                apply,
                scale,
                gradient_norm,
                loss,
                tokens,
            } = decision;
            let decision = body::Decision {
                apply,
                scale,
                gradient_norm,
                loss,
                tokens,
            };
            Body::Decide {
                epoch: epoch.0,
                lineage: lineage.0,
                step: step.0,
                decision,
                snapshot,
            }
        }
        Message::Applied { lineage, step } => Body::Applied {
            lineage: lineage.0,
            step: step.0,
        },
        Message::Snapshot {
            epoch,
            version,
            blocks,
        } => Body::Snapshot {
            epoch: epoch.0,
            version: version.0,
            blocks,
        },
        Message::Stored {
            version,
            blocks,
            object,
        } => Body::Stored {
            version: version.0,
            blocks,
            object,
        },
        Message::Finish { epoch } => Body::Finish { epoch: epoch.0 },
        Message::Pull { version, blocks } => Body::Pull {
            version: version.0,
            blocks,
        },
        Message::Parameters {
            version,
            block,
            parameters,
        } => Body::Parameters {
            version: version.0,
            block,
            dtype: dtype_to_wire(parameters.dtype()),
        },
        Message::Partial {
            lineage,
            step,
            range,
            block,
            gradient,
        } => Body::Partial {
            lineage: lineage.0,
            step: step.0,
            start: range.start,
            end: range.end,
            block,
            loss_sum: gradient.loss_sum,
            tokens: gradient.tokens,
        },
        Message::PartialAck {
            lineage,
            step,
            range,
            block,
        } => Body::PartialAck {
            lineage: lineage.0,
            step: step.0,
            start: range.start,
            end: range.end,
            block,
        },
        Message::Replicate {
            lineage,
            step,
            block,
            gradient,
        } => Body::Replicate {
            lineage: lineage.0,
            step: step.0,
            block,
            loss_sum: gradient.loss_sum,
            tokens: gradient.tokens,
        },
        Message::ReplicateAck {
            lineage,
            step,
            block,
        } => Body::ReplicateAck {
            lineage: lineage.0,
            step: step.0,
            block,
        },
        Message::SeedRequest { lineage, block } => Body::SeedRequest {
            lineage: lineage.0,
            block,
        },
        Message::Seed {
            lineage,
            block,
            version,
            last,
            ..
        } => Body::Seed {
            lineage: lineage.0,
            block,
            version: version.0,
            last: last.map(report_to_wire),
        },
        Message::Seeded {
            lineage,
            block,
            version,
        } => Body::Seeded {
            lineage: lineage.0,
            block,
            version: version.0,
        },
    }
}

/// What a validated archive and its payload say.
pub(super) fn from_wire(
    wire: body::Envelope,
    payload: Option<Bytes>,
) -> Result<(Envelope, ClusterMessage), WireError> {
    let envelope = Envelope {
        run_id: wire.run_id,
        from: address_from_wire(&wire.from)?,
        from_incarnation: wire.from_incarnation,
        to: address_from_wire(&wire.to)?,
        to_incarnation: wire.to_incarnation,
        trace: TraceContext {
            trace_id: wire.trace_id,
            span_id: wire.span_id,
            flags: wire.trace_flags,
        },
    };
    let message = match wire.body {
        Body::BatchRequest { step, task } => ClusterMessage::BatchRequest {
            step: Step(step),
            task: task_from_wire(&task)?,
        },
        Body::Batch { step, task } => {
            let batch = TokenBatch::from_bytes(&tensor(payload)?)
                .ok_or_else(|| WireError::Payload("not a batch of tokens".to_owned()))?;
            ClusterMessage::Batch {
                step: Step(step),
                task: task_from_wire(&task)?,
                batch: Arc::new(batch),
            }
        }
        body => ClusterMessage::Protocol(step_from_wire(body, payload)?),
    };
    Ok((envelope, message))
}

fn tensor(payload: Option<Bytes>) -> Result<Bytes, WireError> {
    payload.ok_or_else(|| WireError::Payload("missing".to_owned()))
}

fn step_from_wire(body: Body, payload: Option<Bytes>) -> Result<StepMessage, WireError> {
    Ok(match body {
        Body::Announce { epoch } => Message::Announce {
            epoch: Epoch(epoch),
        },
        Body::Hello { epoch, status } => Message::Hello {
            epoch: Epoch(epoch),
            status: status_from_wire(status)?,
        },
        Body::Expelled { epoch } => Message::Expelled {
            epoch: Epoch(epoch),
        },
        Body::View(view) => Message::View(view_from_wire(view)?),
        Body::ViewReady { epoch, number } => Message::ViewReady {
            view: ViewId {
                epoch: Epoch(epoch),
                number,
            },
        },
        Body::Lease {
            epoch,
            lineage,
            step,
            tasks,
        } => Message::Lease {
            epoch: Epoch(epoch),
            lineage: Lineage(lineage),
            step: Step(step),
            tasks: tasks.iter().map(task_from_wire).collect::<Result<_, _>>()?,
        },
        Body::Delivered {
            epoch,
            number,
            step,
            start,
            end,
        } => Message::Delivered {
            view: ViewId {
                epoch: Epoch(epoch),
                number,
            },
            step: Step(step),
            range: range(start, end)?,
        },
        Body::Evaluated {
            step,
            chunk,
            loss_sum,
            tokens,
        } => Message::Evaluated {
            step: Step(step),
            chunk,
            loss_sum,
            tokens,
        },
        Body::Reduced {
            epoch,
            number,
            step,
            block,
            report,
        } => Message::Reduced {
            view: ViewId {
                epoch: Epoch(epoch),
                number,
            },
            step: Step(step),
            block,
            report: report_from_wire(&report),
        },
        Body::Decide {
            epoch,
            lineage,
            step,
            decision,
            snapshot,
        } => {
            let body::Decision {
                apply,
                scale,
                gradient_norm,
                loss,
                tokens,
            } = decision;
            let decision = Decision {
                apply,
                scale,
                gradient_norm,
                loss,
                tokens,
            };
            Message::Decide {
                epoch: Epoch(epoch),
                lineage: Lineage(lineage),
                step: Step(step),
                decision,
                snapshot,
            }
        }
        Body::Applied { lineage, step } => Message::Applied {
            lineage: Lineage(lineage),
            step: Step(step),
        },
        Body::Snapshot {
            epoch,
            version,
            blocks,
        } => Message::Snapshot {
            epoch: Epoch(epoch),
            version: Step(version),
            blocks,
        },
        Body::Stored {
            version,
            blocks,
            object,
        } => Message::Stored {
            version: Step(version),
            blocks,
            object,
        },
        Body::Finish { epoch } => Message::Finish {
            epoch: Epoch(epoch),
        },
        Body::Pull { version, blocks } => Message::Pull {
            version: Step(version),
            blocks,
        },
        Body::Parameters {
            version,
            block,
            dtype,
        } => Message::Parameters {
            version: Step(version),
            block,
            parameters: super::parameters(tensor(payload)?, dtype)?,
        },
        Body::Partial {
            lineage,
            step,
            start,
            end,
            block,
            loss_sum,
            tokens,
        } => Message::Partial {
            lineage: Lineage(lineage),
            step: Step(step),
            range: range(start, end)?,
            block,
            gradient: super::gradient(tensor(payload)?, loss_sum, tokens)?,
        },
        Body::PartialAck {
            lineage,
            step,
            start,
            end,
            block,
        } => Message::PartialAck {
            lineage: Lineage(lineage),
            step: Step(step),
            range: range(start, end)?,
            block,
        },
        Body::Replicate {
            lineage,
            step,
            block,
            loss_sum,
            tokens,
        } => Message::Replicate {
            lineage: Lineage(lineage),
            step: Step(step),
            block,
            gradient: super::gradient(tensor(payload)?, loss_sum, tokens)?,
        },
        Body::ReplicateAck {
            lineage,
            step,
            block,
        } => Message::ReplicateAck {
            lineage: Lineage(lineage),
            step: Step(step),
            block,
        },
        Body::SeedRequest { lineage, block } => Message::SeedRequest {
            lineage: Lineage(lineage),
            block,
        },
        Body::Seed {
            lineage,
            block,
            version,
            last,
        } => Message::Seed {
            lineage: Lineage(lineage),
            block,
            version: Step(version),
            last: last.as_ref().map(report_from_wire),
            state: super::state(&tensor(payload)?)?,
        },
        Body::Seeded {
            lineage,
            block,
            version,
        } => Message::Seeded {
            lineage: Lineage(lineage),
            block,
            version: Step(version),
        },
        Body::BatchRequest { .. } | Body::Batch { .. } => {
            return Err(WireError::Field {
                field: "body",
                value: 0,
            });
        }
    })
}

fn range(start: u32, end: u32) -> Result<SlotRange, WireError> {
    if start < end {
        Ok(SlotRange { start, end })
    } else {
        Err(WireError::Field {
            field: "range.end",
            value: end.into(),
        })
    }
}

fn role_to_wire(role: ActorRole) -> u8 {
    match role {
        ActorRole::Coordinator => 0,
        ActorRole::Loader => 1,
        ActorRole::Worker => 2,
        ActorRole::Shard => 3,
    }
}

fn role_from_wire(role: u8) -> Result<ActorRole, WireError> {
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

fn address_to_wire(address: ActorAddress) -> body::Address {
    body::Address {
        role: role_to_wire(address.role),
        index: address.index,
    }
}

fn address_from_wire(wire: &body::Address) -> Result<ActorAddress, WireError> {
    Ok(ActorAddress {
        role: role_from_wire(wire.role)?,
        index: wire.index,
    })
}

fn member_to_wire(member: Member) -> body::Member {
    body::Member {
        role: role_to_wire(member.role.into()),
        index: member.index,
        incarnation: member.incarnation,
    }
}

fn member_from_wire(wire: &body::Member) -> Result<Member, WireError> {
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

fn members_from_wire(wire: &[body::Member]) -> Result<Vec<Member>, WireError> {
    wire.iter().map(member_from_wire).collect()
}

fn task_to_wire(task: Task) -> body::Task {
    match task {
        Task::Slot(index) => body::Task { kind: 0, index },
        Task::Evaluate(index) => body::Task { kind: 1, index },
    }
}

fn task_from_wire(wire: &body::Task) -> Result<Task, WireError> {
    match wire.kind {
        0 => Ok(Task::Slot(wire.index)),
        1 => Ok(Task::Evaluate(wire.index)),
        other => Err(WireError::Field {
            field: "task.kind",
            value: other.into(),
        }),
    }
}

fn dtype_to_wire(dtype: ComputeDtype) -> u8 {
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

fn report_to_wire(report: GradientReport) -> body::Report {
    let GradientReport {
        squared_norm,
        finite,
        loss_sum,
        tokens,
    } = report;
    body::Report {
        squared_norm,
        finite,
        loss_sum,
        tokens,
    }
}

fn report_from_wire(wire: &body::Report) -> GradientReport {
    GradientReport {
        squared_norm: wire.squared_norm,
        finite: wire.finite,
        loss_sum: wire.loss_sum,
        tokens: wire.tokens,
    }
}

fn status_to_wire(status: Status) -> body::Status {
    match status {
        Status::Shard { lineage, blocks } => body::Status::Shard {
            lineage: lineage.0,
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

fn status_from_wire(wire: body::Status) -> Result<Status, WireError> {
    Ok(match wire {
        body::Status::Shard { lineage, blocks } => Status::Shard {
            lineage: Lineage(lineage),
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

fn view_to_wire(view: View) -> body::View {
    let members = |members: Vec<Member>| members.into_iter().map(member_to_wire).collect();
    body::View {
        epoch: view.epoch.0,
        number: view.number,
        leader: member_to_wire(view.leader),
        lineage: view.lineage.0,
        restored_from: view.restored_from.0,
        placements: view
            .placements
            .into_iter()
            .map(|placement| body::Placement {
                primary: member_to_wire(placement.primary),
                backups: members(placement.backups),
                joining: members(placement.joining),
            })
            .collect(),
    }
}

fn view_from_wire(wire: body::View) -> Result<View, WireError> {
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
        placements: wire
            .placements
            .iter()
            .map(placement)
            .collect::<Result<_, WireError>>()?,
    })
}
