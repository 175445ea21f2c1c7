//! BLAKE3 digests of blocks and of whole checkpoints.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::block::Part;

// Values are stored little-endian, and are their own bytes here.
const _: () = assert!(cfg!(target_endian = "little"));

/// Bytes hashed between two chances for other tasks to run; below a millisecond.
pub(crate) const HASH_BYTES: usize = 1 << 20;

/// A BLAKE3 digest, 32 bytes; 64 lower-case hex digits as text and in JSON.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// Takes 32 bytes that are already a digest.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(blake3::Hash::from_bytes(self.0).to_hex().as_str())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// The text is not 64 hex digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a BLAKE3 digest is 64 hex digits")]
pub struct ParseDigestError;

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Self, ParseDigestError> {
        blake3::Hash::from_hex(text)
            .map(Self::from)
            .map_err(|_| ParseDigestError)
    }
}

impl TryFrom<String> for Digest {
    type Error = ParseDigestError;

    fn try_from(text: String) -> Result<Self, ParseDigestError> {
        text.parse()
    }
}

/// The digest of a block's parameters: BLAKE3 of the values as little-endian f32 bytes.
pub fn param_digest(param: &[f32]) -> Digest {
    Digest::of(bytemuck::cast_slice(param))
}

/// The digest of a block's optimizer state:
/// BLAKE3 of `len(m) as u64 ‖ m ‖ len(v) as u64 ‖ v`, everything little-endian. Either may be empty. Then, likewise, the running mean of
/// the parameters, if there is one.
pub fn optimizer_digest(m: &[f32], v: &[f32], ema: &[f32]) -> Digest {
    let mut hasher = BlockHasher::default();
    for (part, values) in [(Part::M, m), (Part::V, v), (Part::Ema, ema)] {
        let values = bytemuck::cast_slice(values);
        hasher.begin(part, values.len() / 4).update(values);
    }
    hasher.optimizer.finalize().into()
}

/// Takes both digests of a block at once, part by part in their order.
#[derive(Debug, Default)]
pub(crate) struct BlockHasher {
    param: blake3::Hasher,
    optimizer: blake3::Hasher,
}

impl BlockHasher {
    /// Begins the next part, which has `len` values; gives what takes its bytes.
    pub(crate) fn begin(&mut self, part: Part, len: usize) -> &mut blake3::Hasher {
        let is_counted = match part {
            Part::Param => false,
            Part::M | Part::V => true,
            Part::Ema => len > 0,
        };
        if is_counted {
            self.optimizer.update(&(len as u64).to_le_bytes());
        }
        self.of(part)
    }

    /// What takes the bytes of a part that has begun.
    pub(crate) fn of(&mut self, part: Part) -> &mut blake3::Hasher {
        match part {
            Part::Param => &mut self.param,
            Part::M | Part::V | Part::Ema => &mut self.optimizer,
        }
    }

    /// [`param_digest`] and [`optimizer_digest`].
    pub(crate) fn finalize(&self) -> [Digest; 2] {
        [&self.param, &self.optimizer].map(|hasher| hasher.finalize().into())
    }
}

/// The digest of a whole model: BLAKE3 of `layout ‖ digest of block 0 ‖ digest of block 1 ‖ …`, 32 raw bytes each.
///
/// `blocks` must come in ascending block order. Which object, shard or process held a block does not enter.
pub fn combine(layout: Digest, blocks: impl IntoIterator<Item = Digest>) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(layout.as_bytes());
    for digest in blocks {
        hasher.update(digest.as_bytes());
    }
    hasher.finalize().into()
}

/// Hashes `bytes`; other tasks run now and then.
pub(crate) async fn update(hasher: &mut blake3::Hasher, bytes: &[u8]) {
    for piece in bytes.chunks(HASH_BYTES) {
        hasher.update(piece);
        tokio::task::yield_now().await;
    }
}

/// Appends `values` as little-endian bytes.
pub(crate) fn extend_le(bytes: &mut Vec<u8>, values: &[f32]) {
    bytes.extend_from_slice(bytemuck::cast_slice(values));
}

/// Reads little-endian bytes; a rest of fewer than four bytes is ignored.
#[cfg(test)]
pub(crate) fn from_le(bytes: &[u8]) -> Vec<f32> {
    bytemuck::pod_collect_to_vec(&bytes[..bytes.len() / 4 * 4])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_blake3_of_the_documented_bytes() {
        let values: Vec<f32> = (0..40_000).map(|i| i as f32 * 0.5).collect();
        let mut bytes = Vec::new();
        extend_le(&mut bytes, &values);
        assert_eq!(param_digest(&values), Digest::of(&bytes));
        assert_eq!(from_le(&bytes), values);

        let mut framed = 40_000u64.to_le_bytes().to_vec();
        framed.extend(&bytes);
        framed.extend(0u64.to_le_bytes());
        assert_eq!(optimizer_digest(&values, &[], &[]), Digest::of(&framed));
        assert_ne!(
            optimizer_digest(&values, &[], &[]),
            optimizer_digest(&[], &values, &[])
        );
        framed.extend(40_000u64.to_le_bytes());
        framed.extend(&bytes);
        let averaged = optimizer_digest(&values, &[], &values);
        assert_eq!(averaged, Digest::of(&framed));

        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        assert_eq!(
            combine(a, [b, a]),
            Digest::of(&[*a.as_bytes(), *b.as_bytes(), *a.as_bytes()].concat())
        );
    }

    #[test]
    fn text_round_trips_and_rubbish_is_refused() {
        let digest = Digest::of(b"x");
        assert_eq!(digest.to_string().parse(), Ok(digest));
        assert_eq!("zz".parse::<Digest>(), Err(ParseDigestError));
        assert!(serde_json::from_str::<Digest>("\"12\"").is_err());
    }
}
