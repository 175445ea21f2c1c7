//! Making tokenizers from text.

use std::collections::BTreeSet;

use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, decoders, models::TrainerWrapper};

use crate::error::DataError;
use crate::tokenizer::{CHARACTER_PATTERN, FILL_IN_MARKS, Tokenizer, byte_character};

const END_OF_TEXT: &str = "<|endoftext|>";

/// Trains a byte-level BPE tokenizer of at most `vocab_size` tokens; token 0 is `<|endoftext|>`, and those for fill-in-the-middle follow if
/// there shall be some.
pub(crate) fn train_bpe(
    texts: impl Iterator<Item = String> + Send,
    vocab_size: usize,
    with_marks: bool,
) -> Result<Tokenizer, DataError> {
    let marks = FILL_IN_MARKS[0].iter().filter(|_| with_marks);
    let special = std::iter::once(&END_OF_TEXT).chain(marks);
    let special = special.map(|&name| AddedToken::from(name, true)).collect();
    let bytes = ByteLevel::new(false, false, true);
    let mut tokenizer = tokenizers::Tokenizer::new(BPE::default());
    tokenizer
        .with_pre_tokenizer(Some(bytes))
        .with_decoder(Some(bytes));
    let trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(special)
        .build();
    tokenizer
        .train(&mut TrainerWrapper::from(trainer), texts)
        .map_err(DataError::tokenizer)?;
    finish(&tokenizer)
}

/// A tokenizer with one token for each of `characters`, in their order.
pub(crate) fn char(characters: BTreeSet<char>) -> Result<Tokenizer, DataError> {
    let vocab = characters
        .into_iter()
        .zip(0..)
        .map(|(character, id)| (character.to_string(), id))
        .collect();
    let model = WordLevel::builder()
        .vocab(vocab)
        .build()
        .map_err(DataError::tokenizer)?;
    let pattern = SplitPattern::Regex(CHARACTER_PATTERN.into());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
        .map_err(DataError::tokenizer)?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer
        .with_pre_tokenizer(Some(split))
        .with_decoder(Some(decoders::fuse::Fuse::new()));
    finish(&tokenizer)
}

/// A tokenizer with one token for each byte.
pub(crate) fn byte() -> Result<Tokenizer, DataError> {
    let vocab: std::collections::HashMap<String, u32> = (0..=255u8)
        .map(|byte| (byte_character(byte).to_string(), u32::from(byte)))
        .collect();
    let model = BPE::builder()
        .vocab_and_merges(
            vocab
                .into_iter()
                .collect::<tokenizers::models::bpe::Vocab>(),
            Vec::new(),
        )
        .build()
        .map_err(DataError::tokenizer)?;
    let bytes = ByteLevel::new(false, false, false);
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer
        .with_pre_tokenizer(Some(bytes))
        .with_decoder(Some(bytes));
    finish(&tokenizer)
}

fn finish(tokenizer: &tokenizers::Tokenizer) -> Result<Tokenizer, DataError> {
    let json = tokenizer.to_string(true).map_err(DataError::tokenizer)?;
    Tokenizer::from_json(json.into_bytes())
}

/// Cuts `text` into parts of at least `min_bytes` bytes, as far as possible, that can be tokenized by themselves.
///
/// A part ends behind a line break that stands between two characters that are no white space: no pre-tokenizer of
/// the GPT-2 family joins anything across such a place.
pub(crate) fn chunks(text: &str, min_bytes: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let bytes = rest.as_bytes();
        let mut at = min_bytes.max(2);
        while at < bytes.len() {
            let plain = |byte: u8| byte.is_ascii_graphic();
            if bytes[at - 1] == b'\n' && plain(bytes[at - 2]) && plain(bytes[at]) {
                break;
            }
            at += 1;
        }
        let (part, later) = rest.split_at(at.min(bytes.len()));
        rest = later;
        Some(part)
    })
}
