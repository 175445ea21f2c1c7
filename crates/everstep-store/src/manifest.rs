//! `MANIFEST.json`: what a checkpoint consists of.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::check::ObjectCheck;
use crate::digest::{Digest, combine};
use crate::error::StoreError;
use crate::identity::RunIdentity;
use crate::sealed::{self, Unreadable};

/// Key of [`CheckpointManifest::metadata`] under which the mean loss of this version's evaluation stands, in decimal.
pub const EVALUATION_LOSS: &str = "evaluation_loss";

/// Before it, the digest of an object was that of its bytes.
const VERSION: u32 = 3;

/// One block inside an object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockEntry {
    /// The block.
    pub block: u32,
    /// Where its bytes start in the object; `param`, `m`, `v` and `ema` follow each other, f32 little-endian.
    pub offset: u64,
    /// Number of parameters.
    pub param_len: u64,
    /// Number of words of first moments; 0 if the optimizer keeps none.
    pub m_len: u64,
    /// Number of words of second moments; 0 if the optimizer keeps none.
    pub v_len: u64,
    /// Number of parameters of which a running mean is kept.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub ema_len: u64,
    /// [`param_digest`](crate::param_digest) of the parameters.
    pub param_digest: Digest,
    /// [`optimizer_digest`](crate::optimizer_digest) of `m`, `v` and `ema`.
    pub optimizer_digest: Digest,
    /// [`BlockState::extra`](crate::BlockState::extra).
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub extra: String,
}

// serde asks for a reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(len: &u64) -> bool {
    *len == 0
}

impl BlockEntry {
    /// Lengths of its parts, in the order of [`Part::ALL`](crate::Part::ALL).
    pub(crate) fn lens(&self) -> [u64; 4] {
        [self.param_len, self.m_len, self.v_len, self.ema_len]
    }

    /// Where the block's bytes end in the object; `None` for nonsense that overflows.
    pub(crate) fn end(&self) -> Option<u64> {
        let mut lens = self.lens().into_iter();
        let values = lens.try_fold(0u64, |sum, len| sum.checked_add(len))?;
        values.checked_mul(4)?.checked_add(self.offset)
    }
}

/// One object of a checkpoint: a safetensors file with a range of blocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointObject {
    /// Its key inside the run: `checkpoints/<step>/blocks-….st`, in the folder of the checkpoint that it was written for.
    pub key: String,
    /// Its size.
    pub bytes: u64,
    /// BLAKE3 of its header and of the two digests of each of its blocks, 32 raw bytes each, in the order in which they stand in it.
    pub blake3: Digest,
    /// What is taken from it, ascending by block; it may hold more.
    pub blocks: Vec<BlockEntry>,
}

impl CheckpointObject {
    /// Whether `bytes` are all of the object.
    pub fn is_intact(&self, bytes: &[u8]) -> bool {
        let mut check = ObjectCheck::new(self);
        check.update(bytes);
        bytes.len() as u64 == self.bytes && check.finish().is_none()
    }
}

/// The digests of a whole checkpoint.
///
/// Each is BLAKE3 of the 32 raw bytes of the layout digest followed by those of every block's digest, ascending by
/// block ([`combine`](crate::combine)); how the blocks were spread over objects, shards and processes does not enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointDigest {
    /// Over the blocks' parameter digests.
    pub parameters: Digest,
    /// Over the blocks' optimizer digests.
    pub optimizer: Digest,
}

/// What a checkpoint consists of. Its creation in the store is the commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointManifest {
    /// The step: the state after `step` applied steps.
    pub step: u64,
    /// [`RunIdentity::digest`] of the run.
    pub run_digest: Digest,
    /// [`RunIdentity::layout`] of the run.
    pub layout: Digest,
    /// How many blocks the model has; their ids are `0..num_blocks`.
    pub num_blocks: u32,
    /// Of all blocks' parameters and optimizer state.
    pub digest: CheckpointDigest,
    /// Whatever else must come back with the state (applied steps, tokens seen, …). The store does not look inside.
    pub metadata: BTreeMap<String, String>,
    /// The objects, ascending by key.
    pub objects: Vec<CheckpointObject>,
}

impl CheckpointManifest {
    /// Puts objects together to a checkpoint of `step` with blocks `0..num_blocks`.
    ///
    /// # Errors
    /// [`StoreError::InvalidCheckpoint`] unless every block is in exactly one object of this step or of an older one.
    pub fn new(
        step: u64,
        identity: &RunIdentity,
        num_blocks: u32,
        objects: Vec<CheckpointObject>,
        metadata: BTreeMap<String, String>,
    ) -> Result<Self, StoreError> {
        let objects = merged(objects);
        let digest = digest_of(step, identity.layout, num_blocks, &objects)
            .map_err(|reason| StoreError::InvalidCheckpoint { step, reason })?;
        let (run_digest, layout) = (identity.digest(), identity.layout);
        Ok(Self {
            step,
            run_digest,
            layout,
            num_blocks,
            digest,
            metadata,
            objects,
        })
    }

