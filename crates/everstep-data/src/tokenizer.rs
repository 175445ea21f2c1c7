//! Text to tokens and back.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::{DataError, IoContext};

/// Names of the token that separates documents, as known tokenizers have it.
const END_OF_TEXT: [&str; 4] = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"];

/// Names of the tokens before the beginning, the end and the middle of a rearranged text: ours, StarCoder's, DeepSeek's.
pub(crate) const FILL_IN_MARKS: [[&str; 3]; 3] = [
    ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
    ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
    ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"],
];

/// A tokenizer. Every kind is stored as a Hugging Face `tokenizer.json`; the character and byte kinds are recognised
/// when one is opened and take a direct path that gives the same tokens.
pub struct Tokenizer {
    json: Vec<u8>,
    vocab_size: usize,
    eot: Option<(u32, &'static str)>,
    fill_in_marks: Option<[u32; 3]>,
    inner: Inner,
}

enum Inner {
    Char {
        characters: Vec<char>,
        ids: BTreeMap<char, u32>,
    },
    Byte,
    General(Box<tokenizers::Tokenizer>),
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size)
            .field("eot", &self.eot())
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Opens a `tokenizer.json`.
    ///
    /// # Errors
    /// [`DataError::Io`] if it cannot be read, [`DataError::BadSource`] if it is not a tokenizer.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let json = std::fs::read(path).at("read", path)?;
        Self::from_json(json).map_err(|error| DataError::BadSource {
            file: path.to_owned(),
            line: None,
            reason: format!("is not a tokenizer.json: {error}"),
        })
    }

    /// A tokenizer from the bytes of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] says what is wrong with it.
    pub fn from_json(json: Vec<u8>) -> Result<Self, DataError> {
        let mut general = tokenizers::Tokenizer::from_bytes(&json).map_err(DataError::tokenizer)?;
        // A text that quotes a special token must not become one.
        general.set_encode_special_tokens(true);
        let vocab = general.get_vocab(true);
        let vocab_size = vocab.values().max().map_or(0, |&id| id as usize + 1);
        if vocab_size == 0 {
            return Err(DataError::tokenizer("has no tokens"));
        }
        let eot = END_OF_TEXT
            .iter()
            .find_map(|&name| vocab.get(name).map(|&id| (id, name)));
        let fill_in_marks = FILL_IN_MARKS.iter().find_map(|names| {
            let id = |name| vocab.get(name).copied();
            Some([id(names[0])?, id(names[1])?, id(names[2])?])
        });
        let inner = match Shape::of(&json) {
            Shape::Char => {
                let single = |text: &str| {
                    let mut characters = text.chars();
                    characters.next().filter(|_| characters.next().is_none())
                };
                let ids: Option<BTreeMap<char, u32>> = vocab
                    .iter()
                    .map(|(text, &id)| single(text).map(|character| (character, id)))
                    .collect();
                let ids = ids
                    .ok_or_else(|| DataError::tokenizer("has a token that is not one character"))?;
                let mut characters = vec!['\0'; vocab_size];
                ids.iter()
                    .for_each(|(&character, &id)| characters[id as usize] = character);
                if ids.len() != vocab_size {
                    return Err(DataError::tokenizer("has character ids with gaps"));
                }
                Inner::Char { characters, ids }
            }
            Shape::Byte if vocab_size == 256 => Inner::Byte,
            Shape::Byte | Shape::General => Inner::General(Box::new(general)),
        };
        Ok(Self {
            json,
            vocab_size,
            eot,
            fill_in_marks,
            inner,
        })
    }

    /// The tokens of `text`; nothing is added, and a special token's name in the text is ordinary text.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] names the first character that a character tokenizer does not know.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        match &self.inner {
            Inner::Byte => Ok(text.bytes().map(u32::from).collect()),
            Inner::Char { ids, .. } => text
                .chars()
                .map(|character| {
                    let unknown = || {
                        DataError::tokenizer(format!("does not know the character {character:?}"))
                    };
                    ids.get(&character).copied().ok_or_else(unknown)
                })
                .collect(),
            Inner::General(tokenizer) => {
                let encoding = tokenizer
                    .encode_fast(text, false)
                    .map_err(DataError::tokenizer)?;
                Ok(encoding.get_ids().to_vec())
            }
        }
    }

    /// The text of `tokens`, without special tokens. Bytes that are not UTF-8, such as half a character at the end,
    /// become U+FFFD.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] names a token outside the vocabulary.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, DataError> {
        if let Some(token) = tokens
            .iter()
            .find(|&&token| token as usize >= self.vocab_size)
        {
            return Err(DataError::tokenizer(format!(
                "token {token} is outside the vocabulary of {}",
                self.vocab_size
            )));
        }
        match &self.inner {
            Inner::Char { characters, .. } => Ok(tokens
                .iter()
                .map(|&token| characters[token as usize])
                .collect()),
            Inner::Byte => {
                let bytes: Vec<u8> = tokens.iter().map(|&token| token as u8).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Inner::General(tokenizer) => {
                tokenizer.decode(tokens, true).map_err(DataError::tokenizer)
            }
        }
    }

    /// Number of token ids: the highest one plus 1.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that ends a text, if the tokenizer has one.
    pub fn eot(&self) -> Option<u32> {
        self.eot.map(|(id, _)| id)
    }

    /// Id and name of that token.
    pub fn end_of_text(&self) -> Option<(u32, &'static str)> {
        self.eot
    }

    /// The tokens before the beginning, the end and the middle of a rearranged text, if the tokenizer has them.
    pub(crate) fn fill_in_marks(&self) -> Option<[u32; 3]> {
        self.fill_in_marks
    }

    /// The bytes of `tokenizer.json`.
    pub fn json(&self) -> &[u8] {
        &self.json
    }

    /// BLAKE3 of `tokenizer.json`, as hexadecimal digits.
    pub fn digest(&self) -> String {
        blake3::hash(&self.json).to_hex().to_string()
    }
}

