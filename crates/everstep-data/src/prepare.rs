//! From source files to a dataset folder.

use std::collections::BTreeSet;
use std::path::Path;

use rayon::prelude::*;

use crate::config::{DataConfig, TokenizerKind};
use crate::dataset::Dataset;
use crate::error::DataError;
use crate::folder::{Partial, check_target, lock, write_file};
use crate::manifest::{
    self, DatasetManifest, FORMAT, MANIFEST_FILE, SourceManifest, TOKENIZER_FILE, TokenizerManifest,
};
use crate::shard::{SHARD_TOKENS, Split, SplitWriter};
use crate::source::{self, Content, Role, Source};
use crate::tokenizer::Tokenizer;
use crate::tokenizer_build::{byte, char, chunks, train_bpe};

/// Bytes of source text in memory at a time while tokenizing, if no single file is larger.
const BATCH_BYTES: u64 = 64 << 20;
/// Bytes of a piece of text that one thread tokenizes at a time.
const CHUNK_BYTES: usize = 64 << 10;

/// Prepares the dataset that `config` describes in `out_dir`: trains the tokenizer, tokenizes, packs. Relative paths
/// start at `base_dir`. The same sources give the same bytes, whatever the number of threads.
///
/// The folder is written beside its place and renamed when it is complete; an earlier dataset there is replaced.
///
/// # Errors
/// [`DataError`] names the field or the file; then nothing is left behind and what was there is unchanged.
pub fn prepare(
    config: &DataConfig,
    base_dir: &Path,
    out_dir: &Path,
) -> Result<DatasetManifest, DataError> {
    let corpus = Corpus::scan(config, base_dir)?;
    check_target(out_dir)?;
    let _lock = lock(out_dir)?;
    corpus.write(out_dir)
}

/// Opens the dataset in `out_dir` if it was made from `config` and from the same bytes, else prepares it first.
///
/// A run that has begun must [`Dataset::open`] its folder instead: its sources may have changed since.
///
/// # Errors
/// As [`prepare`] and [`Dataset::open`].
pub fn open_or_prepare(
    config: &DataConfig,
    base_dir: &Path,
    out_dir: &Path,
) -> Result<Dataset, DataError> {
    let corpus = Corpus::scan(config, base_dir)?;
    check_target(out_dir)?;
    let _lock = lock(out_dir)?;
    if let Some(dataset) = corpus.reuse(out_dir) {
        return Ok(dataset);
    }
    corpus.write(out_dir)?;
    Dataset::open(out_dir)
}

/// The sources of a configuration, all read once.
struct Corpus<'a> {
    config: &'a DataConfig,
    /// The configured `tokenizer.json`, for kind `file`.
    given: Option<Tokenizer>,
    sources: Vec<Source>,
    scanned: Vec<Scan>,
    digest: String,
}

/// What the first pass over a source found.
struct Scan {
    bytes: u64,
    digest: blake3::Hash,
    train_documents: u64,
    validation_documents: u64,
    characters: BTreeSet<char>,
}

impl<'a> Corpus<'a> {
    fn scan(config: &'a DataConfig, base: &Path) -> Result<Self, DataError> {
        config.check()?;
        let given = match (config.tokenizer.kind, &config.tokenizer.path) {
            (TokenizerKind::File, Some(path)) => Some(Tokenizer::open(&base.join(path))?),
            _ => None,
        };
        let training = Role::Train {
            held_out: config.held_out_fraction(),
        };
        let mut sources = source::find("data.train", &config.train, base, training)?;
        sources.extend(source::find(
            "data.validation",
            &config.validation,
            base,
            Role::Validation,
        )?);
        source::check_disjoint(&sources)?;
        let with_characters = config.tokenizer.kind == TokenizerKind::Char;
        let scanned: Vec<Scan> = sources
            .par_iter()
            .map(|source| Ok(Scan::new(&source.read()?, with_characters)))
            .collect::<Result<_, _>>()?;

        let empty = |field, patterns: &[String], role: fn(&Role) -> bool| DataError::EmptyCorpus {
            field,
            patterns: patterns.join(" "),
            files: sources.iter().filter(|source| role(&source.role)).count(),
        };
        if scanned.iter().all(|scan| scan.train_documents == 0) {
            return Err(empty("data.train", &config.train, |role| {
                *role != Role::Validation
            }));
        }
        if !config.validation.is_empty()
            && scanned.iter().all(|scan| scan.validation_documents == 0)
        {
            return Err(empty("data.validation", &config.validation, |role| {
                *role == Role::Validation
            }));
        }

        let mut hasher = blake3::Hasher::new();
        if let Some(tokenizer) = &given {
            hasher.update(tokenizer.digest().as_bytes());
        }
        for (source, scan) in sources.iter().zip(&scanned) {
            hasher.update(&[u8::from(source.role == Role::Validation)]);
            hasher.update(scan.digest.as_bytes());
        }
        let digest = hasher.finalize().to_hex().to_string();
        Ok(Self {
            config,
            given,
            sources,
            scanned,
            digest,
        })
    }