    /// The digest of this manifest, for ledgers and logs; `MANIFEST.json` carries it as `blake3`.
    pub fn manifest_digest(&self) -> Digest {
        sealed::digest_in(VERSION, self)
    }

    /// `MANIFEST.json`.
    pub(crate) fn encode(&self) -> Vec<u8> {
        sealed::seal_in(VERSION, self)
    }

    /// The objects that were written for older checkpoints.
    pub fn shared_objects(&self) -> impl Iterator<Item = &CheckpointObject> {
        let is_own =
            |object: &CheckpointObject| parse_key(&object.key).is_some_and(|(s, _)| s == self.step);
        self.objects.iter().filter(move |object| !is_own(object))
    }

    /// The loss of the evaluation of this version, if one was recorded ([`EVALUATION_LOSS`]) and is a number.
    pub fn evaluation_loss(&self) -> Option<f64> {
        let loss: f64 = self.metadata.get(EVALUATION_LOSS)?.parse().ok()?;
        loss.is_finite().then_some(loss)
    }

    /// Size of all objects together, shared ones too.
    pub fn bytes(&self) -> u64 {
        self.objects.iter().map(|object| object.bytes).sum()
    }

    /// Size of the objects that were written for this checkpoint.
    pub fn new_bytes(&self) -> u64 {
        let shared: u64 = self.shared_objects().map(|object| object.bytes).sum();
        self.bytes() - shared
    }

    /// Reads `MANIFEST.json` of `step` and checks that it makes sense.
    pub(crate) fn decode(step: u64, bytes: &[u8]) -> Result<Self, Unreadable> {
        let (version, manifest) = sealed::unseal_to::<Self>(VERSION, bytes)?;
        if version != VERSION {
            let reason = format!("version {version} is not read any more; allowed: {VERSION}");
            return Err(Unreadable::Damaged(reason));
        }
        manifest.check(step).map_err(Unreadable::Damaged)?;
        Ok(manifest)
    }

    fn check(&self, step: u64) -> Result<(), String> {
        if self.step != step {
            return Err(format!("step is {}, its folder says {step}", self.step));
        }
        let digest = digest_of(step, self.layout, self.num_blocks, &self.objects)?;
        if digest != self.digest {
            return Err("digest does not follow from the blocks' digests".to_owned());
        }
        Ok(())
    }
}

/// The folder of a step inside the run.
pub(crate) fn folder(step: u64) -> String {
    format!("checkpoints/{step}")
}

/// The manifest's key inside the run.
pub(crate) fn manifest_key(step: u64) -> String {
    format!("checkpoints/{step}/MANIFEST.json")
}

/// Splits `checkpoints/<step>/<file>`; `None` for anything that this crate did not write.
pub(crate) fn parse_key(key: &str) -> Option<(u64, &str)> {
    let (digits, file) = key.strip_prefix("checkpoints/")?.split_once('/')?;
    let step: u64 = digits.parse().ok()?;
    // `007` and `+7` would be another folder than the one that `folder` names.
    (step.to_string() == digits && !file.contains('/')).then_some((step, file))
}

/// Each object once, ascending by key: a writer that was asked twice reports the same again, and several writers may each share some
/// blocks of the same older object.
fn merged(mut objects: Vec<CheckpointObject>) -> Vec<CheckpointObject> {
    objects.sort_by(|a, b| a.key.cmp(&b.key));
    objects.dedup_by(|next, kept| {
        let is_same = (&next.key, next.bytes, next.blake3) == (&kept.key, kept.bytes, kept.blake3);
        if is_same {
            kept.blocks.append(&mut next.blocks);
            kept.blocks.sort_by_key(|entry| entry.block);
            kept.blocks.dedup();
        }
        is_same
    });
    objects
}

fn digest_of(
    step: u64,
    layout: Digest,
    num_blocks: u32,
    objects: &[CheckpointObject],
) -> Result<CheckpointDigest, String> {
    let mut blocks: BTreeMap<u32, &BlockEntry> = BTreeMap::new();
    for object in objects {
        let name = &object.key;
        match parse_key(name) {
            Some((found, file))
                if found <= step && file.starts_with("blocks-") && file.ends_with(".st") => {}
            _ => return Err(format!("object `{name}` does not belong to it")),
        }
        for entry in &object.blocks {
            let block = entry.block;
            if entry.end().is_none_or(|end| end > object.bytes) {
                return Err(format!("block {block} does not fit into object `{name}`"));
            }
            if block >= num_blocks {
                return Err(format!("block {block} is none of its {num_blocks} blocks"));
            }
            if blocks.insert(block, entry).is_some() {
                return Err(format!("block {block} is there twice"));
            }
        }
    }
    if num_blocks == 0 {
        return Err("it has no blocks".to_owned());
    }
    if let Some(missing) = (0..num_blocks).find(|block| !blocks.contains_key(block)) {
        return Err(format!("block {missing} of {num_blocks} is missing"));
    }
    Ok(CheckpointDigest {
        parameters: combine(layout, blocks.values().map(|entry| entry.param_digest)),
        optimizer: combine(layout, blocks.values().map(|entry| entry.optimizer_digest)),
    })
}