/// The pattern that cuts a text into characters.
pub(crate) const CHARACTER_PATTERN: &str = "[\\s\\S]";

/// What a `tokenizer.json` amounts to.
enum Shape {
    Char,
    Byte,
    General,
}

impl Shape {
    fn of(json: &[u8]) -> Self {
        let Ok(value) = serde_json::from_slice::<serde_json::Value>(json) else {
            return Self::General;
        };
        let text = |pointer: &str| {
            value
                .pointer(pointer)
                .and_then(|found| found.as_str())
                .unwrap_or_default()
        };
        let absent = |pointer: &str| value.pointer(pointer).is_none_or(|found| found.is_null());
        let plain = absent("/normalizer")
            && value
                .pointer("/added_tokens")
                .and_then(|tokens| tokens.as_array())
                .is_none_or(|tokens| tokens.is_empty());
        let no_merges = || {
            value
                .pointer("/model/merges")
                .and_then(|merges| merges.as_array())
                .is_some_and(|m| m.is_empty())
        };
        let switch = |name: &str| {
            value
                .pointer(&format!("/pre_tokenizer/{name}"))
                .and_then(|found| found.as_bool())
        };
        match (text("/model/type"), text("/pre_tokenizer/type")) {
            ("WordLevel", "Split")
                if plain
                    && text("/pre_tokenizer/pattern/Regex") == CHARACTER_PATTERN
                    && text("/pre_tokenizer/behavior") == "Isolated" =>
            {
                Self::Char
            }
            ("BPE", "ByteLevel")
                if plain
                    && no_merges()
                    && switch("add_prefix_space") == Some(false)
                    && byte_vocabulary(&value) =>
            {
                Self::Byte
            }
            _ => Self::General,
        }
    }
}

/// True if every byte's character has the byte's value as its id.
fn byte_vocabulary(value: &serde_json::Value) -> bool {
    (0..=255u8).all(|byte| {
        let name = byte_character(byte).to_string();
        value
            .pointer("/model/vocab")
            .and_then(|vocab| vocab.get(&name))
            .and_then(|id| id.as_u64())
            == Some(byte.into())
    })
}

/// The printable character that byte-level tokenizers show `byte` as.
///
/// # Source
/// `bytes_to_unicode` of GPT-2's `encoder.py` (Radford et al. 2019).
pub(crate) fn byte_character(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match printable(byte) {
        true => char::from(byte),
        false => {
            let rank = (0..byte).filter(|&lower| !printable(lower)).count() as u32;
            char::from_u32(256 + rank).expect("256 and the following code points are characters")
        }
    }
}

#[cfg(test)]
mod tests;
