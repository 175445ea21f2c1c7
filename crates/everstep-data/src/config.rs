//! The `[data]` section of a run file.

use serde::{Deserialize, Serialize};

use crate::error::DataError;

/// The share of the text that is held out when the configuration names no validation files.
const DEFAULT_VALIDATION_FRACTION: f64 = 0.1;
const DEFAULT_VOCAB_SIZE: usize = 8192;
/// 256 bytes and the end-of-text token.
const MIN_BPE_VOCAB_SIZE: usize = 257;

/// Where the text comes from, what is held out and how it becomes tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Training text: paths, globs or folders (read recursively), relative to the run file. `.jsonl` files give
    /// one document a line (field `text`), every other file is one UTF-8 document.
    pub train: Vec<String>,
    /// Held-out text, in the same form. Empty: a fraction of each training file is held out instead.
    #[serde(default)]
    pub validation: Vec<String>,
    /// Fraction of every training file that is held out, `0.0..1.0`: the last characters of a text file, the last
    /// lines of a `.jsonl` file. Default 0.1; not together with `validation`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_fraction: Option<f64>,
    /// Window length in tokens; default: the model's context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<usize>,
    /// Whether a token sees only those of its own document in a window. Needs a tokenizer with an end-of-text token.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub document_mask: bool,
    /// Share of the documents of a training window that are rearranged to beginning, end, middle (fill-in-the-middle); 0 if left out. A
    /// tokenizer of kind `bpe` gets tokens for it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub fill_in_rate: f64,
    /// How text becomes tokens.
    #[serde(default)]
    pub tokenizer: TokenizerConfig,
}

fn is_zero(rate: &f64) -> bool {
    *rate == 0.0
}

/// The kinds of tokenizer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenizerKind {
    /// Byte-level byte-pair encoding, trained on the training text.
    #[default]
    Bpe,
    /// One token for each distinct character of the training and validation text, sorted.
    Char,
    /// One token for each byte.
    Byte,
    /// An existing `tokenizer.json` (Hugging Face).
    File,
}

/// The `[data.tokenizer]` table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerConfig {
    /// Which kind; `bpe` if left out.
    #[serde(default)]
    pub kind: TokenizerKind,
    /// Number of tokens, for kind `bpe` only; default 8192. A small corpus may give fewer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vocab_size: Option<usize>,
    /// The `tokenizer.json`, relative to the run file, for kind `file` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
}

impl TokenizerConfig {
    /// A tokenizer configuration of `kind` with its defaults.
    pub fn new(kind: TokenizerKind) -> Self {
        Self {
            kind,
            ..Self::default()
        }
    }

    /// Number of tokens that a trained vocabulary is asked for.
    pub fn target_vocab_size(&self) -> usize {
        self.vocab_size.unwrap_or(DEFAULT_VOCAB_SIZE)
    }

    fn check(&self) -> Result<(), DataError> {
        let kind = self.kind;
        match (kind, self.vocab_size) {
            (TokenizerKind::Bpe, Some(size)) if size < MIN_BPE_VOCAB_SIZE => {
                return Err(DataError::config(
                    "data.tokenizer.vocab_size",
                    format!(
                        "{size} is too small; allowed: at least {MIN_BPE_VOCAB_SIZE} (256 bytes and <|endoftext|>)"
                    ),
                ));
            }
            (TokenizerKind::Char | TokenizerKind::Byte | TokenizerKind::File, Some(_)) => {
                return Err(DataError::config(
                    "data.tokenizer.vocab_size",
                    "only allowed with kind = \"bpe\"; the other kinds know their size",
                ));
            }
            _ => {}
        }
        match (kind, &self.path) {
            (TokenizerKind::File, None) => Err(DataError::config(
                "data.tokenizer.path",
                "kind = \"file\" needs the path of a tokenizer.json",
            )),
            (TokenizerKind::Bpe | TokenizerKind::Char | TokenizerKind::Byte, Some(_)) => Err(
                DataError::config("data.tokenizer.path", "only allowed with kind = \"file\""),
            ),
            _ => Ok(()),
        }
    }
}

impl DataConfig {
    /// A configuration that reads `train` and holds out the default fraction.
    pub fn new(train: Vec<String>, tokenizer: TokenizerConfig) -> Self {
        Self {
            train,
            validation: Vec::new(),
            validation_fraction: None,
            context: None,
            document_mask: false,
            fill_in_rate: 0.0,
            tokenizer,
        }
    }

