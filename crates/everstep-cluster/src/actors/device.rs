//! The device thread: one replica, one queue of jobs. It stays responsive to nothing but its queue; the actor beside it does the rest.

use std::sync::Arc;
use std::sync::mpsc;

use everstep_data::TokenBatch;
use everstep_optim::{Gradient, Parameters};
use everstep_protocol::{BlockId, Step, Task};
use everstep_telemetry::TraceContext;
use everstep_telemetry::names::span;
use everstep_train::{ComputeError, Replica};
use ractor::{ActorProcessingErr, ActorRef};

use super::worker::WorkerMessage;
use crate::process::ProcessContext;

/// A job for the device, done in order.
pub(crate) enum Job {
    /// Put a block of parameters in place.
    Load {
        /// The block.
        block: BlockId,
        /// The values.
        parameters: Parameters,
    },
    /// Compute a task.
    Compute {
        /// The step.
        step: Step,
        /// The task.
        task: Task,
        /// Its tokens.
        batch: Arc<TokenBatch>,
        /// The span of the lease.
        trace: TraceContext,
    },
}

/// Handle of the device thread, which ends when this is dropped.
pub(crate) struct Device {
    jobs: mpsc::Sender<Job>,
}

impl Device {
    /// Starts the thread and builds the replica on it.
    pub(crate) fn start(
        context: Arc<ProcessContext>,
        worker: ActorRef<WorkerMessage>,
    ) -> Result<Self, ActorProcessingErr> {
        let (jobs, queue) = mpsc::channel();
        std::thread::Builder::new()
            .name("device".to_owned())
            .spawn(move || {
                let worker = &worker;
                // A panic below is a broken invariant or a sticky device error: the actor must not wait for a thread that is gone.
                let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    serve(&context, &queue, worker)
                }));
                let reason = match outcome {
                    Ok(Ok(())) => return,
                    Ok(Err(reason)) => reason,
                    Err(panic) => panic_text(panic.as_ref()),
                };
                let _ = worker.cast(WorkerMessage::DeviceFailed(reason));
            })?;
        Ok(Self { jobs })
    }

    /// Queues a job.
    pub(crate) fn send(&self, job: Job) -> Result<(), ActorProcessingErr> {
        self.jobs
            .send(job)
            .map_err(|_| "the device thread is gone".into())
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "panic".to_owned())
}

fn serve(
    context: &ProcessContext,
    queue: &mpsc::Receiver<Job>,
    worker: &ActorRef<WorkerMessage>,
) -> Result<(), String> {
    let run = &context.run;
    let text = |error: ComputeError| error.to_string();
    let backend = context.backend.ok_or("this program does not compute")?;
    let mut replica: Box<dyn Replica> = backend.replica(&run.replica_plan()).map_err(text)?;
    let progress = context.devices.register(replica.is_accelerated());
    while let Ok(job) = queue.recv() {
        let _task = progress.task();
        match job {
            Job::Load { block, parameters } => {
                let offset = run.layout().blocks()[block as usize].offset;
                replica
                    .set_parameters(offset, parameters.as_bytes())
                    .map_err(text)?;
            }
            Job::Compute {
                step,
                task,
                batch,
                trace,
            } => {
                context.disturb_device(step);
                let message = match task {
                    Task::Slot(slot) | Task::Audit { slot, .. } => {
                        let span = tracing::info_span!(span::FORWARD_BACKWARD, step = step.0, slot);
                        trace.adopt(&span);
                        let _entered = span.enter();
                        let mut gradients: Vec<Gradient> = replica
                            .gradient(&batch, step.0, slot as usize)
                            .map_err(text)?;
                        context.disturb_gradient(step, slot, &mut gradients);
                        if let Some(slots) = &context.slots {
                            slots.count(matches!(task, Task::Audit { .. }));
                        }
                        WorkerMessage::Computed {
                            step,
                            slot,
                            gradients,
                        }
                    }
                    Task::Evaluate(chunk) => {
                        let span = tracing::info_span!(span::EVALUATE, step = step.0, chunk);
                        trace.adopt(&span);
                        let _entered = span.enter();
                        let sums = replica.evaluate(&batch).map_err(text)?;
                        WorkerMessage::Evaluated { step, chunk, sums }
                    }
                };
                if worker.cast(message).is_err() {
                    return Ok(());
                }
            }
        }
    }
    Ok(())
}
