//! What the leader records of quarantines, and learns of earlier ones.

use std::time::SystemTime;

use everstep_protocol::{Member, Role};
use everstep_store::Quarantine;
use ractor::ActorRef;

use super::{CoordinatorMessage, CoordinatorState};
use crate::quarantine;
use crate::topology::ActorRole;

impl CoordinatorState {
    /// Takes over what the store says; returns the workers.
    pub(super) fn adopt_quarantines(&mut self, found: Vec<Quarantine>) -> Vec<Member> {
        let member = |quarantine: &Quarantine| Member {
            role: Role::Worker,
            index: quarantine.worker,
            // In any life.
            incarnation: 0,
        };
        let members = found.iter().map(member).collect();
        for quarantine in found {
            tracing::warn!(
                worker = quarantine.worker,
                process = quarantine.process,
                step = quarantine.step,
                "quarantined since an earlier lie; `everstep audit clear` lifts it"
            );
            self.quarantines
                .entry(quarantine.worker)
                .or_insert(quarantine);
        }
        members
    }

    /// Looks for quarantines however long the store takes.
    pub(super) fn find_quarantines(&self, myself: &ActorRef<CoordinatorMessage>) {
        let (context, reply) = (self.context.clone(), myself.clone());
        tokio::spawn(async move {
            let found = quarantine::find(&context).await;
            let _ = reply.cast(CoordinatorMessage::Quarantined(found));
        });
    }

    /// Makes a quarantine outlive the cluster.
    pub(super) fn record_quarantine(&mut self, new: Quarantine) {
        self.quarantines.insert(new.worker, new.clone());
        quarantine::record(&self.context, new);
    }

    /// A leader that learned of a quarantine from the shards does not know whether the one before could record it.
    pub(super) fn record_quarantines(&mut self) {
        if !self.machine.is_leading() {
            return;
        }
        let missing: Vec<Member> = self
            .machine
            .quarantined()
            .iter()
            .copied()
            .filter(|worker| !self.quarantines.contains_key(&worker.index))
            .collect();
        for worker in missing {
            let (process, node) = self.whereabouts(worker);
            self.record_quarantine(Quarantine {
                worker: worker.index,
                process,
                node,
                step: self.machine.step().0,
                time: everstep_telemetry::timestamp(SystemTime::now()),
                ..Quarantine::default()
            });
        }
        let num_workers = self.context.run.topology.count(ActorRole::Worker) as usize;
        if self.machine.quarantined().len() >= num_workers && !self.finished {
            self.finished = true;
            let names: Vec<&str> = self
                .quarantines
                .values()
                .map(|one| one.process.as_str())
                .collect();
            self.give_up(format!(
                "every worker of the topology is quarantined ({}), so nobody may compute anything; `everstep audit clear` lifts a quarantine",
                names.join(", ")
            ));
        }
    }
}
