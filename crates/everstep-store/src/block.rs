//! Blocks and their safetensors form.

use std::fmt::Write as _;

use crate::digest::{Digest, extend_le, optimizer_digest, param_digest};
use crate::manifest::BlockEntry;

/// Bytes hashed between two chances for other tasks to run; about a millisecond.
const HASH_BYTES: usize = 1 << 20;

/// Parameters and optimizer state of one block, float32.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BlockState {
    /// The block.
    pub block: u32,
    /// Parameters (master weights).
    pub param: Vec<f32>,
    /// First moments; empty if the optimizer keeps none.
    pub m: Vec<f32>,
    /// Second moments; empty if the optimizer keeps none.
    pub v: Vec<f32>,
    /// Whatever else belongs to the block, in some bytes of text; it stands in the manifest. The store does not look inside.
    pub extra: String,
}

/// A safetensors file that is produced piece by piece: the header is in memory, the tensors are the caller's.
#[derive(Debug)]
pub(crate) struct ObjectImage<'a> {
    header: Vec<u8>,
    blocks: Vec<&'a BlockState>,
    len: u64,
}

impl<'a> ObjectImage<'a> {
    /// `blocks` ascending by block.
    pub(crate) fn new(step: u64, blocks: Vec<&'a BlockState>) -> Self {
        let mut json =
            format!("{{\"__metadata__\":{{\"format\":\"everstep-blocks-1\",\"step\":\"{step}\"}}");
        let mut offset = 0u64;
        for block in &blocks {
            for (part, values) in [("param", &block.param), ("m", &block.m), ("v", &block.v)] {
                let (id, len) = (block.block, values.len());
                let end = offset + 4 * len as u64;
                write!(
                    json,
                    ",\"block.{id}.{part}\":{{\"dtype\":\"F32\",\"shape\":[{len}],\"data_offsets\":[{offset},{end}]}}"
                )
                .expect("writing to a string cannot fail");
                offset = end;
            }
        }
        json.push('}');
        // Spaces after the header keep the tensors aligned to 8 bytes, as the format asks.
        while json.len() % 8 != 0 {
            json.push(' ');
        }
        let mut header = (json.len() as u64).to_le_bytes().to_vec();
        header.extend(json.into_bytes());
        let len = header.len() as u64 + offset;
        Self {
            header,
            blocks,
            len,
        }
    }

    /// The object's size in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Starts reading at the first byte.
    pub(crate) fn cursor(&self) -> Cursor<'_> {
        let tensors = self
            .blocks
            .iter()
            .flat_map(|block| [&block.param[..], &block.m, &block.v])
            .collect();
        Cursor {
            header: &self.header,
            tensors,
            tensor: 0,
            value: 0,
        }
    }

    /// The digest of the whole object.
    pub(crate) async fn digest(&self) -> Digest {
        let mut hasher = blake3::Hasher::new();
        let mut cursor = self.cursor();
        while let Some(chunk) = cursor.next_chunk(HASH_BYTES) {
            hasher.update(&chunk);
            tokio::task::yield_now().await;
        }
        hasher.finalize().into()
    }

    /// What the manifest says about the blocks.
    pub(crate) async fn entries(&self) -> Vec<BlockEntry> {
        let mut offset = self.header.len() as u64;
        let mut entries = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let entry = BlockEntry {
                block: block.block,
                offset,
                param_len: block.param.len() as u64,
                m_len: block.m.len() as u64,
                v_len: block.v.len() as u64,
                extra: block.extra.clone(),
                param_digest: param_digest(&block.param),
                optimizer_digest: optimizer_digest(&block.m, &block.v),
            };
            offset += 4 * (entry.param_len + entry.m_len + entry.v_len);
            entries.push(entry);
            tokio::task::yield_now().await;
        }
        entries
    }
}

/// Reads an [`ObjectImage`] from front to back.
#[derive(Debug)]
pub(crate) struct Cursor<'a> {
    header: &'a [u8],
    tensors: Vec<&'a [f32]>,
    tensor: usize,
    value: usize,
}

impl Cursor<'_> {
    /// The next `bytes` bytes (rounded up to whole values; at the end fewer), `None` after the last one.
    pub(crate) fn next_chunk(&mut self, bytes: usize) -> Option<Vec<u8>> {
        let mut chunk = Vec::new();
        while chunk.len() < bytes {
            let room = bytes - chunk.len();
            if !self.header.is_empty() {
                let (now, later) = self.header.split_at(room.min(self.header.len()));
                chunk.extend_from_slice(now);
                self.header = later;
                continue;
            }
            let Some(rest) = self
                .tensors
                .get(self.tensor)
                .map(|values| &values[self.value..])
            else {
                break;
            };
            if rest.is_empty() {
                (self.tensor, self.value) = (self.tensor + 1, 0);
                continue;
            }
            let count = room.div_ceil(4).min(rest.len());
            extend_le(&mut chunk, &rest[..count]);
            self.value += count;
        }
        (!chunk.is_empty()).then_some(chunk)
    }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;
    use crate::digest::from_le;

    fn read_all(image: &ObjectImage<'_>, chunk_bytes: usize) -> Vec<u8> {
        let mut cursor = image.cursor();
        std::iter::from_fn(|| cursor.next_chunk(chunk_bytes))
            .flatten()
            .collect()
    }

    #[test]
    fn the_image_is_a_safetensors_file_in_chunks_of_any_size() {
        let blocks = [
            BlockState {
                block: 3,
                param: vec![1.0, -2.5, f32::MIN_POSITIVE],
                m: vec![],
                v: vec![],
                extra: String::new(),
            },
            BlockState {
                block: 12,
                param: vec![0.25; 7],
                m: vec![3.0; 7],
                v: vec![4.0; 2],
                extra: String::new(),
            },
        ];
        let image = ObjectImage::new(40, blocks.iter().collect());
        let bytes = read_all(&image, 1 << 20);
        assert_eq!(bytes.len() as u64, image.len());
        for chunk_bytes in [1, 3, 4, 8, 17, 100, 4096] {
            assert_eq!(read_all(&image, chunk_bytes), bytes, "{chunk_bytes}");
        }
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(
            from_le(file.tensor("block.3.param").unwrap().data()),
            blocks[0].param
        );
        assert_eq!(file.tensor("block.3.m").unwrap().data().len(), 0);
        assert_eq!(
            from_le(file.tensor("block.12.v").unwrap().data()),
            blocks[1].v
        );
        assert_eq!(file.tensor("block.12.param").unwrap().shape(), [7]);
    }

    #[tokio::test]
    async fn entries_point_at_the_bytes() {
        let block = BlockState {
            block: 0,
            param: vec![1.0, 2.0],
            m: vec![3.0],
            v: vec![4.0],
            extra: "e".to_owned(),
        };
        let image = ObjectImage::new(1, vec![&block]);
        let bytes = read_all(&image, 64);
        let entry = &image.entries().await[0];
        let (start, end) = (entry.offset as usize, entry.end().unwrap() as usize);
        assert_eq!(from_le(&bytes[start..end]), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(entry.param_digest, param_digest(&block.param));
        assert_eq!(image.digest().await, Digest::of(&bytes));
    }
}
