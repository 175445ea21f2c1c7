//! The store: leases of epochs, objects, manifests, and the metrics log beside it.

use std::collections::{BTreeMap, BTreeSet};

use everstep_protocol::coordinator::Event as CoordinatorEvent;
use everstep_protocol::random::Stream;
use everstep_protocol::shard::Event as ShardEvent;
use everstep_protocol::{BlockId, Epoch, Lineage, Step};

use crate::coverage::Branch;
use crate::fault::Fault;
use crate::toy::{State, initial_state};
use crate::weather::Condition;
use crate::world::{Happening, Local, World};

/// A shell waits this long before it tries a store operation again.
const RETRY_MS: u64 = 100;

/// What is durable.
#[derive(Debug, Default)]
pub(crate) struct Store {
    /// Who won each epoch.
    epochs: BTreeMap<u64, usize>,
    /// Blocks of each object.
    objects: BTreeMap<u64, (Step, Vec<(BlockId, State)>)>,
    next_object: u64,
    /// Objects of each committed checkpoint.
    manifests: BTreeMap<Step, Vec<u64>>,
    /// Objects whose bytes are wrong or gone.
    damaged: BTreeSet<u64>,
}

/// An operation under way.
#[derive(Clone, Debug)]
pub(crate) enum Write {
    Lease {
        actor: usize,
        incarnation: u64,
        epoch: u64,
    },
    Object {
        actor: usize,
        incarnation: u64,
        version: Step,
        blocks: Vec<(BlockId, State)>,
    },
    Manifest {
        actor: usize,
        incarnation: u64,
        version: Step,
        objects: Vec<Vec<u8>>,
    },
    /// The newest checkpoint is looked for, which takes as long as it is.
    Find { actor: usize, incarnation: u64 },
    Load {
        actor: usize,
        incarnation: u64,
        lineage: Lineage,
        version: Step,
        block: BlockId,
    },
}

impl Store {
    pub(crate) fn latest_epoch(&self) -> u64 {
        self.epochs.keys().last().copied().unwrap_or(0)
    }

    fn is_intact(&self, objects: &[u64]) -> bool {
        objects.iter().all(|object| !self.damaged.contains(object))
    }

    /// Version of the newest checkpoint that verifies; 0 if there is none.
    pub(crate) fn newest(&self) -> Step {
        self.manifests
            .iter()
            .rev()
            .find(|(_, objects)| self.is_intact(objects))
            .map(|(version, _)| *version)
            .unwrap_or_default()
    }

    pub(crate) fn is_committed(&self, version: Step) -> bool {
        self.manifests.contains_key(&version)
    }

    /// Whether the object that holds a block of a checkpoint is damaged.
    fn is_damaged(&self, version: Step, block: BlockId) -> bool {
        let objects = self.manifests.get(&version);
        objects.into_iter().flatten().any(|object| {
            self.damaged.contains(object)
                && self
                    .objects
                    .get(object)
                    .is_some_and(|(_, blocks)| blocks.iter().any(|(held, _)| *held == block))
        })
    }

    /// The states that a committed checkpoint names, by block.
    pub(crate) fn checkpoint(&self, version: Step) -> BTreeMap<BlockId, State> {
        self.manifests
            .get(&version)
            .into_iter()
            .flatten()
            .filter_map(|object| self.objects.get(object))
            .flat_map(|(_, blocks)| blocks.iter().copied())
            .collect()
    }
}

