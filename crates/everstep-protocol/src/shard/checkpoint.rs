//! A shard's part in checkpoints: snapshots beside training, and what became of them.

use super::machine::Shard;
use crate::ids::{BlockId, Step};
use crate::message::{Message, Numerics};

/// Checkpoints whose stored objects are remembered for a leader that did not hear of them.
const STORED_VERSIONS_MAX: usize = 4;

/// Blocks of a snapshot, and what the manifest will say of their object.
pub(super) type StoredObject = (Vec<BlockId>, Vec<u8>);

impl<N: Numerics> Shard<N> {
    /// Snapshots a block that has just reached `version`, if this replica is the one that stores it.
    pub(super) fn snapshot_if_mine(&mut self, version: Step, id: BlockId) {
        let mine = self
            .view
            .as_ref()
            .and_then(|view| view.placements.get(id as usize))
            .is_some_and(|placement| placement.storer() == self.config.me);
        if mine {
            self.snapshot(version, id);
        }
    }

    fn is_stored(&self, version: Step, id: BlockId) -> bool {
        self.stored
            .get(&version)
            .is_some_and(|objects| objects.iter().any(|(blocks, _)| blocks.contains(&id)))
    }

    fn snapshot(&mut self, version: Step, id: BlockId) {
        if self.is_stored(version, id) || self.storing.contains(&(version, id)) {
            return;
        }
        let Some(replica) = self
            .blocks
            .get(&id)
            .and_then(|block| block.replica.as_ref())
        else {
            return;
        };
        if replica.version == version {
            self.storing.insert((version, id));
            self.snapshots
                .entry(version)
                .or_default()
                .push((id, replica.state.clone()));
        }
    }

    /// The leader misses parts of a checkpoint: say again what is stored, and snapshot the rest if it is still time.
    pub(super) fn on_snapshot(&mut self, version: Step, blocks: Vec<BlockId>) {
        let known: Vec<StoredObject> = self
            .stored
            .get(&version)
            .into_iter()
            .flatten()
            .filter(|(stored, _)| stored.iter().any(|id| blocks.contains(id)))
            .cloned()
            .collect();
        for (blocks, object) in known {
            self.send_leader(Message::Stored {
                version,
                blocks,
                object,
            });
        }
        for id in blocks {
            self.snapshot(version, id);
        }
    }

    pub(super) fn on_stored(&mut self, version: Step, blocks: Vec<BlockId>, object: Vec<u8>) {
        for id in &blocks {
            self.storing.remove(&(version, *id));
        }
        self.stored
            .entry(version)
            .or_default()
            .push((blocks.clone(), object.clone()));
        while self.stored.len() > STORED_VERSIONS_MAX {
            self.stored.pop_first();
        }
        self.send_leader(Message::Stored {
            version,
            blocks,
            object,
        });
    }
}
