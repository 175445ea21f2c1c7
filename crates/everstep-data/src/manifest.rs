//! `dataset.json`: what a prepared folder holds.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::config::TokenizerKind;
use crate::error::{DataError, IoContext};

/// Version of the folder's layout.
pub(crate) const FORMAT: u32 = 1;
pub(crate) const MANIFEST_FILE: &str = "dataset.json";
pub(crate) const TOKENIZER_FILE: &str = "tokenizer.json";

/// The description of a prepared dataset. Equal sources and configuration give equal manifests on every machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetManifest {
    /// Version of the folder's layout.
    pub format: u32,
    /// BLAKE3 over the tokenizer and the tokens of both splits: the dataset's identity.
    pub digest: String,
    /// BLAKE3 of the configuration's fields that decide the tokens.
    pub config_digest: String,
    /// BLAKE3 over the source files' digests.
    pub sources_digest: String,
    /// The tokenizer.
    pub tokenizer: TokenizerManifest,
    /// The training split.
    pub train: SplitManifest,
    /// The validation split; without tokens if nothing was held out.
    pub validation: SplitManifest,
    /// Entropy of the training tokens' frequencies, in nats per token: the loss of a model that knows nothing but
    /// how often each token occurs.
    pub unigram_entropy: f64,
    /// Every source file in the order in which it was read.
    pub sources: Vec<SourceManifest>,
}

/// The tokenizer of a dataset.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerManifest {
    /// How it was made.
    pub kind: TokenizerKind,
    /// Number of token ids.
    pub vocab_size: usize,
    /// The token between documents, if there is one.
    pub eot: Option<u32>,
    /// BLAKE3 of `tokenizer.json`.
    pub digest: String,
}

/// One split of a dataset.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitManifest {
    /// Number of documents that are not empty.
    pub documents: u64,
    /// UTF-8 bytes of text.
    pub bytes: u64,
    /// Number of tokens, with separators.
    pub tokens: u64,
    /// BLAKE3 of all tokens as they lie in the shards.
    pub digest: String,
    /// The shards, in order.
    pub shards: Vec<ShardManifest>,
}

/// One shard of a split.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardManifest {
    /// Name of the file in the dataset's folder.
    pub file: String,
    /// Number of tokens.
    pub tokens: u64,
    /// BLAKE3 of the tokens, without the header.
    pub digest: String,
}

/// One source file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceManifest {
    /// The path, as it follows from the configuration.
    pub path: String,
    /// Size of the file in bytes.
    pub bytes: u64,
    /// BLAKE3 of the file.
    pub digest: String,
}

impl DatasetManifest {
    /// Reads and checks the manifest of the dataset in `dir`.
    pub(crate) fn read(dir: &Path) -> Result<Self, DataError> {
        let path = dir.join(MANIFEST_FILE);
        let text = std::fs::read_to_string(&path).at("read", &path)?;
        let manifest: Self = serde_json::from_str(&text)
            .map_err(|error| DataError::damaged(&path, error.to_string()))?;
        if manifest.format != FORMAT {
            return Err(DataError::damaged(
                &path,
                format!("has format {}, expected {FORMAT}", manifest.format),
            ));
        }
        let fits = (1..=1 << 31).contains(&manifest.tokenizer.vocab_size);
        if !fits
            || manifest
                .tokenizer
                .eot
                .is_some_and(|eot| eot as usize >= manifest.tokenizer.vocab_size)
        {
            return Err(DataError::damaged(&path, "names an impossible vocabulary"));
        }
        for split in [&manifest.train, &manifest.validation] {
            let mut tokens = Some(0u64);
            for shard in &split.shards {
                tokens = tokens.and_then(|sum| sum.checked_add(shard.tokens));
                // A shard is a plain file of this folder, never a path that leads elsewhere.
                if shard.file.contains(['/', '\\']) || !shard.file.ends_with(".tokens") {
                    return Err(DataError::damaged(
                        &path,
                        format!("names `{}` as a shard", shard.file),
                    ));
                }
            }
            if tokens != Some(split.tokens) {
                return Err(DataError::damaged(
                    &path,
                    "counts tokens that are in no shard",
                ));
            }
        }
        Ok(manifest)
    }

    /// The dataset's identity: BLAKE3 over the tokenizer and the tokens of both splits, as hexadecimal digits.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// UTF-8 bytes for each training token: divides a loss in nats per token into nats per byte.
    pub fn bytes_per_token(&self) -> f64 {
        self.train.bytes as f64 / self.train.tokens.max(1) as f64
    }
}

/// Entropy in nats of the distribution that `counts` describes, summed in the order of the tokens.
pub(crate) fn entropy(counts: &[u64]) -> f64 {
    let total = counts.iter().sum::<u64>() as f64;
    counts
        .iter()
        .filter(|&&count| count > 0)
        .map(|&count| count as f64 / total)
        .map(|p| -p * libm::log(p))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_of_known_distributions() {
        assert_eq!(entropy(&[0, 0]), 0.0);
        assert_eq!(entropy(&[5]), 0.0);
        assert!((entropy(&[3, 3, 0, 3, 3]) - 4f64.ln()).abs() < 1e-12);
    }
}
