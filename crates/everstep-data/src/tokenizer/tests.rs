use proptest::prelude::*;

use super::*;
use crate::tokenizer_build::{byte, char, train_bpe};

const TEXT: &str = "The quick brown fox, don't you know?  It's <|endoftext|> quoted.\n\tfn main() { println!(\"äöü→\"); }\n";

fn bpe(vocab_size: usize) -> Tokenizer {
    train_bpe(
        vec![TEXT.repeat(3), "other text\n".into()].into_iter(),
        vocab_size,
        false,
    )
    .unwrap()
}

/// The same file as the tokenizers crate alone understands it.
fn reference(tokenizer: &Tokenizer) -> tokenizers::Tokenizer {
    let mut reference = tokenizers::Tokenizer::from_bytes(tokenizer.json()).unwrap();
    reference.set_encode_special_tokens(true);
    reference
}

#[test]
fn every_kind_round_trips_and_reads_its_own_file() {
    let kinds = [
        bpe(320),
        byte().unwrap(),
        char(TEXT.chars().collect()).unwrap(),
    ];
    for tokenizer in kinds {
        let again = Tokenizer::from_json(tokenizer.json().to_vec()).unwrap();
        let tokens = tokenizer.encode(TEXT).unwrap();
        assert_eq!(tokens, again.encode(TEXT).unwrap());
        assert_eq!(tokenizer.decode(&tokens).unwrap(), TEXT);
        assert!(
            tokens
                .iter()
                .all(|&token| (token as usize) < tokenizer.vocab_size())
        );
        assert_eq!(
            tokens,
            reference(&tokenizer).encode(TEXT, false).unwrap().get_ids()
        );
        assert_eq!(reference(&tokenizer).decode(&tokens, true).unwrap(), TEXT);
    }
}

#[test]
fn kinds_have_the_ids_they_promise() {
    let characters = char("hello".chars().collect()).unwrap();
    assert_eq!(characters.encode("hello").unwrap(), [1, 0, 2, 2, 3]);
    assert_eq!((characters.vocab_size(), characters.eot()), (4, None));
    assert!(matches!(characters.inner, Inner::Char { .. }));
    let error = characters.encode("help").unwrap_err().to_string();
    assert_eq!(error, "tokenizer: does not know the character 'p'");

    let bytes = byte().unwrap();
    assert!(matches!(bytes.inner, Inner::Byte));
    assert_eq!(bytes.encode("aß\0").unwrap(), [97, 0xc3, 0x9f, 0]);
    assert_eq!((bytes.vocab_size(), bytes.eot()), (256, None));
    assert!(
        bytes
            .decode(&[256])
            .unwrap_err()
            .to_string()
            .contains("outside the vocabulary of 256")
    );

    let bpe = bpe(300);
    assert_eq!((bpe.vocab_size(), bpe.eot()), (300, Some(0)));
    assert!(!bpe.encode("<|endoftext|>").unwrap().contains(&0));
    assert_eq!(bpe.decode(&[0]).unwrap(), "");
}

#[test]
fn training_is_deterministic() {
    let texts = || (0..50).map(|i| format!("{TEXT} number {i} of {} words\n", i * 7919 % 1000));
    let first = train_bpe(texts(), 500, false).unwrap();
    for _ in 0..8 {
        assert!(train_bpe(texts(), 500, false).unwrap().json() == first.json());
    }
}

#[test]
fn what_is_no_tokenizer_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    for content in ["", "{}", "[1]", "{\"model\":{\"type\":\"BPE\"}}"] {
        std::fs::write(&path, content).unwrap();
        let error = Tokenizer::open(&path).unwrap_err().to_string();
        assert!(error.contains("is not a tokenizer.json"), "{error}");
    }
}

proptest! {
    #[test]
    fn any_text_round_trips_through_bytes_and_bpe(text in "\\PC*") {
        static BPE: std::sync::OnceLock<Tokenizer> = std::sync::OnceLock::new();
        for tokenizer in [BPE.get_or_init(|| bpe(320)), &byte().unwrap()] {
            let tokens = tokenizer.encode(&text).unwrap();
            prop_assert_eq!(&tokenizer.decode(&tokens).unwrap(), &text);
            // Cutting where `chunks` cuts changes no token.
            let cut: Vec<u32> = crate::tokenizer_build::chunks(&text, 4).flat_map(|part| tokenizer.encode(part).unwrap()).collect();
            prop_assert_eq!(tokens, cut);
        }
    }

    #[test]
    fn cutting_at_line_breaks_changes_no_token(text in "[ab.!'s 0\n\r\t]{0,200}") {
        static BPE: std::sync::OnceLock<Tokenizer> = std::sync::OnceLock::new();
        let tokenizer = BPE.get_or_init(|| bpe(320));
        let cut: Vec<u32> = crate::tokenizer_build::chunks(&text, 4).flat_map(|part| tokenizer.encode(part).unwrap()).collect();
        prop_assert_eq!(tokenizer.encode(&text).unwrap(), cut);
    }
}

#[test]
fn tokenizers_have_marks_for_fill_in_if_they_are_asked_for() {
    let texts = || vec![TEXT.to_owned()].into_iter();
    let with = train_bpe(texts(), 300, true).unwrap();
    assert_eq!(
        (with.eot(), with.fill_in_marks()),
        (Some(0), Some([1, 2, 3]))
    );
    assert_eq!(bpe(300).fill_in_marks(), None);
}
