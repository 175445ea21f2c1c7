//! Blocks and their safetensors form.

use std::fmt::Write as _;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::digest::{self, BlockHasher, Digest, HASH_BYTES, extend_le};
use crate::manifest::BlockEntry;
use crate::object_file::{FileBlock, ObjectFile};

/// The tensors of a block, in the order in which they stand in an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Parameters (master weights).
    Param,
    /// First moments.
    M,
    /// Second moments.
    V,
    /// Running mean of the parameters. A block without one has no such tensor.
    Ema,
}

impl Part {
    /// All of them, in their order.
    pub const ALL: [Self; 4] = [Self::Param, Self::M, Self::V, Self::Ema];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Param => "param",
            Self::M => "m",
            Self::V => "v",
            Self::Ema => "ema",
        }
    }
}

/// A block that is to be written, wherever its values are: in memory ([`BlockState`]), in a file, on a device.
///
/// It is read from front to back several times (for the digests and for the upload), at most some megabytes at once, and must not
/// change meanwhile.
pub trait BlockSource: Sync {
    /// The block.
    fn block(&self) -> u32;

    /// How many values a part has; 0 if there are none.
    fn len(&self, part: Part) -> usize;

    /// Appends some values of a part, f32 little-endian.
    ///
    /// # Errors
    /// Whatever keeps them from being read; the write ends with it.
    fn read(&self, part: Part, values: Range<usize>, bytes: &mut Vec<u8>) -> io::Result<()>;

    /// All values of a part, if they are in memory as they will be written; it saves a copy.
    fn memory(&self, part: Part) -> Option<&[u8]> {
        let _ = part;
        None
    }

    /// The digests of the parameters ([`param_digest`](crate::param_digest)) and of the optimizer's state
    /// ([`optimizer_digest`](crate::optimizer_digest)), if they are known; it saves reading everything once.
    fn digests(&self) -> Option<[Digest; 2]> {
        None
    }

    /// Where it is, if it waits in a file that may be stored as it is.
    fn in_file(&self) -> Option<&FileBlock> {
        None
    }

    /// [`BlockState::extra`].
    fn extra(&self) -> &str;
}

/// Parameters and optimizer state of one block, float32.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BlockState {
    /// The block.
    pub block: u32,
    /// Parameters (master weights).
    pub param: Vec<f32>,
    /// First moments, in words of four bytes; empty if the optimizer keeps none.
    pub m: Vec<f32>,
    /// Second moments, likewise.
    pub v: Vec<f32>,
    /// Running mean of the parameters; empty if there is none.
    pub ema: Vec<f32>,
    /// Whatever else belongs to the block, in some bytes of text; it stands in the manifest. The store does not look inside.
    pub extra: String,
}

impl BlockState {
    fn part(&self, part: Part) -> &[f32] {
        match part {
            Part::Param => &self.param,
            Part::M => &self.m,
            Part::V => &self.v,
            Part::Ema => &self.ema,
        }
    }
}

impl BlockSource for BlockState {
    fn block(&self) -> u32 {
        self.block
    }

    fn len(&self, part: Part) -> usize {
        self.part(part).len()
    }

    fn read(&self, part: Part, values: Range<usize>, bytes: &mut Vec<u8>) -> io::Result<()> {
        extend_le(bytes, &self.part(part)[values]);
        Ok(())
    }

    fn memory(&self, part: Part) -> Option<&[u8]> {
        Some(bytemuck::cast_slice(self.part(part)))
    }

    fn extra(&self) -> &str {
        &self.extra
    }
}

/// What a manifest says of `blocks`, but for their places in an object; other tasks run now and then.
pub(crate) async fn entries<B: BlockSource>(blocks: &[&B]) -> io::Result<Vec<BlockEntry>> {
    let mut entries = Vec::with_capacity(blocks.len());
    for block in blocks {
        entries.push(entry(*block).await?);
    }
    Ok(entries)
}

