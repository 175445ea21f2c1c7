//! What differs between two checkpoints.

use crate::digest::Digest;
use crate::error::StoreError;
use crate::manifest::{BlockEntry, CheckpointManifest};
use crate::run_store::RunStore;

/// Values of each side that are compared at once; bounds the memory.
const BATCH_VALUES: u64 = 8 << 20;

/// What [`RunStore::diff`] found.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckpointDiff {
    /// How many blocks both have.
    pub num_blocks: u32,
    /// Those that differ, ascending by block.
    pub blocks: Vec<BlockDifference>,
}

/// A block that is not the same in two checkpoints.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockDifference {
    /// The block.
    pub block: u32,
    /// Of the parameters.
    pub param: ValueDifference,
    /// Of the first moments.
    pub m: ValueDifference,
    /// Of the second moments.
    pub v: ValueDifference,
    /// Of the running mean of the parameters.
    pub ema: ValueDifference,
    /// Whether what else belongs to the block differs.
    pub extra: bool,
}

/// How much two lists of numbers differ.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ValueDifference {
    /// How many have other bits; where one list is longer, its rest counts.
    pub count: u64,
    /// The largest absolute difference; infinite where one is not a number and where one is missing.
    pub max_abs: f64,
}

impl ValueDifference {
    /// Of moments; those of type bfloat16 lie two in a word.
    fn of_moments(a: &[f32], b: &[f32], num_params: usize) -> Self {
        if a.len() == num_params {
            return Self::of(a, b);
        }
        Self::of(&unpacked(a), &unpacked(b))
    }

    fn of(a: &[f32], b: &[f32]) -> Self {
        let mut difference = Self::default();
        for (a, b) in a.iter().zip(b) {
            if a.to_bits() == b.to_bits() {
                continue;
            }
            difference.count += 1;
            let abs = (f64::from(*a) - f64::from(*b)).abs();
            let abs = if abs.is_nan() { f64::INFINITY } else { abs };
            difference.max_abs = difference.max_abs.max(abs);
        }
        if a.len() != b.len() {
            difference.count += a.len().abs_diff(b.len()) as u64;
            difference.max_abs = f64::INFINITY;
        }
        difference
    }
}

impl RunStore {
    /// Compares checkpoint `step` with checkpoint `other_step` of `other`, which may be another store or run with the same layout.
    ///
    /// Blocks with the same digests are not read. Memory is bounded, some 200 MiB unless single blocks are larger.
    ///
    /// # Errors
    /// As [`RunStore::load_blocks`]; [`StoreError::InvalidCheckpoint`] if the two are of different models.
    pub async fn diff(
        &self,
        step: u64,
        other: &RunStore,
        other_step: u64,
    ) -> Result<CheckpointDiff, StoreError> {
        let a = self.load_manifest(step).await?;
        let b = other.load_manifest(other_step).await?;
        if a.layout != b.layout || a.num_blocks != b.num_blocks {
            let (layout, other_layout) = (a.layout, b.layout);
            return Err(StoreError::InvalidCheckpoint {
                step: other_step,
                reason: format!(
                    "its layout is {other_layout} and that of checkpoint {step} is {layout}: they are of different models"
                ),
            });
        }
        let mut diff = CheckpointDiff {
            num_blocks: a.num_blocks,
            blocks: Vec::new(),
        };
        let (mut batch, mut values) = (Vec::new(), 0);
        let both: Vec<_> = entries(&a).into_iter().zip(entries(&b)).collect();
        for (entry, other_entry) in &both {
            if contents(entry) == contents(other_entry) {
                continue;
            }
            let len = entry.lens().iter().sum::<u64>();
            if !batch.is_empty() && values + len > BATCH_VALUES {
                let now = std::mem::take(&mut batch);
                diff.blocks.extend(self.compare(&a, other, &b, &now).await?);
                values = 0;
            }
            batch.push(entry.block);
            values += len;
        }
        diff.blocks
            .extend(self.compare(&a, other, &b, &batch).await?);
        Ok(diff)
    }

    async fn compare(
        &self,
        a: &CheckpointManifest,
        other: &RunStore,
        b: &CheckpointManifest,
        blocks: &[u32],
    ) -> Result<Vec<BlockDifference>, StoreError> {
        let (a, b) = futures::try_join!(self.load_from(a, blocks), other.load_from(b, blocks))?;
        let difference = |(a, b): (&crate::BlockState, &crate::BlockState)| BlockDifference {
            block: a.block,
            param: ValueDifference::of(&a.param, &b.param),
            m: ValueDifference::of_moments(&a.m, &b.m, a.param.len()),
            v: ValueDifference::of_moments(&a.v, &b.v, a.param.len()),
            ema: ValueDifference::of(&a.ema, &b.ema),
            extra: a.extra != b.extra,
        };
        Ok(a.states.iter().zip(&b.states).map(difference).collect())
    }
}

fn unpacked(words: &[f32]) -> Vec<f32> {
    let halves: &[u16] = bytemuck::cast_slice(words);
    let value = |&half| f32::from_bits(u32::from(half) << 16);
    halves.iter().map(value).collect()
}

/// Ascending by block; a manifest that was decoded has each once.
fn entries(manifest: &CheckpointManifest) -> Vec<&BlockEntry> {
    let all = manifest.objects.iter().flat_map(|object| &object.blocks);
    let mut entries: Vec<&BlockEntry> = all.collect();
    entries.sort_by_key(|entry| entry.block);
    entries
}

fn contents(entry: &BlockEntry) -> (Digest, Digest, &str) {
    (entry.param_digest, entry.optimizer_digest, &entry.extra)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_counted_by_bits_and_measured_by_value() {
        let difference = |a: &[f32], b: &[f32]| {
            let ValueDifference { count, max_abs } = ValueDifference::of(a, b);
            (count, max_abs)
        };
        assert_eq!(difference(&[1.0, 2.0], &[1.0, 2.0]), (0, 0.0));
        assert_eq!(difference(&[1.0, 2.0], &[1.5, 1.0]), (2, 1.0));
        assert_eq!(difference(&[0.0], &[-0.0]), (1, 0.0));
        assert_eq!(difference(&[f32::NAN], &[f32::NAN]), (0, 0.0));
        assert_eq!(difference(&[f32::NAN], &[1.0]), (1, f64::INFINITY));
        assert_eq!(difference(&[1.0, 2.0, 3.0], &[1.0]), (2, f64::INFINITY));
        let words = |halves: [u16; 2]| bytemuck::cast::<_, f32>(halves);
        let (one, other) = (words([0x3f80, 0x4000]), words([0x3f80, 0x4040]));
        let packed = ValueDifference::of_moments(&[one], &[other], 2);
        assert_eq!((packed.count, packed.max_abs), (1, 1.0));
    }
}
