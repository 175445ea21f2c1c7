//! Snapshots on their way to the store: small ones wait in memory, others in a file of the run directory.
//!
//! A snapshot shares memory with the state it was taken of, and every block that the next step changes meanwhile is copied. So a big one is
//! written to a file at once, block by block, and its memory given back, however slow the store is. Processes keep no second state in memory.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use everstep_optim::{BlockState, FloatBuffer};
use everstep_protocol::BlockId;
use everstep_store::{BlockSource, Digest, Part, optimizer_digest, param_digest};

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
    File {
        file: Arc<File>,
        /// Where each part begins, in bytes.
        offsets: [u64; 4],
        lens: [usize; 4],
        /// Taken of the memory that was written, so that a file that a disk spoils is not taken for the truth.
        digests: [Digest; 2],
    },
}

impl BlockSource for SnapshotBlock {
    fn block(&self) -> u32 {
        self.block
    }

    fn len(&self, part: Part) -> usize {
        match &self.values {
            Values::Memory(parts) => parts[part as usize].len(),
            Values::File { lens, .. } => lens[part as usize],
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
            Values::File { file, offsets, .. } => {
                let old_len = bytes.len();
                bytes.resize(old_len + values.len() * element, 0);
                let at = offsets[part as usize] + VALUE_BYTES * values.start as u64;
                file.read_exact_at(&mut bytes[old_len..], at)
            }
        }
    }

    fn memory(&self, part: Part) -> Option<&[u8]> {
        match &self.values {
            Values::Memory(parts) => Some(parts[part as usize].as_bytes()),
            Values::File { .. } => None,
        }
    }

    fn digests(&self) -> Option<[Digest; 2]> {
        match &self.values {
            Values::Memory(_) => None,
            Values::File { digests, .. } => Some(*digests),
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

    /// Moves the values to the end of the file, which is at `end`; leaves them in memory if that fails.
    fn spill(&mut self, file: &Arc<File>, end: &mut u64) -> io::Result<()> {
        let Values::Memory(parts) = &self.values else {
            return Ok(());
        };
        let mut offsets = [0; 4];
        for (part, offset) in parts.iter().zip(&mut offsets) {
            *offset = *end;
            (&**file).write_all(part.as_bytes())?;
            *end += part.as_bytes().len() as u64;
        }
        let [param, m, v, ema] = parts.each_ref().map(FloatBuffer::as_slice);
        self.values = Values::File {
            file: file.clone(),
            offsets,
            lens: parts.each_ref().map(FloatBuffer::len),
            digests: [param_digest(param), optimizer_digest(m, v, ema)],
        };
        Ok(())
    }
}

/// Takes a snapshot over: in memory, if it has at most `memory_bytes`, or else in a file in `dir`, which is gone as soon as nobody reads it,
/// also if this process is killed. Blocks; where the disk fails, memory has to do.
pub(crate) fn hold(
    blocks: Vec<(BlockId, BlockState)>,
    memory_bytes: u64,
    dir: &Path,
    name: &str,
) -> Vec<SnapshotBlock> {
    let mut blocks: Vec<SnapshotBlock> = blocks.into_iter().map(SnapshotBlock::in_memory).collect();
    let len = |block: &SnapshotBlock| {
        let lens = Part::ALL.map(|part| block.len(part) as u64);
        lens.iter().sum::<u64>()
    };
    let bytes = VALUE_BYTES * blocks.iter().map(len).sum::<u64>();
    if bytes <= memory_bytes {
        return blocks;
    }
    let spilled = create(dir, name).and_then(|file| {
        let file = Arc::new(file);
        let mut end = 0;
        let mut spill = |block: &mut SnapshotBlock| block.spill(&file, &mut end);
        blocks.iter_mut().try_for_each(&mut spill)
    });
    if let Err(error) = spilled {
        let dir = dir.display();
        tracing::warn!(%error, %dir, bytes, "a snapshot cannot wait on disk and stays in memory");
    }
    blocks
}

/// A file without a name.
fn create(dir: &Path, name: &str) -> io::Result<File> {
    fs::create_dir_all(dir)?;
    let path = dir.join(name);
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use everstep_optim::MomentDtype;

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
        let in_memory = hold(blocks(), u64::MAX, &dir, "s");
        assert!(!dir.exists());
        let given = blocks();
        let shared = given[0].1.parameters.clone();
        let on_disk = hold(given, 0, &dir, "s");
        for (disk, memory) in on_disk.iter().zip(&in_memory) {
            assert!(matches!(disk.values, Values::File { .. }));
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
        let kept = hold(vec![(0, state(2.0))], 0, &file, "s");
        assert!(matches!(kept[0].values, Values::Memory(_)));
    }
}