async fn entry<B: BlockSource>(block: &B) -> io::Result<BlockEntry> {
    let [param_digest, optimizer_digest] = match block.digests() {
        Some(digests) => digests,
        None => digests_of(block).await?,
    };
    Ok(BlockEntry {
        block: block.block(),
        offset: 0,
        param_len: block.len(Part::Param) as u64,
        m_len: block.len(Part::M) as u64,
        v_len: block.len(Part::V) as u64,
        ema_len: block.len(Part::Ema) as u64,
        extra: block.extra().to_owned(),
        param_digest,
        optimizer_digest,
    })
}

async fn digests_of<B: BlockSource>(block: &B) -> io::Result<[Digest; 2]> {
    let (mut hashers, mut chunk) = (BlockHasher::default(), Vec::new());
    for part in Part::ALL {
        let hasher = hashers.begin(part, block.len(part));
        if let Some(bytes) = block.memory(part) {
            digest::update(hasher, bytes).await;
            continue;
        }
        let mut cursor = Cursor::over(vec![(block, part)]);
        while cursor.next_chunk(HASH_BYTES, &mut chunk)? {
            hasher.update(&chunk);
            tokio::task::yield_now().await;
        }
    }
    Ok(hashers.finalize())
}

/// A safetensors file that is produced piece by piece: the header is in memory, the tensors are the caller's.
#[derive(Debug)]
pub(crate) struct ObjectImage<'a, B> {
    header: Vec<u8>,
    blocks: Vec<&'a B>,
    len: u64,
}

impl<'a, B: BlockSource> ObjectImage<'a, B> {
    /// `blocks` ascending by block.
    pub(crate) fn new(step: u64, blocks: Vec<&'a B>) -> Self {
        let mut json =
            format!("{{\"__metadata__\":{{\"format\":\"everstep-blocks-1\",\"step\":\"{step}\"}}");
        let mut offset = 0u64;
        for block in &blocks {
            for part in Part::ALL {
                let (id, len) = (block.block(), block.len(part));
                if part == Part::Ema && len == 0 {
                    continue;
                }
                let end = offset + 4 * len as u64;
                write!(
                    json,
                    ",\"block.{id}.{}\":{{\"dtype\":\"F32\",\"shape\":[{len}],\"data_offsets\":[{offset},{end}]}}",
                    part.name()
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

    /// What stands before the tensors.
    pub(crate) fn into_header(self) -> Vec<u8> {
        self.header
    }

    /// The file that holds the very bytes of the object, if there is one.
    pub(crate) fn file(&self) -> Option<&'a Arc<ObjectFile>> {
        let file = self.blocks.first()?.in_file()?.object();
        let mut end = self.header.len() as u64;
        for block in &self.blocks {
            let place = block.in_file()?;
            if !Arc::ptr_eq(file, place.object()) || place.begin() != end {
                return None;
            }
            let lens = Part::ALL.map(|part| 4 * block.len(part) as u64);
            end += lens.iter().sum::<u64>();
        }
        (file.header() == self.header).then_some(file)
    }

    /// Starts reading at the first byte.
    pub(crate) fn cursor(&self) -> Cursor<'_, B> {
        let parts = |block: &&'a B| Part::ALL.map(|part| (*block, part));
        Cursor {
            header: &self.header,
            ..Cursor::over(self.blocks.iter().flat_map(parts).collect())
        }
    }

    /// The object's digest, if `entries` are those of its blocks. It is known before the object has been read.
    pub(crate) fn digest(&self, entries: &[BlockEntry]) -> Digest {
        let digests: Vec<_> = entries
            .iter()
            .map(|entry| [entry.param_digest, entry.optimizer_digest])
            .collect();
        object_digest(&self.header, &digests)
    }

    /// Says in the entries of its blocks, in the same order, where they are.
    pub(crate) fn place(&self, entries: &mut [BlockEntry]) {
        let mut offset = self.header.len() as u64;
        for entry in entries {
            entry.offset = offset;
            offset += 4 * entry.lens().iter().sum::<u64>();
        }
    }
}

/// The digest of an object: BLAKE3 of its header and of the 32 raw bytes of both digests of each block, in the order of the bytes. So it says
/// everything that the bytes say, and takes no second look at them.
pub(crate) fn object_digest<'d>(
    header: &[u8],
    digests: impl IntoIterator<Item = &'d [Digest; 2]>,
) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(header);
    for digest in digests.into_iter().flatten() {
        hasher.update(digest.as_bytes());
    }
    hasher.finalize().into()
}

