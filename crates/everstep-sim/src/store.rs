//! The store: leases of epochs, objects, manifests, and the metrics log beside it.

use std::collections::{BTreeMap, BTreeSet};

use everstep_protocol::coordinator::Event as CoordinatorEvent;
use everstep_protocol::shard::Event as ShardEvent;
use everstep_protocol::{BlockId, Epoch, Lineage, Step};

use crate::toy::initial_state;
use crate::world::{Happening, Local, World};

/// What is durable.
#[derive(Debug, Default)]
pub(crate) struct Store {
    /// Epochs that were won.
    pub(crate) epochs: BTreeSet<u64>,
    /// Blocks of each object.
    objects: BTreeMap<u64, (Step, Vec<(BlockId, u64)>)>,
    next_object: u64,
    /// Objects of each committed checkpoint.
    manifests: BTreeMap<Step, Vec<u64>>,
}

/// An operation under way.
#[derive(Debug)]
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
        blocks: Vec<(BlockId, u64)>,
    },
    Manifest {
        actor: usize,
        incarnation: u64,
        version: Step,
        objects: Vec<Vec<u8>>,
    },
    Load {
        actor: usize,
        incarnation: u64,
        lineage: Lineage,
        version: Step,
        block: BlockId,
    },
}

impl Store {
    pub(crate) fn newest(&self) -> Step {
        self.manifests.keys().last().copied().unwrap_or_default()
    }

    pub(crate) fn is_committed(&self, version: Step) -> bool {
        self.manifests.contains_key(&version)
    }

    /// The states that a committed checkpoint names, by block.
    pub(crate) fn checkpoint(&self, version: Step) -> BTreeMap<BlockId, u64> {
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
        let at_ms = self.after(1, self.scenario.store_max_ms);
        self.schedule(at_ms, Happening::Written(write));
    }

    fn lives(&self, actor: usize, incarnation: u64) -> bool {
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
            | Write::Load {
                actor, incarnation, ..
            } => (*actor, *incarnation),
        };
        if !self.lives(actor, incarnation) && self.random.below(2) == 0 {
            return;
        }
        match write {
            Write::Lease { epoch, .. } => {
                let won = self.store.epochs.insert(epoch);
                if self.lives(actor, incarnation) {
                    self.actors[actor].campaigns = false;
                }
                if won {
                    let high_water = self.checker.mark_of(actor, self.scenario.shares_log);
                    let event = CoordinatorEvent::Elected {
                        epoch: Epoch(epoch),
                        checkpoint: self.store.newest(),
                        high_water,
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
            }
            Write::Object {
                version, blocks, ..
            } => {
                let object = self.store.next_object;
                self.store.next_object += 1;
                let ids = blocks.iter().map(|(block, _)| *block).collect();
                self.store.objects.insert(object, (version, blocks));
                let event = ShardEvent::Stored {
                    version,
                    blocks: ids,
                    object: object.to_le_bytes().to_vec(),
                };
                self.tell(actor, incarnation, Local::Shard(event));
            }
            Write::Manifest {
                version, objects, ..
            } => {
                if !self.store.is_committed(version) {
                    let objects: Vec<u64> = objects
                        .iter()
                        .filter_map(|object| object.as_slice().try_into().ok())
                        .map(u64::from_le_bytes)
                        .collect();
                    self.store.manifests.insert(version, objects);
                    self.check_manifest(version);
                }
                let event = CoordinatorEvent::ManifestCommitted { version };
                self.tell(actor, incarnation, Local::Coordinator(event));
            }
            Write::Load {
                lineage,
                version,
                block,
                ..
            } => {
                let state = if version.0 == 0 {
                    Some(initial_state(self.scenario.seed, block))
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
        let expected: BTreeMap<BlockId, u64> = (0..)
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
