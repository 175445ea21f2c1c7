//! A prepared dataset, open for reading.

use std::path::{Path, PathBuf};

use crate::batch::{IGNORED, TokenBatch};
use crate::error::DataError;
use crate::fill_in::FillIn;
use crate::manifest::{DatasetManifest, TOKENIZER_FILE};
use crate::order::SampleOrder;
use crate::shard::{Split, TokenStore};
use crate::tokenizer::Tokenizer;
use crate::validation::ValidationWindows;

/// A prepared dataset: memory-mapped tokens, the tokenizer and the manifest. Share it between threads in an `Arc`.
#[derive(Debug)]
pub struct Dataset {
    dir: PathBuf,
    manifest: DatasetManifest,
    tokenizer: Tokenizer,
    train: TokenStore,
    validation: TokenStore,
}

impl Dataset {
    /// Opens the dataset in `dir`; headers, lengths and the tokenizer's digest are checked, the tokens' digests are
    /// not (see [`Self::verify`]).
    ///
    /// # Errors
    /// [`DataError::Io`] if a file is missing, [`DataError::Damaged`] if one is not what the manifest says.
    pub fn open(dir: &Path) -> Result<Self, DataError> {
        let manifest = DatasetManifest::read(dir)?;
        let path = dir.join(TOKENIZER_FILE);
        let tokenizer = Tokenizer::open(&path)?;
        if tokenizer.digest() != manifest.tokenizer.digest {
            return Err(DataError::damaged(
                &path,
                "is not the tokenizer that the dataset was made with",
            ));
        }
        let vocab_size = manifest.tokenizer.vocab_size;
        if tokenizer.vocab_size() != vocab_size {
            let size = tokenizer.vocab_size();
            return Err(DataError::damaged(
                &path,
                format!("has {size} tokens, expected {vocab_size}"),
            ));
        }
        let train = TokenStore::open(dir, &manifest.train, vocab_size)?;
        let validation = TokenStore::open(dir, &manifest.validation, vocab_size)?;
        Ok(Self {
            dir: dir.to_owned(),
            manifest,
            tokenizer,
            train,
            validation,
        })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the folder holds.
    pub fn manifest(&self) -> &DatasetManifest {
        &self.manifest
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Number of token ids.
    pub fn vocab_size(&self) -> usize {
        self.manifest.tokenizer.vocab_size
    }

    /// Tokens of a split.
    pub fn tokens(&self, split: Split) -> u64 {
        self.store(split).len()
    }

    /// Reads all tokens and compares them with the manifest's digests.
    ///
    /// # Errors
    /// [`DataError::Damaged`] names the first shard that differs.
    pub fn verify(&self) -> Result<(), DataError> {
        self.train.verify(&self.manifest.train)?;
        self.validation.verify(&self.manifest.validation)
    }

    /// The order of training samples; see [`SampleOrder::new`].
    ///
    /// # Errors
    /// [`DataError::TooShort`] if the training split is shorter than one window.
    pub fn order(
        &self,
        seed: u64,
        context: usize,
        slots: usize,
        rows_per_slot: usize,
    ) -> Result<SampleOrder, DataError> {
        SampleOrder::new(seed, self.train.len(), context, slots, rows_per_slot)
    }

    /// The batch of slot `slot` in step `step`: `rows_per_slot` rows of `context` tokens, some documents of which `fill_in` rearranges.
    ///
    /// # Errors
    /// [`DataError::Damaged`] if a token is outside the vocabulary or the order is of a longer split.
    pub fn batch(
        &self,
        order: &SampleOrder,
        fill_in: Option<&FillIn>,
        step: u64,
        slot: usize,
    ) -> Result<TokenBatch, DataError> {
        let samples = order.samples(step, slot);
        let starts = samples.iter().map(|sample| sample.start);
        let rearrange = |row: usize, tokens: &mut [u32]| {
            if let Some(fill_in) = fill_in {
                fill_in.rearrange(tokens, samples[row]);
            }
        };
        let rows = order.rows_per_slot(step);
        self.windows(&self.train, starts, rows, order.context(), rearrange)
    }

    /// The windows of the validation split; with `max_windows` above 0 at most so many, spread evenly.
    pub fn validation_windows(&self, context: usize, max_windows: u64) -> ValidationWindows {
        ValidationWindows::new(self.validation.len(), context, max_windows)
    }

    /// Chunk `chunk` of `rows` validation windows; the last chunk may have fewer rows, one behind it has none.
    /// Targets behind the end of the split are [`IGNORED`], inputs there are 0.
    ///
    /// # Errors
    /// [`DataError::Damaged`] if a token is outside the vocabulary.
    pub fn validation_chunk(
        &self,
        windows: &ValidationWindows,
        chunk: u64,
        rows: usize,
    ) -> Result<TokenBatch, DataError> {
        self.windows(
            &self.validation,
            windows.starts(chunk, rows),
            rows,
            windows.context(),
            |_, _| {},
        )
    }

    /// `count` tokens of a split from `start` on, fewer at its end.
    ///
    /// # Errors
    /// [`DataError::Damaged`] if a token is outside the vocabulary.
    pub fn read(&self, split: Split, start: u64, count: usize) -> Result<Vec<u32>, DataError> {
        let store = self.store(split);
        let count = (store.len().saturating_sub(start)).min(count as u64) as usize;
        let mut tokens = Vec::with_capacity(count);
        store.read(start.min(store.len()), count, &mut tokens)?;
        Ok(tokens)
    }

    fn store(&self, split: Split) -> &TokenStore {
        match split {
            Split::Train => &self.train,
            Split::Validation => &self.validation,
        }
    }

    fn windows(
        &self,
        store: &TokenStore,
        starts: impl Iterator<Item = u64>,
        rows: usize,
        columns: usize,
        rearrange: impl Fn(usize, &mut [u32]),
    ) -> Result<TokenBatch, DataError> {
        let mut batch = TokenBatch::with_capacity(rows, columns);
        batch.rows = 0;
        let mut tokens = Vec::with_capacity(columns + 1);
        for start in starts {
            let present = store.len().saturating_sub(start).min(columns as u64 + 1) as usize;
            if present < 2 {
                return Err(DataError::damaged(
                    &self.dir,
                    format!("has no window at token {start}"),
                ));
            }
            tokens.clear();
            store.read(start, present, &mut tokens)?;
            rearrange(batch.rows, &mut tokens);
            let missing = columns + 1 - present;
            batch
                .inputs
                .extend(tokens[..present - 1].iter().map(|&token| i64::from(token)));
            batch.inputs.extend(std::iter::repeat_n(0, missing));
            batch
                .targets
                .extend(tokens[1..].iter().map(|&token| i64::from(token)));
            batch.targets.extend(std::iter::repeat_n(IGNORED, missing));
            batch.rows += 1;
        }
        Ok(batch)
    }
}
