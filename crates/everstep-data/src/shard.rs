//! Packed token shards: a small header, then little-endian tokens.
//!
//! ```text
//! 0..8   "EVERTOKS"      8..12  version, u32      12..16  bytes of a token (2 or 4), u32      16..24  tokens, u64
//! 24..   tokens
//! ```

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{DataError, IoContext};
use crate::manifest::{ShardManifest, SplitManifest};
use crate::mapped;

const MAGIC: &[u8; 8] = b"EVERTOKS";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 24;

/// Tokens of a full shard: 256 MiB of 2-byte tokens, so that a shard is a handy unit to copy and verify.
pub(crate) const SHARD_TOKENS: u64 = 1 << 27;

/// The two parts of a dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// What the model learns from.
    Train,
    /// What is held out.
    Validation,
}

impl Split {
    /// The name in file names: `train` or `validation`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
        }
    }
}

/// Bytes that a token takes in a shard: 2 where the vocabulary allows it, else 4.
pub(crate) fn token_bytes(vocab_size: usize) -> usize {
    if vocab_size <= 1 << 16 { 2 } else { 4 }
}

/// Writes one split as shards.
pub(crate) struct SplitWriter<'a> {
    dir: &'a Path,
    split: Split,
    token_bytes: usize,
    shard_tokens: u64,
    open: Option<OpenShard>,
    counts: Vec<u64>,
    hasher: blake3::Hasher,
    manifest: SplitManifest,
}

struct OpenShard {
    path: PathBuf,
    file: BufWriter<File>,
    hasher: blake3::Hasher,
    tokens: u64,
}

impl<'a> SplitWriter<'a> {
    pub(crate) fn new(dir: &'a Path, split: Split, vocab_size: usize, shard_tokens: u64) -> Self {
        Self {
            dir,
            split,
            token_bytes: token_bytes(vocab_size),
            shard_tokens,
            open: None,
            counts: vec![0; vocab_size],
            hasher: blake3::Hasher::new(),
            manifest: SplitManifest::default(),
        }
    }

    /// Counts `bytes` bytes of text, and a document if they end one.
    pub(crate) fn count_text(&mut self, bytes: u64, ends_document: bool) {
        self.manifest.documents += u64::from(ends_document);
        self.manifest.bytes += bytes;
    }

    /// Appends tokens, all below the vocabulary's size.
    pub(crate) fn push(&mut self, mut tokens: &[u32]) -> Result<(), DataError> {
        for &token in tokens {
            self.counts[token as usize] += 1;
        }
        while !tokens.is_empty() {
            let shard = match &mut self.open {
                Some(shard) => shard,
                none => none.insert(OpenShard::create(
                    self.dir,
                    self.split,
                    self.manifest.shards.len(),
                )?),
            };
            let room = (self.shard_tokens - shard.tokens).min(tokens.len() as u64) as usize;
            let (now, later) = tokens.split_at(room);
            let bytes: Vec<u8> = match self.token_bytes {
                2 => now
                    .iter()
                    .flat_map(|&token| (token as u16).to_le_bytes())
                    .collect(),
                _ => now.iter().flat_map(|token| token.to_le_bytes()).collect(),
            };
            shard.hasher.update(&bytes);
            self.hasher.update(&bytes);
            shard.file.write_all(&bytes).at("write", &shard.path)?;
            shard.tokens += room as u64;
            if shard.tokens == self.shard_tokens {
                self.close()?;
            }
            tokens = later;
        }
        Ok(())
    }

    /// Writes what is left; returns the split's description and how often each token occurs.
    pub(crate) fn finish(mut self) -> Result<(SplitManifest, Vec<u64>), DataError> {
        self.close()?;
        self.manifest.digest = self.hasher.finalize().to_hex().to_string();
        Ok((self.manifest, self.counts))
    }

