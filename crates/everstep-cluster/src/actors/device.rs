//! The device thread: one model, one queue of jobs. It stays responsive to nothing but its queue; the actor beside it does the rest.

use std::sync::Arc;
use std::sync::mpsc;

use everstep_data::TokenBatch;
use everstep_model::Model;
use everstep_optim::{Gradient, Parameters};
use everstep_protocol::{BlockId, Step, Task};
use everstep_telemetry::TraceContext;
use everstep_telemetry::names::span;
use everstep_torch::DeviceKind;
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
    /// Starts the thread and builds the model on it.
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
    let mut model: Model = run.build_model()?;
    let progress = context
        .devices
        .register(DeviceKind::of(model.device()) != DeviceKind::Cpu);
    while let Ok(job) = queue.recv() {
        let _task = progress.task();
        match job {
            Job::Load { block, parameters } => {
                let offset = run.layout().blocks()[block as usize].offset;
                model
                    .set_parameters(offset, parameters.as_bytes())
                    .map_err(|error| error.to_string())?;
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
                        let mut gradients: Vec<Gradient> = run
                            .gradient(&mut model, &batch, step, slot)
                            .map_err(|error| error.to_string())?;
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
                        let sums = run
                            .evaluate(&model, &batch)
                            .map_err(|error| error.to_string())?;
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
