//! What the log says of steps that a policy skipped, and the end of a run that is given up.

use everstep_protocol::{Decision, Step};
use everstep_telemetry::Event;

use super::CoordinatorState;
use crate::message::ClusterMessage;
use crate::topology::ActorRole;

/// The one line that a run ends with.
pub(super) fn too_many_skips(step: Step, num_skipped: u32) -> String {
    format!(
        "{num_skipped} steps in a row before step {} were skipped, their gradients or losses being what [policy] skips, and policy.skip_limit \
         is {num_skipped}; see events.jsonl. Look at the data and the learning rate, or go on with a higher policy.skip_limit",
        step.0
    )
}

impl CoordinatorState {
    /// A step is committed without its update.
    pub(super) fn log_skip(&self, step: Step, decision: &Decision) {
        let epoch = self.epoch.unwrap_or_default().0;
        let reason = if decision.is_spike {
            // What the loss was compared with is what a skip leaves as it was.
            let (mean, sd) = (decision.history.loss_mean, decision.history.loss_sd());
            self.context.event(&Event::LossSpike {
                step: step.0,
                epoch,
                loss: decision.loss,
                mean,
                sd,
            });
            let sds = (decision.loss - mean) / sd;
            format!("its loss is {sds:.1} standard deviations above the mean")
        } else {
            "a gradient is not finite".to_owned()
        };
        self.context.event(&Event::StepSkipped {
            step: step.0,
            epoch,
            reason,
        });
    }

    /// Ends the run everywhere, with one reason.
    pub(super) fn give_up(&self, reason: String) {
        let from = (self.address, self.me.incarnation);
        let router = &self.context.router;
        for role in [
            ActorRole::Coordinator,
            ActorRole::Worker,
            ActorRole::Shard,
            ActorRole::Loader,
        ] {
            for to in router.actors(role).filter(|to| *to != self.address) {
                let reason = reason.clone();
                router.send(from, to, ClusterMessage::Failed { reason });
            }
        }
        self.context.fail(reason);
    }
}