    fn close(&mut self) -> Result<(), DataError> {
        let Some(mut shard) = self.open.take() else {
            return Ok(());
        };
        let path = &shard.path;
        let mut header = Vec::with_capacity(HEADER_BYTES);
        header.extend(MAGIC);
        header.extend(VERSION.to_le_bytes());
        header.extend((self.token_bytes as u32).to_le_bytes());
        header.extend(shard.tokens.to_le_bytes());
        shard.file.seek(SeekFrom::Start(0)).at("write", path)?;
        shard.file.write_all(&header).at("write", path)?;
        shard.file.flush().at("write", path)?;
        shard.file.get_ref().sync_all().at("write", path)?;
        self.manifest.tokens += shard.tokens;
        self.manifest.shards.push(ShardManifest {
            file: file_name(self.split, self.manifest.shards.len()),
            tokens: shard.tokens,
            digest: shard.hasher.finalize().to_hex().to_string(),
        });
        Ok(())
    }
}

impl OpenShard {
    fn create(dir: &Path, split: Split, index: usize) -> Result<Self, DataError> {
        let path = dir.join(file_name(split, index));
        let mut file = BufWriter::new(File::create(&path).at("create", &path)?);
        file.write_all(&[0; HEADER_BYTES]).at("write", &path)?;
        Ok(Self {
            path,
            file,
            hasher: blake3::Hasher::new(),
            tokens: 0,
        })
    }
}

fn file_name(split: Split, index: usize) -> String {
    format!("{}-{index:05}.tokens", split.name())
}

/// The tokens of one split, memory-mapped.
#[derive(Debug)]
pub(crate) struct TokenStore {
    shards: Vec<Shard>,
    tokens: u64,
    token_bytes: usize,
    vocab_size: u32,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
    first: u64,
    tokens: u64,
}

impl TokenStore {
    /// Opens the shards that `manifest` lists and checks their headers and lengths against it.
    pub(crate) fn open(
        dir: &Path,
        manifest: &SplitManifest,
        vocab_size: usize,
    ) -> Result<Self, DataError> {
        let token_bytes = token_bytes(vocab_size);
        let mut store = Self {
            shards: Vec::new(),
            tokens: 0,
            token_bytes,
            vocab_size: vocab_size as u32,
        };
        for entry in &manifest.shards {
            let path = dir.join(&entry.file);
            let map = mapped::map(&path)?;
            check_header(&path, &map, token_bytes, entry.tokens)?;
            store.shards.push(Shard {
                path,
                map,
                first: store.tokens,
                tokens: entry.tokens,
            });
            store.tokens += entry.tokens;
        }
        Ok(store)
    }

    /// Tokens of the split.
    pub(crate) fn len(&self) -> u64 {
        self.tokens
    }

    /// Appends the tokens `start..start + count` to `out`; the range must lie inside the split.
    pub(crate) fn read(
        &self,
        start: u64,
        count: usize,
        out: &mut Vec<u32>,
    ) -> Result<(), DataError> {
        let end = start + count as u64;
        assert!(
            end <= self.tokens,
            "tokens {start}..{end} of {}",
            self.tokens
        );
        let mut at = start;
        let mut index = self
            .shards
            .partition_point(|shard| shard.first + shard.tokens <= start);
        while at < end {
            let shard = &self.shards[index];
            let (from, to) = (at - shard.first, (end - shard.first).min(shard.tokens));
            let width = self.token_bytes;
            let bytes = &shard.map
                [HEADER_BYTES + from as usize * width..HEADER_BYTES + to as usize * width];
            let known = out.len();
            match width {
                2 => out.extend(
                    bytes
                        .chunks_exact(2)
                        .map(|b| u32::from(u16::from_le_bytes([b[0], b[1]]))),
                ),
                _ => out.extend(
                    bytes
                        .chunks_exact(4)
                        .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])),
                ),
            }
            // A flipped bit on disk must not become an index outside the model's embedding.
            if let Some(token) = out[known..].iter().find(|&&token| token >= self.vocab_size) {
                return Err(DataError::damaged(
                    &shard.path,
                    format!(
                        "holds token {token}, but the vocabulary has {}",
                        self.vocab_size
                    ),
                ));
            }
            at = shard.first + to;
            index += 1;
        }
        Ok(())
    }

    /// Reads every shard and compares its digest.
    pub(crate) fn verify(&self, manifest: &SplitManifest) -> Result<(), DataError> {
        for (shard, entry) in self.shards.iter().zip(&manifest.shards) {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&shard.map[HEADER_BYTES..]);
            let found = hasher.finalize().to_hex();
            if found.as_str() != entry.digest {
                return Err(DataError::damaged(
                    &shard.path,
                    format!("has digest {found}, expected {}", entry.digest),
                ));
            }
        }
        Ok(())
    }
}

