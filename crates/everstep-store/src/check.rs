//! Compares an object that streams by with its digest: each byte is hashed once, as part of its block.
//!
//! The digest of an object is that of its header and of the digests of its blocks. What blocks there are the header says, so that an object is
//! verified as a whole even where a manifest takes only some of its blocks.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::block::{Part, object_digest};
use crate::digest::{BlockHasher, Digest};
use crate::error::DamageReason;
use crate::manifest::{BlockEntry, CheckpointObject};

/// Bytes before a header that say how long it is.
const LENGTH_BYTES: usize = 8;

/// Parts that every block has, if only empty ones.
const REQUIRED_PARTS: usize = 3;

/// What streams by of an object.
pub(crate) struct ObjectCheck<'a> {
    object: &'a CheckpointObject,
    /// The header as far as it was read, with its length.
    header: Vec<u8>,
    /// What follows the header, if it makes sense.
    contents: Option<Contents>,
}

impl<'a> ObjectCheck<'a> {
    pub(crate) fn new(object: &'a CheckpointObject) -> Self {
        Self {
            object,
            header: Vec::new(),
            contents: None,
        }
    }

    /// Takes the next bytes.
    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        if self.contents.is_none() {
            for goal in [Some(LENGTH_BYTES), None] {
                let goal = goal.unwrap_or_else(|| self.header_end());
                let missing = goal.saturating_sub(self.header.len());
                let (now, later) = bytes.split_at(missing.min(bytes.len()));
                self.header.extend_from_slice(now);
                bytes = later;
            }
            if self.header.len() < self.header_end() {
                return;
            }
            let data = self.object.bytes - self.header.len() as u64;
            self.contents = Contents::of(&self.header[LENGTH_BYTES..], data);
            if self.contents.is_none() {
                // Nothing that follows can make it right.
                self.contents = Some(Contents::default());
            }
        }
        if let Some(contents) = &mut self.contents {
            contents.update(bytes);
        }
    }

    /// Where the header ends, at the end of the object at the latest.
    fn header_end(&self) -> usize {
        let Some(length) = self.header.first_chunk() else {
            return LENGTH_BYTES;
        };
        let end = u64::from_le_bytes(*length).saturating_add(LENGTH_BYTES as u64);
        usize::try_from(end.min(self.object.bytes)).unwrap_or(usize::MAX)
    }

    /// What is wrong with all of them.
    pub(crate) fn finish(self) -> Option<DamageReason> {
        let found = self.contents.map(Contents::finish).unwrap_or_default();
        let digests = found.iter().map(|block| &block.digests);
        let found_digest = object_digest(&self.header, digests);
        let expected = self.object.blake3;
        let by_id: BTreeMap<u32, &Found> = found.iter().map(|block| (block.block, block)).collect();
        let mut damaged = self.object.blocks.iter().filter_map(|entry| {
            Some((
                entry.block,
                difference(entry, by_id.get(&entry.block).copied())?,
            ))
        });
        if found_digest != expected {
            let mut blocks: Vec<u32> = damaged.map(|(block, _)| block).collect();
            blocks.sort_unstable();
            return Some(DamageReason::Digest {
                expected,
                found: found_digest,
                blocks,
            });
        }
        damaged.next().map(|(_, reason)| reason)
    }
}

/// How a block differs from what a manifest says of it.
fn difference(entry: &BlockEntry, found: Option<&Found>) -> Option<DamageReason> {
    let none = Digest::from_bytes([0; 32]);
    let [param, optimizer] = found.map_or([none; 2], |found| found.digests);
    [
        ("parameters", entry.param_digest, param),
        ("optimizer", entry.optimizer_digest, optimizer),
    ]
    .into_iter()
    .find(|(_, expected, found)| expected != found)
    .map(|(part, expected, found)| DamageReason::Block {
        block: entry.block,
        part,
        expected,
        found,
    })
}

/// A block as it is in the object.
struct Found {
    block: u32,
    /// Of parameters and of the optimizer's state.
    digests: [Digest; 2],
}

/// The tensors behind a header, in their order, and how far they have streamed by.
#[derive(Default)]
struct Contents {
    /// Lengths in bytes of the parts of each block.
    blocks: Vec<(u32, [u64; 4])>,
    /// The block and its part that come next.
    block: usize,
    part: usize,
    /// Bytes of that part which are still to come.
    missing: u64,
    hashers: BlockHasher,
    done: Vec<Found>,
}

#[derive(Deserialize)]
struct TensorHeader {
    data_offsets: [u64; 2],
}