    /// Checks every field that can be checked without reading a file.
    ///
    /// # Errors
    /// [`DataError::Config`] with the dotted path of the first wrong field and what is allowed.
    pub fn check(&self) -> Result<(), DataError> {
        if self.train.is_empty() {
            return Err(DataError::config(
                "data.train",
                "is empty; allowed: at least one path, glob or folder",
            ));
        }
        if let Some(fraction) = self.validation_fraction {
            if !(0.0..1.0).contains(&fraction) {
                return Err(DataError::config(
                    "data.validation_fraction",
                    format!("{fraction} is out of range; allowed: 0.0 up to, not including, 1.0"),
                ));
            }
            if !self.validation.is_empty() {
                return Err(DataError::config(
                    "data.validation_fraction",
                    "not allowed together with data.validation; give one of them",
                ));
            }
        }
        if !(0.0..=1.0).contains(&self.fill_in_rate) {
            return Err(DataError::config(
                "data.fill_in_rate",
                format!("{} is out of range; allowed: 0 to 1", self.fill_in_rate),
            ));
        }
        if self.context == Some(0) {
            return Err(DataError::config(
                "data.context",
                "is 0; allowed: at least 1 token",
            ));
        }
        self.tokenizer.check()
    }

    /// The fraction of each training file that is held out: 0 if there are validation files.
    pub fn held_out_fraction(&self) -> f64 {
        match (self.validation.is_empty(), self.validation_fraction) {
            (false, _) => 0.0,
            (true, fraction) => fraction.unwrap_or(DEFAULT_VALIDATION_FRACTION),
        }
    }

    /// True if some text is held out for validation.
    pub fn has_validation(&self) -> bool {
        !self.validation.is_empty() || self.held_out_fraction() > 0.0
    }

    /// Whether the tokenizer that is trained gets tokens for fill-in-the-middle.
    pub(crate) fn trains_marks(&self) -> bool {
        self.tokenizer.kind == TokenizerKind::Bpe && self.fill_in_rate > 0.0
    }

    /// BLAKE3 of everything that decides what a prepared folder holds, as hexadecimal digits. The window length
    /// is not part of it: windows are cut when a batch is read.
    pub(crate) fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        let mut field = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        field(b"everstep dataset 1");
        for patterns in [&self.train, &self.validation] {
            field(&(patterns.len() as u64).to_le_bytes());
            patterns
                .iter()
                .for_each(|pattern| field(pattern.as_bytes()));
        }
        field(&self.held_out_fraction().to_le_bytes());
        field(&[self.tokenizer.kind as u8]);
        let size = match self.tokenizer.kind {
            TokenizerKind::Bpe => self.tokenizer.target_vocab_size() as u64,
            _ => 0,
        };
        field(&size.to_le_bytes());
        if self.trains_marks() {
            field(b"fill in");
        }
        hasher.finalize().to_hex().to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(change: impl FnOnce(&mut DataConfig)) -> String {
        let mut config = DataConfig::new(vec!["a.txt".into()], TokenizerConfig::default());
        change(&mut config);
        config.check().unwrap_err().to_string()
    }

    #[test]
    fn wrong_fields_are_named() {
        assert!(error(|c| c.train.clear()).starts_with("data.train: is empty"));
        assert!(
            error(|c| c.validation_fraction = Some(1.0))
                .contains("1 is out of range; allowed: 0.0")
        );
        assert!(
            error(|c| c.validation_fraction = Some(f64::NAN))
                .starts_with("data.validation_fraction")
        );
        assert!(error(|c| c.context = Some(0)).starts_with("data.context"));
        assert!(error(|c| c.tokenizer.vocab_size = Some(256)).contains("at least 257"));
        assert!(
            error(|c| c.tokenizer.kind = TokenizerKind::File).starts_with("data.tokenizer.path")
        );
        assert!(error(|c| c.tokenizer.path = Some("x".into())).starts_with("data.tokenizer.path"));
        let both = error(|c| {
            c.validation.push("v".into());
            c.validation_fraction = Some(0.2);
        });
        assert!(both.contains("not allowed together"), "{both}");
        let sized = error(|c| {
            c.tokenizer = TokenizerConfig {
                vocab_size: Some(300),
                ..TokenizerConfig::new(TokenizerKind::Char)
            }
        });
        assert!(sized.contains("only allowed with kind"), "{sized}");
    }

    #[test]
    fn the_digest_covers_what_decides_the_tokens_and_nothing_else() {
        let base = DataConfig::new(vec!["a.txt".into()], TokenizerConfig::default());
        let mut same = base.clone();
        same.context = Some(9);
        same.validation_fraction = Some(0.1);
        same.tokenizer.vocab_size = Some(DEFAULT_VOCAB_SIZE);
        assert_eq!(base.digest(), same.digest());
        let mut other = base.clone();
        other.tokenizer.kind = TokenizerKind::Byte;
        assert_ne!(base.digest(), other.digest());
    }
}