fn check_header(
    path: &Path,
    bytes: &[u8],
    token_bytes: usize,
    tokens: u64,
) -> Result<(), DataError> {
    let word =
        |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    if bytes.len() < HEADER_BYTES || &bytes[..8] != MAGIC {
        return Err(DataError::damaged(path, "is not a token shard"));
    }
    if word(8) != VERSION {
        return Err(DataError::damaged(
            path,
            format!("has format version {}, expected {VERSION}", word(8)),
        ));
    }
    if word(12) as usize != token_bytes {
        return Err(DataError::damaged(
            path,
            format!("has tokens of {} bytes, expected {token_bytes}", word(12)),
        ));
    }
    let count = u64::from(word(16)) | u64::from(word(20)) << 32;
    if count != tokens {
        return Err(DataError::damaged(
            path,
            format!("says it has {count} tokens, expected {tokens}"),
        ));
    }
    let expected = tokens
        .checked_mul(token_bytes as u64)
        .and_then(|size| size.checked_add(HEADER_BYTES as u64));
    if expected != Some(bytes.len() as u64) {
        return Err(DataError::damaged(
            path,
            format!(
                "is {} bytes long, which is not {tokens} tokens",
                bytes.len()
            ),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_cross_shard_borders_and_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for vocab_size in [1000, 70_000] {
            let mut writer = SplitWriter::new(dir.path(), Split::Train, vocab_size, 10);
            let tokens: Vec<u32> = (0..33).map(|i| i * 30).collect();
            writer.push(&tokens[..15]).unwrap();
            writer.push(&tokens[15..]).unwrap();
            let (manifest, counts) = writer.finish().unwrap();
            assert_eq!(
                (manifest.tokens, manifest.shards.len(), counts[30]),
                (33, 4, 1)
            );
            let store = TokenStore::open(dir.path(), &manifest, vocab_size).unwrap();
            for (start, count) in [(0, 33), (9, 2), (10, 10), (29, 4), (33, 0)] {
                let mut out = Vec::new();
                store.read(start as u64, count, &mut out).unwrap();
                assert_eq!(out, tokens[start..start + count]);
            }
            store.verify(&manifest).unwrap();

            let path = dir.path().join("train-00003.tokens");
            let good = std::fs::read(&path).unwrap();
            let open = |bytes: &[u8]| {
                std::fs::write(&path, bytes).unwrap();
                TokenStore::open(dir.path(), &manifest, vocab_size)
            };
            assert!(
                open(&good[..good.len() - 1])
                    .unwrap_err()
                    .to_string()
                    .contains("is not 3 tokens")
            );
            assert!(
                open(b"EVERTOKS")
                    .unwrap_err()
                    .to_string()
                    .contains("is not a token shard")
            );
            assert!(open(&[]).is_err());
            let mut flipped = good.clone();
            flipped[HEADER_BYTES + 1] ^= 0x40;
            let store = open(&flipped).unwrap();
            assert!(
                store
                    .verify(&manifest)
                    .unwrap_err()
                    .to_string()
                    .contains("has digest")
            );
            if vocab_size == 1000 {
                let error = store.read(30, 1, &mut Vec::new()).unwrap_err().to_string();
                assert!(error.contains("but the vocabulary has 1000"), "{error}");
            }
            open(&good).unwrap();
        }
    }
}