    /// The dataset in `out`, if it is whole and made from this corpus.
    fn reuse(&self, out: &Path) -> Option<Dataset> {
        let known = DatasetManifest::read(out).ok()?;
        if known.config_digest != self.config.digest() || known.sources_digest != self.digest {
            tracing::info!(folder = %out.display(), "the dataset was made from other text or settings; preparing it again");
            return None;
        }
        match Dataset::open(out).and_then(|dataset| dataset.verify().map(|()| dataset)) {
            Ok(dataset) => Some(dataset),
            Err(error) => {
                tracing::warn!(%error, "the dataset is damaged; preparing it again");
                None
            }
        }
    }

    fn write(&self, out: &Path) -> Result<DatasetManifest, DataError> {
        let partial = Partial::create(out)?;
        let dir = partial.path();
        let tokenizer = self.tokenizer()?;
        write_file(&dir.join(TOKENIZER_FILE), tokenizer.json())?;
        let vocab_size = tokenizer.vocab_size();
        let mut train = SplitWriter::new(dir, Split::Train, vocab_size, SHARD_TOKENS);
        let mut validation = SplitWriter::new(dir, Split::Validation, vocab_size, SHARD_TOKENS);
        self.tokenize(&tokenizer, &mut train, &mut validation)?;
        let (train, counts) = train.finish()?;
        let (validation, _) = validation.finish()?;
        if let Some(context) = self.config.context
            && train.tokens <= context as u64
        {
            return Err(DataError::TooShort {
                tokens: train.tokens,
                context: context as u64,
            });
        }
        let identity = format!(
            "{} {} {}",
            tokenizer.digest(),
            train.digest,
            validation.digest
        );
        let manifest = DatasetManifest {
            format: FORMAT,
            digest: blake3::hash(identity.as_bytes()).to_hex().to_string(),
            config_digest: self.config.digest(),
            sources_digest: self.digest.clone(),
            tokenizer: TokenizerManifest {
                kind: self.config.tokenizer.kind,
                vocab_size,
                eot: tokenizer.eot(),
                digest: tokenizer.digest(),
            },
            train,
            validation,
            unigram_entropy: manifest::entropy(&counts),
            sources: self
                .sources
                .iter()
                .zip(&self.scanned)
                .map(|(source, scan)| SourceManifest {
                    path: source.name.clone(),
                    bytes: scan.bytes,
                    digest: scan.digest.to_hex().to_string(),
                })
                .collect(),
        };
        let mut json = serde_json::to_vec_pretty(&manifest)
            .expect("a manifest of strings and finite numbers is JSON");
        json.push(b'\n');
        write_file(&dir.join(MANIFEST_FILE), &json)?;
        partial.commit(out)?;
        tracing::info!(
            folder = %out.display(),
            train_tokens = manifest.train.tokens,
            validation_tokens = manifest.validation.tokens,
            vocab_size,
            unigram_entropy = manifest.unigram_entropy,
            "dataset prepared"
        );
        Ok(manifest)
    }

    fn tokenizer(&self) -> Result<Tokenizer, DataError> {
        match (self.config.tokenizer.kind, &self.given) {
            (_, Some(given)) => Tokenizer::from_json(given.json().to_vec()),
            (TokenizerKind::Byte, None) => byte(),
            (TokenizerKind::Char, None) => char(
                self.scanned
                    .iter()
                    .flat_map(|scan| scan.characters.iter().copied())
                    .collect(),
            ),
            (TokenizerKind::Bpe | TokenizerKind::File, None) => {
                // The files are read lazily, so the corpus need not fit in memory; a file that fails ends the
                // iteration, and its error is reported instead of the tokenizer.
                let failed = std::sync::Mutex::new(None);
                let texts = self
                    .sources
                    .iter()
                    .zip(&self.scanned)
                    .map_while(|(source, scan)| match scan.reread(source) {
                        Ok(content) => Some(content),
                        Err(error) => {
                            *failed.lock().unwrap_or_else(|poison| poison.into_inner()) =
                                Some(error);
                            None
                        }
                    });
                let texts = texts.flat_map(|content| {
                    content
                        .documents
                        .into_iter()
                        .filter(|(split, _)| *split == Split::Train)
                        .flat_map(|(_, text)| {
                            chunks(&text, CHUNK_BYTES)
                                .map(str::to_owned)
                                .collect::<Vec<String>>()
                        })
                });
                let size = self.config.tokenizer.target_vocab_size();
                let trained = train_bpe(texts, size, self.config.trains_marks());
                match failed
                    .into_inner()
                    .unwrap_or_else(|poison| poison.into_inner())
                {
                    Some(error) => Err(error),
                    None => trained,
                }
            }
        }
    }