impl Contents {
    /// What the JSON of a header says of `data` bytes; `None` if it is none of ours.
    fn of(json: &[u8], data: u64) -> Option<Self> {
        let table: BTreeMap<String, serde_json::Value> = serde_json::from_slice(json).ok()?;
        let mut tensors = Vec::new();
        for (name, value) in table {
            if name == "__metadata__" {
                continue;
            }
            let [from, to] = TensorHeader::deserialize(value).ok()?.data_offsets;
            let (block, part) = name.strip_prefix("block.")?.split_once('.')?;
            let part = Part::ALL.iter().position(|it| it.name() == part)?;
            tensors.push((from, to, block.parse().ok()?, part));
        }
        // An empty tensor begins where its neighbour does.
        tensors.sort_unstable_by_key(|&(from, to, block, part)| (from, to, block, part));
        let mut blocks: Vec<(u32, [u64; 4])> = Vec::new();
        let (mut end, mut num_parts) = (0, REQUIRED_PARTS);
        for (from, to, block, part) in tensors {
            if from != end || to < from {
                return None;
            }
            end = to;
            match blocks.last_mut() {
                Some((last, lens)) if part == num_parts && *last == block => {
                    lens[part] = to - from;
                    num_parts += 1;
                }
                _ if part == 0 && num_parts >= REQUIRED_PARTS => {
                    blocks.push((block, [to - from, 0, 0, 0]));
                    num_parts = 1;
                }
                _ => return None,
            }
        }
        if end != data || num_parts < REQUIRED_PARTS {
            return None;
        }
        let mut contents = Self {
            blocks,
            ..Self::default()
        };
        contents.begin();
        Some(contents)
    }

    /// Begins with the part that comes next, and ends those that are empty.
    fn begin(&mut self) {
        while let Some((block, lens)) = self.blocks.get(self.block) {
            let Some(&len) = lens.get(self.part) else {
                self.done.push(Found {
                    block: *block,
                    digests: std::mem::take(&mut self.hashers).finalize(),
                });
                (self.block, self.part) = (self.block + 1, 0);
                continue;
            };
            let part = Part::ALL[self.part];
            self.hashers.begin(part, (len / 4) as usize);
            self.missing = len;
            if len > 0 {
                return;
            }
            self.part += 1;
        }
    }

    fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && self.block < self.blocks.len() {
            let len = usize::try_from(self.missing).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(len.min(bytes.len()));
            self.hashers.of(Part::ALL[self.part]).update(now);
            self.missing -= now.len() as u64;
            bytes = later;
            if self.missing == 0 {
                self.part += 1;
                self.begin();
            }
        }
    }

    fn finish(self) -> Vec<Found> {
        self.done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{BlockState, ObjectImage, entries};

    async fn object() -> (CheckpointObject, Vec<u8>) {
        let block = |block, param: Vec<f32>, m, v| BlockState {
            block,
            param,
            m,
            v,
            ..BlockState::default()
        };
        let blocks = [
            block(2, vec![1.0, 2.0, 3.0], vec![4.0], vec![5.0, 6.0]),
            BlockState {
                ema: vec![0.5; 5],
                ..block(4, vec![0.25; 5], vec![], vec![])
            },
            block(5, vec![7.0], vec![], vec![]),
            block(6, vec![8.0; 40], vec![], vec![9.0]),
        ];
        let blocks: Vec<&BlockState> = blocks.iter().collect();
        let mut entries = entries(&blocks).await.unwrap();
        let image = ObjectImage::new(7, blocks);
        image.place(&mut entries);
        let (mut cursor, mut bytes) = (image.cursor(), Vec::new());
        cursor.next_chunk(usize::MAX, &mut bytes).unwrap();
        let object = CheckpointObject {
            key: "checkpoints/7/blocks.st".to_owned(),
            bytes: bytes.len() as u64,
            blake3: image.digest(&entries),
            blocks: entries,
        };
        (object, bytes)
    }

    fn check(object: &CheckpointObject, bytes: &[u8], chunk: usize) -> Option<DamageReason> {
        let mut check = ObjectCheck::new(object);
        bytes.chunks(chunk).for_each(|chunk| check.update(chunk));
        check.finish()
    }

    #[tokio::test]
    async fn chunks_of_any_size_verify() {
        let (mut object, bytes) = object().await;
        for chunk in [1, 3, 7, 8, 64, 1000, bytes.len()] {
            assert_eq!(check(&object, &bytes, chunk), None, "{chunk}");
        }
        // A manifest that takes one block is content with the whole object as well.
        object.blocks.remove(0);
        assert_eq!(check(&object, &bytes, 16), None);
        object.blocks[0].param_digest = object.blocks[1].param_digest;
        let reason = check(&object, &bytes, 16);
        assert!(matches!(reason, Some(DamageReason::Block { block: 4, .. })));
    }

    #[tokio::test]
    async fn every_bit_and_every_length_counts() {
        let (object, bytes) = object().await;
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1 << (at % 8);
            let reason = check(&object, &bytes, 100);
            assert!(matches!(reason, Some(DamageReason::Digest { .. })), "{at}");
            assert!(check(&object, &bytes[..at], 100).is_some(), "{at}");
        }
        let last = bytes.len() - 1;
        let mut bytes = bytes;
        bytes[last] ^= 1;
        let Some(DamageReason::Digest { blocks, .. }) = check(&object, &bytes, 100) else {
            panic!("a flipped bit was not found");
        };
        assert_eq!(blocks, [6]);
    }
}
