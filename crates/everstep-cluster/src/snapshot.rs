//! Snapshots on their way to the store: small ones wait in memory, others in a file of the run directory.
//!
//! A snapshot shares memory with the state it was taken of, and every block that the next step changes meanwhile is copied. So a big one is
//! written to a file at once, block by block, and its memory given back, however slow the store is. Processes keep no second state in memory.

use std::io;
use std::ops::Range;
use std::path::Path;

use everstep_optim::{BlockState, FloatBuffer};
use everstep_protocol::BlockId;
use everstep_store::{BlockSource, Digest, FileBlock, ObjectFile, Part};

use crate::history;

const VALUE_BYTES: u64 = size_of::<f32>() as u64;

/// One block of a snapshot.
#[derive(Debug)]
pub(crate) struct SnapshotBlock {
    block: BlockId,
    extra: String,
    values: Values,
}

#[derive(Debug)]
enum Values {
    Memory([FloatBuffer; 4]),
    File(FileBlock),
}

impl BlockSource for SnapshotBlock {
    fn block(&self) -> u32 {
        self.block
    }

    fn len(&self, part: Part) -> usize {
        match &self.values {
            Values::Memory(parts) => parts[part as usize].len(),
            Values::File(block) => block.len(part),
        }
    }

    fn read(&self, part: Part, values: Range<usize>, bytes: &mut Vec<u8>) -> io::Result<()> {
        let element = VALUE_BYTES as usize;
        match &self.values {
            Values::Memory(parts) => {
                let range = values.start * element..values.end * element;
                bytes.extend_from_slice(&parts[part as usize].as_bytes()[range]);
                Ok(())
            }
            Values::File(block) => block.read(part, values, bytes),
        }
    }

    fn memory(&self, part: Part) -> Option<&[u8]> {
        match &self.values {
            Values::Memory(parts) => Some(parts[part as usize].as_bytes()),
            Values::File(_) => None,
        }
    }

    fn digests(&self) -> Option<[Digest; 2]> {
        match &self.values {
            Values::Memory(_) => None,
            Values::File(block) => Some(block.digests()),
        }
    }

    fn in_file(&self) -> Option<&FileBlock> {
        match &self.values {
            Values::Memory(_) => None,
            Values::File(block) => Some(block),
        }
    }

    fn extra(&self) -> &str {
        &self.extra
    }
}

impl SnapshotBlock {
    fn in_memory((block, state): (BlockId, BlockState)) -> Self {
        Self {
            block,
            extra: history::to_text(&state.history),
            values: Values::Memory(state.into_parts()),
        }
    }
}

/// Takes a snapshot over: in memory, if it has at most `memory_bytes`, or else in a file in `dir`, which is gone as soon as nobody reads it,
/// also if this process is killed. The file has the form of an object, which it becomes in a store on the same disk. Blocks; where the disk
/// has no room, memory has to do.
pub(crate) fn hold(
    step: u64,
    blocks: Vec<(BlockId, BlockState)>,
    memory_bytes: u64,
    dir: &Path,
) -> Vec<SnapshotBlock> {
    let mut blocks: Vec<SnapshotBlock> = blocks.into_iter().map(SnapshotBlock::in_memory).collect();
    blocks.sort_by_key(|block| block.block);
    let len = |block: &SnapshotBlock| {
        let lens = Part::ALL.map(|part| block.len(part) as u64);
        lens.iter().sum::<u64>()
    };
    let bytes = VALUE_BYTES * blocks.iter().map(len).sum::<u64>();
    if bytes <= memory_bytes {
        return blocks;
    }
    let spilled = ObjectFile::create(dir, step, &blocks).and_then(|mut file| {
        // The memory of each is given back before the next is written.
        let written = blocks.iter_mut().try_for_each(|block| {
            block.values = Values::File(file.write(block)?);
            Ok(())
        });
        // What was written can be read, whatever happened then.
        file.finish().and(written)
    });
    if let Err(error) = spilled {
        let dir = dir.display();
        tracing::warn!(%error, %dir, bytes, "a snapshot cannot wait on disk and stays in memory");
    }
    blocks
}

#[cfg(test)]
mod tests {
    use std::fs;

    use everstep_optim::MomentDtype;
    use everstep_store::{optimizer_digest, param_digest};

    use super::*;

    fn state(first: f32) -> BlockState {
        let values: Vec<f32> = (0..100).map(|k| first + k as f32).collect();
        BlockState {
            first_moment: vec![first; 3].into(),
            second_moment: Vec::new().into(),
            average: vec![-first; 5].into(),
            ..BlockState::new(values, MomentDtype::Float32, false)
        }
    }

    fn read(block: &SnapshotBlock) -> Vec<u8> {
        let mut bytes = Vec::new();
        for part in Part::ALL {
            // In pieces, as an upload reads.
            let middle = block.len(part) / 3;
            block.read(part, 0..middle, &mut bytes).unwrap();
            block
                .read(part, middle..block.len(part), &mut bytes)
                .unwrap();
        }
        bytes
    }

    #[test]
    fn a_big_snapshot_leaves_memory_and_reads_the_same_from_disk() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("snapshots");
        let blocks = || vec![(3, state(1.0)), (9, state(-7.5))];
        let in_memory = hold(5, blocks(), u64::MAX, &dir);
        assert!(!dir.exists());
        let given = blocks();
        let shared = given[0].1.parameters.clone();
        let on_disk = hold(5, given, 0, &dir);
        for (disk, memory) in on_disk.iter().zip(&in_memory) {
            assert!(matches!(disk.values, Values::File(_)));
            assert_eq!((disk.block, disk.extra()), (memory.block, memory.extra()));
            assert_eq!(read(disk), read(memory));
            let Values::Memory(parts) = &memory.values else {
                unreachable!("nothing of it is on disk")
            };
            let [param, m, v, ema] = parts.each_ref().map(FloatBuffer::as_slice);
            let expected = [param_digest(param), optimizer_digest(m, v, ema)];
            assert_eq!(disk.digests(), Some(expected));
        }
        assert_eq!(shared.into_vec().len(), 100);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0, "no file has a name");
    }

    #[test]
    fn without_a_disk_it_stays_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a file");
        fs::write(&file, "").unwrap();
        let kept = hold(5, vec![(0, state(2.0))], 0, &file);
        assert!(matches!(kept[0].values, Values::Memory(_)));
    }
}