/// Reads an [`ObjectImage`] from front to back.
#[derive(Debug)]
pub(crate) struct Cursor<'a, B> {
    header: &'a [u8],
    tensors: Vec<(&'a B, Part)>,
    tensor: usize,
    value: usize,
}

impl<'a, B: BlockSource> Cursor<'a, B> {
    fn over(tensors: Vec<(&'a B, Part)>) -> Self {
        Self {
            header: &[],
            tensors,
            tensor: 0,
            value: 0,
        }
    }

    /// Replaces `chunk` by the next `bytes` bytes (rounded up to whole values; at the end fewer); false after the last one.
    pub(crate) fn next_chunk(&mut self, bytes: usize, chunk: &mut Vec<u8>) -> io::Result<bool> {
        chunk.clear();
        while chunk.len() < bytes {
            let room = bytes - chunk.len();
            if !self.header.is_empty() {
                let (now, later) = self.header.split_at(room.min(self.header.len()));
                chunk.extend_from_slice(now);
                self.header = later;
                continue;
            }
            let Some(&(block, part)) = self.tensors.get(self.tensor) else {
                break;
            };
            let rest = block.len(part) - self.value;
            if rest == 0 {
                (self.tensor, self.value) = (self.tensor + 1, 0);
                continue;
            }
            let count = room.div_ceil(4).min(rest);
            let end = chunk.len() + 4 * count;
            block.read(part, self.value..self.value + count, chunk)?;
            if chunk.len() != end {
                // What comes after it would stand at the wrong place.
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.value += count;
        }
        Ok(!chunk.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;
    use crate::digest::{from_le, optimizer_digest, param_digest};

    fn read_all(image: &ObjectImage<'_, BlockState>, chunk_bytes: usize) -> Vec<u8> {
        let (mut cursor, mut chunk, mut all) = (image.cursor(), Vec::new(), Vec::new());
        while cursor.next_chunk(chunk_bytes, &mut chunk).unwrap() {
            all.extend(&chunk);
        }
        all
    }

    #[test]
    fn the_image_is_a_safetensors_file_in_chunks_of_any_size() {
        let blocks = [
            BlockState {
                block: 3,
                param: vec![1.0, -2.5, f32::MIN_POSITIVE],
                ..BlockState::default()
            },
            BlockState {
                block: 12,
                param: vec![0.25; 7],
                m: vec![3.0; 7],
                v: vec![4.0; 2],
                ema: vec![0.5; 7],
                ..BlockState::default()
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
        assert_eq!(file.tensor("block.12.ema").unwrap().shape(), [7]);
        assert!(file.tensor("block.3.ema").is_err());
    }

    #[tokio::test]
    async fn entries_point_at_the_bytes() {
        let block = BlockState {
            block: 0,
            param: vec![1.0, 2.0],
            m: vec![3.0],
            v: vec![4.0],
            ema: vec![5.0, 6.0],
            extra: "e".to_owned(),
        };
        let image = ObjectImage::new(1, vec![&block]);
        let bytes = read_all(&image, 64);
        let mut entries = entries(&[&block]).await.unwrap();
        image.place(&mut entries);
        let entry = entries[0].clone();
        let (start, end) = (entry.offset as usize, entry.end().unwrap() as usize);
        assert_eq!(from_le(&bytes[start..end]), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(entry.param_digest, param_digest(&block.param));
        assert_eq!(
            entry.optimizer_digest,
            optimizer_digest(&block.m, &block.v, &block.ema)
        );
        let digest = image.digest(&entries);
        entries[0].optimizer_digest = entry.param_digest;
        assert_ne!(image.digest(&entries), digest);
        let other = ObjectImage::new(2, vec![&block]);
        assert_ne!(other.digest(&entries), image.digest(&entries));
    }
}
