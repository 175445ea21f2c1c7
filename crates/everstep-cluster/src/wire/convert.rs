//! Between domain types and archived forms.

use std::sync::Arc;

use bytes::Bytes;
use everstep_data::TokenBatch;
use everstep_protocol::{Decision, Digest, Epoch, EvaluationSums, Lineage, Message, Step, ViewId};
use everstep_telemetry::TraceContext;

use super::body::{self, Body};
use super::parts::{
    address_from_wire, address_to_wire, dtype_to_wire, history_from_wire, history_to_wire, range,
    report_from_wire, report_to_wire, status_from_wire, status_to_wire, task_from_wire,
    task_to_wire, testimonies_from_wire, testimonies_to_wire, view_from_wire, view_to_wire,
};
use super::{Envelope, WireError};
use crate::message::{ClusterMessage, StepMessage};

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
        ClusterMessage::Failed { reason } => (Body::Failed { reason }, None),
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
        ClusterMessage::Drain {
            processes,
            seconds_left,
        } => (
            Body::Drain {
                processes,
                seconds_left,
            },
            None,
        ),
        ClusterMessage::Released => (Body::Released, None),
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
        Message::Evaluated { step, chunk, sums } => Body::Evaluated {
            step: step.0,
            chunk,
            loss_sum: sums.loss_sum,
            tokens: sums.tokens,
            expert_choices: sums.expert_choices,
        },
        Message::Reduced {
            view,
            step,
            block,
            report,
            testimonies,
        } => Body::Reduced {
            epoch: view.epoch.0,
            number: view.number,
            step: step.0,
            block,
            report: report_to_wire(report),
            testimonies: testimonies_to_wire(testimonies),
        },
        Message::Audited {
            step,
            slot,
            run,
            digest,
        } => Body::Audited {
            step: step.0,
            slot,
            run,
            digest: digest.0,
        },
        Message::Decide {
            view,
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
                load_excess,
                is_spike,
                history,
            } = decision;
            let decision = body::Decision {
                apply,
                scale,
                gradient_norm,
                loss,
                tokens,
                load_excess,
                is_spike,
                history: history_to_wire(history),
            };
            Body::Decide {
                epoch: view.epoch.0,
                number: view.number,
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
            digests,
        } => Body::Partial {
            lineage: lineage.0,
            step: step.0,
            start: range.start,
            end: range.end,
            block,
            loss_sum: gradient.loss_sum,
            tokens: gradient.tokens,
            digests: digests
                .into_iter()
                .map(|(slot, digest)| (slot, digest.0))
                .collect(),
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
            testimonies,
        } => Body::Replicate {
            lineage: lineage.0,
            step: step.0,
            block,
            loss_sum: gradient.loss_sum,
            tokens: gradient.tokens,
            testimonies: testimonies_to_wire(testimonies),
        },
        Message::ReplicateAck {
            lineage,
            step,
            block,
            testimonies,
        } => Body::ReplicateAck {
            lineage: lineage.0,
            step: step.0,
            block,
            testimonies: testimonies_to_wire(testimonies),
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
            state,
        } => Body::Seed {
            lineage: lineage.0,
            block,
            version: version.0,
            // A block is far below 2^32 values: its frame has its size in 32 bits.
            lens: state.parts().map(|part| part.len() as u32),
            last: last.map(report_to_wire),
            history: history_to_wire(state.history),
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
        Body::Drain {
            processes,
            seconds_left,
        } => ClusterMessage::Drain {
            processes,
            seconds_left,
        },
        Body::Released => ClusterMessage::Released,
        Body::Failed { reason } => ClusterMessage::Failed { reason },
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
            expert_choices,
        } => Message::Evaluated {
            step: Step(step),
            chunk,
            sums: EvaluationSums {
                loss_sum,
                tokens,
                expert_choices,
            },
        },
        Body::Reduced {
            epoch,
            number,
            step,
            block,
            report,
            testimonies,
        } => Message::Reduced {
            view: ViewId {
                epoch: Epoch(epoch),
                number,
            },
            step: Step(step),
            block,
            report: report_from_wire(&report),
            testimonies: testimonies_from_wire(&testimonies)?,
        },
        Body::Audited {
            step,
            slot,
            run,
            digest,
        } => Message::Audited {
            step: Step(step),
            slot,
            run,
            digest: Digest(digest),
        },
        Body::Decide {
            epoch,
            number,
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
                load_excess,
                is_spike,
                history,
            } = decision;
            let decision = Decision {
                apply,
                scale,
                gradient_norm,
                loss,
                tokens,
                load_excess,
                is_spike,
                history: history_from_wire(&history),
            };
            Message::Decide {
                view: ViewId {
                    epoch: Epoch(epoch),
                    number,
                },
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
            digests,
        } => Message::Partial {
            lineage: Lineage(lineage),
            step: Step(step),
            range: range(start, end)?,
            block,
            gradient: super::gradient(tensor(payload)?, loss_sum, tokens)?,
            digests: digests
                .into_iter()
                .map(|(slot, digest)| (slot, Digest(digest)))
                .collect(),
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
            testimonies,
        } => Message::Replicate {
            lineage: Lineage(lineage),
            step: Step(step),
            block,
            gradient: super::gradient(tensor(payload)?, loss_sum, tokens)?,
            testimonies: testimonies_from_wire(&testimonies)?,
        },
        Body::ReplicateAck {
            lineage,
            step,
            block,
            testimonies,
        } => Message::ReplicateAck {
            lineage: Lineage(lineage),
            step: Step(step),
            block,
            testimonies: testimonies_from_wire(&testimonies)?,
        },
        Body::SeedRequest { lineage, block } => Message::SeedRequest {
            lineage: Lineage(lineage),
            block,
        },
        Body::Seed {
            lineage,
            block,
            version,
            lens,
            last,
            history,
        } => Message::Seed {
            lineage: Lineage(lineage),
            block,
            version: Step(version),
            last: last.as_ref().map(report_from_wire),
            state: super::state(&tensor(payload)?, lens, history_from_wire(&history))?,
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
        Body::BatchRequest { .. }
        | Body::Batch { .. }
        | Body::Drain { .. }
        | Body::Released
        | Body::Failed { .. } => {
            return Err(WireError::Field {
                field: "body",
                value: 0,
            });
        }
    })
}