impl World<'_> {
    /// Starts an operation; it takes its time.
    pub(crate) fn begin(&mut self, write: Write) {
        let slow_ms = self.weather.strength(Condition::SlowStore, 0, self.now_ms);
        let max_ms = slow_ms.max(self.plan.timing.store_max_ms);
        let at_ms = self.after(1, max_ms);
        self.schedule(at_ms, Happening::Written(write));
    }

    /// The shell tries an operation again that failed, or seemed to.
    fn again(&mut self, write: Write) {
        let at_ms = self.after(RETRY_MS, RETRY_MS + 20);
        self.schedule(at_ms, Happening::Written(write));
    }

    /// The last epoch, as a listing shows it.
    pub(crate) fn listed_epoch(&mut self) -> u64 {
        let latest = self.store.latest_epoch();
        let listed = self.weather.stale.0;
        if self.is_stale() && listed < latest {
            self.count_fault(Fault::StaleList);
            return listed;
        }
        latest
    }

    fn is_stale(&self) -> bool {
        self.weather.strength(Condition::StaleList, 0, self.now_ms) > 0
    }

    /// The newest intact checkpoint, as a listing shows it.
    fn listed_newest(&mut self) -> Step {
        let newest = self.store.newest();
        if self.store.manifests.keys().last() > Some(&newest) {
            self.met(Branch::OlderCheckpointUsed);
        }
        let (_, listed) = self.weather.stale;
        if self.is_stale() && listed < newest {
            self.count_fault(Fault::StaleList);
            let intact = self.store.manifests.get(&listed);
            return match intact {
                Some(objects) if self.store.is_intact(objects) => listed,
                _ => Step(0),
            };
        }
        newest
    }

    /// Damages an object of the newest checkpoint; never of the last, which nobody reads again.
    pub(crate) fn damage_checkpoint(&mut self, missing: bool, random: &mut Stream) -> bool {
        let newest = self.store.newest();
        if newest.0 == 0 || newest.0 >= self.plan.workload.num_steps {
            return false;
        }
        let objects = self
            .store
            .manifests
            .get(&newest)
            .cloned()
            .unwrap_or_default();
        if objects.is_empty() {
            return false;
        }
        let object = objects[random.below(objects.len() as u64) as usize];
        self.say(|| {
            format!(
                "object {object} of checkpoint {} is damaged, missing: {missing}",
                newest.0
            )
        });
        self.store.damaged.insert(object)
    }

    pub(crate) fn lives(&self, actor: usize, incarnation: u64) -> bool {
        self.actors[actor].member.incarnation == incarnation && self.actors[actor].machine.is_some()
    }

    fn tell(&mut self, actor: usize, incarnation: u64, event: Local) {
        let now_ms = self.now_ms;
        self.schedule(
            now_ms,
            Happening::Local {
                actor,
                incarnation,
                event,
            },
        );
    }

    /// An operation arrives at the store. One whose process has died meanwhile may have got there or not.
    pub(crate) fn written(&mut self, write: Write) {
        let (actor, incarnation) = match &write {
            Write::Lease {
                actor, incarnation, ..
            }
            | Write::Object {
                actor, incarnation, ..
            }
            | Write::Manifest {
                actor, incarnation, ..
            }
            | Write::Find { actor, incarnation }
            | Write::Load {
                actor, incarnation, ..
            } => (*actor, *incarnation),
        };
        if !self.lives(actor, incarnation) && self.random.below(2) == 0 {
            return;
        }
        if self
            .weather
            .strength(Condition::StoreOutage, 0, self.now_ms)
            > 0
        {
            self.count_fault(Fault::StoreOutage);
            if self.lives(actor, incarnation) {
                self.again(write);
            }
            return;
        }
        let lost_permille = self.weather.strength(Condition::LostReply, 0, self.now_ms);
        let answers = lost_permille == 0
            || matches!(write, Write::Load { .. })
            || self.random.below(1000) >= lost_permille;
        if !answers {
            // It is done, the answer is lost, and the shell tries again.
            self.count_fault(Fault::LostReply);
            if self.lives(actor, incarnation) {
                self.again(write.clone());
            }
        }
        match write {
            Write::Lease { epoch, .. } => {
                let holder = self.store.epochs.get(&epoch).copied();
                if holder.is_none() {
                    self.store.epochs.insert(epoch, actor);
                }
                if answers {
                    self.lease_answered(actor, incarnation, epoch, holder);
                }
            }
            Write::Object {
                version, blocks, ..
            } => {
                let object = self.store.next_object;
                self.store.next_object += 1;
                let ids = blocks.iter().map(|(block, _)| *block).collect();
                self.store.objects.insert(object, (version, blocks));
                if answers {
                    let event = ShardEvent::Stored {
                        version,
                        blocks: ids,
                        object: object.to_le_bytes().to_vec(),
                    };
                    self.tell(actor, incarnation, Local::Shard(event));
                }
            }
            Write::Manifest {
                version, objects, ..
            } => {
                if self.store.is_committed(version) {
                    self.met(Branch::ManifestExisted);
                } else {
                    let objects: Vec<u64> = objects
                        .iter()
                        .filter_map(|object| object.as_slice().try_into().ok())
                        .map(u64::from_le_bytes)
                        .collect();
                    self.store.manifests.insert(version, objects);
                    self.check_manifest(version);
                }
                if answers {
                    let event = CoordinatorEvent::ManifestCommitted { version };
                    self.tell(actor, incarnation, Local::Coordinator(event));
                }
            }
            Write::Find { .. } => {
                if !answers {
                    return;
                }
                let version = self.listed_newest();
                let event = CoordinatorEvent::CheckpointFound { version };
                self.tell(actor, incarnation, Local::Coordinator(event));
            }
            Write::Load {
                lineage,
                version,
                block,
                ..
            } => {
                if self.store.is_damaged(version, block) {
                    self.met(Branch::DamageFoundWhileLoading);
                    return self.again(write);
                }
                let state = if version.0 == 0 {
                    Some(initial_state(self.seed, block))
                } else {
                    self.store.checkpoint(version).get(&block).copied()
                };
                let Some(state) = state else {
                    return self.violate(format!(
                        "5: block {block} of checkpoint {} was asked for and is not there",
                        version.0
                    ));
                };
                let event = ShardEvent::Loaded {
                    lineage,
                    version,
                    block,
                    state,
                };
                self.tell(actor, incarnation, Local::Shard(event));
            }
        }
    }

    /// A coordinator learns whether it has created an epoch's lease. One that is there already counts as another's, even if it is its own.
    fn lease_answered(
        &mut self,
        actor: usize,
        incarnation: u64,
        epoch: u64,
        holder: Option<usize>,
    ) {
        if self.lives(actor, incarnation) {
            self.actors[actor].campaigns = false;
        }
        if let Some(holder) = holder {
            self.met(Branch::LeaseLost);
            if holder != actor {
                self.count_fault(Fault::LeaseRace);
            }
            return;
        }
        let high_water = self.checker.mark_of(actor, self.plan.timing.shares_log);
        let event = CoordinatorEvent::Elected {
            epoch: Epoch(epoch),
            checkpoint: self.listed_newest(),
            high_water,
            quarantined: self.recorded_liars.clone(),
        };
        self.checker.elected(Epoch(epoch), high_water);
        let at_ms = self.after(0, 5);
        self.schedule(
            at_ms,
            Happening::Local {
                actor,
                incarnation,
                event: Local::Coordinator(event),
            },
        );
    }

    /// Invariant 5: a committed manifest names objects that exist, cover every block, and verify.
    fn check_manifest(&mut self, version: Step) {
        let objects = self
            .store
            .manifests
            .get(&version)
            .cloned()
            .unwrap_or_default();
        for object in objects {
            let versions = self.store.objects.get(&object).map(|(version, _)| *version);
            if versions != Some(version) {
                self.violate(format!(
                    "5: manifest {} names object {object}, which holds {versions:?}",
                    version.0
                ));
            }
        }
        let found = self.store.checkpoint(version);
        let expected: BTreeMap<BlockId, State> = (0..)
            .zip(self.expected.states[version.0 as usize].iter().copied())
            .collect();
        if found != expected {
            self.violate(format!(
                "5: manifest {} names {found:?} where the undisturbed run has {expected:?}",
                version.0
            ));
        }
    }
}