    fn tokenize<'w>(
        &self,
        tokenizer: &Tokenizer,
        train: &mut SplitWriter<'w>,
        validation: &mut SplitWriter<'w>,
    ) -> Result<(), DataError> {
        let kind = self.config.tokenizer.kind;
        let separates =
            matches!(kind, TokenizerKind::Bpe | TokenizerKind::File) && self.documents() > 1;
        let separator = tokenizer.eot().filter(|_| separates);
        // A given tokenizer may treat the start of a text in its own way, so its texts stay whole.
        let chunk_bytes = if kind == TokenizerKind::File {
            usize::MAX
        } else {
            CHUNK_BYTES
        };
        for range in self.batches() {
            let contents: Vec<Content> = self.sources[range.clone()]
                .par_iter()
                .zip(&self.scanned[range])
                .map(|(source, scan)| scan.reread(source))
                .collect::<Result<_, _>>()?;
            let documents = contents.iter().flat_map(|content| &content.documents);
            let pieces: Vec<(Split, &str, bool)> = documents
                .flat_map(|(split, text)| {
                    let mut parts: Vec<_> = chunks(text, chunk_bytes)
                        .map(|part| (*split, part, false))
                        .collect();
                    if let Some(last) = parts.last_mut() {
                        last.2 = true;
                    }
                    parts
                })
                .collect();
            let encoded: Vec<Vec<u32>> = pieces
                .par_iter()
                .map(|(_, text, _)| tokenizer.encode(text))
                .collect::<Result<_, _>>()?;
            for ((split, text, last), tokens) in pieces.iter().zip(encoded) {
                let writer = match split {
                    Split::Train => &mut *train,
                    Split::Validation => &mut *validation,
                };
                writer.count_text(text.len() as u64, *last);
                writer.push(&tokens)?;
                if let (true, Some(token)) = (*last, separator) {
                    writer.push(&[token])?;
                }
            }
        }
        Ok(())
    }

    /// Documents of the corpus; a text that was split counts once.
    fn documents(&self) -> u64 {
        let of_text = |source: &Source| {
            source
                .path
                .extension()
                .is_none_or(|extension| extension != "jsonl")
        };
        self.sources
            .iter()
            .zip(&self.scanned)
            .map(|(source, scan)| {
                match (
                    of_text(source),
                    scan.train_documents + scan.validation_documents,
                ) {
                    (true, count) => count.min(1),
                    (false, count) => count,
                }
            })
            .sum()
    }

    /// Ranges of sources that are tokenized together.
    fn batches(&self) -> Vec<std::ops::Range<usize>> {
        let mut batches = Vec::new();
        let (mut first, mut bytes) = (0, 0);
        for (index, scan) in self.scanned.iter().enumerate() {
            if bytes > 0 && bytes + scan.bytes > BATCH_BYTES {
                batches.push(first..index);
                (first, bytes) = (index, 0);
            }
            bytes += scan.bytes;
        }
        batches.push(first..self.scanned.len());
        batches
    }
}

impl Scan {
    fn new(content: &Content, with_characters: bool) -> Self {
        let of = |split| {
            content
                .documents
                .iter()
                .filter(|(of, _)| *of == split)
                .count() as u64
        };
        let characters = match with_characters {
            true => content
                .documents
                .iter()
                .flat_map(|(_, text)| text.chars())
                .collect(),
            false => BTreeSet::new(),
        };
        Self {
            bytes: content.bytes,
            digest: content.digest,
            train_documents: of(Split::Train),
            validation_documents: of(Split::Validation),
            characters,
        }
    }

    /// Reads the source again; it must not have changed since.
    fn reread(&self, source: &Source) -> Result<Content, DataError> {
        let content = source.read()?;
        match content.digest == self.digest {
            true => Ok(content),
            false => Err(DataError::BadSource {
                file: source.path.clone(),
                line: None,
                reason: "changed while the dataset was being prepared".into(),
            }),
        }
    }
}

#[cfg(test)]
mod tests;
