//! Fill-in-the-middle (Bavarian et al. 2022): a piece of text becomes its beginning, its end and then its middle, so that a model learns to
//! write between what stands before and after.

use everstep_protocol::random::{Purpose, Stream};

use crate::error::DataError;
use crate::order::Sample;
use crate::tokenizer::Tokenizer;

/// Shorter pieces are left alone: there would be nothing between the three marks.
const TOKENS_MIN: usize = 16;

/// Rearranges documents in training windows, as a pure function of seed and sample.
#[derive(Clone, Debug, PartialEq)]
pub struct FillIn {
    rate: f64,
    seed: u64,
    /// The tokens before the beginning, the end and the middle.
    marks: [u32; 3],
    end_of_text: Option<u32>,
}

impl FillIn {
    /// With this share of the documents of a window rearranged.
    ///
    /// # Errors
    /// [`DataError::Config`] if the tokenizer has no tokens for it.
    pub fn new(rate: f64, seed: u64, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        let marks = tokenizer.fill_in_marks().ok_or_else(|| {
            DataError::config(
                "data.fill_in_rate",
                "the tokenizer has no tokens for it; allowed: kind = \"bpe\", or a file with <|fim_prefix|>, <|fim_suffix|> and \
                 <|fim_middle|>",
            )
        })?;
        Ok(Self {
            rate,
            seed,
            marks,
            end_of_text: tokenizer.eot(),
        })
    }

    /// Rearranges some documents of a window, which keeps its length: each gives up its last three tokens for the marks.
    pub(crate) fn rearrange(&self, window: &mut [u32], sample: Sample) {
        let key = [sample.epoch, sample.window];
        let mut stream = Stream::new(self.seed, Purpose::FillIn, &key);
        let ends = |token: &u32| Some(*token) == self.end_of_text;
        for document in window.split_mut(ends) {
            if stream.unit_f64() < self.rate && document.len() >= TOKENS_MIN {
                let kept = document.len() - self.marks.len();
                let mut cut = || stream.below(kept as u64 + 1) as usize;
                let (a, b) = (cut(), cut());
                self.split(document, a.min(b), a.max(b));
            }
        }
    }

    /// `middle` and `end` are where those parts begin.
    fn split(&self, document: &mut [u32], middle: usize, end: usize) {
        let text = document[..document.len() - self.marks.len()].to_vec();
        let parts = [&text[..middle], &text[end..], &text[middle..end]];
        let marked = self.marks.iter().zip(parts);
        let tokens = marked.flat_map(|(mark, part)| std::iter::once(mark).chain(part));
        for (place, token) in document.iter_mut().zip(tokens) {
            *place = *token;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILL_IN: FillIn = FillIn {
        rate: 0.5,
        seed: 3,
        marks: [101, 102, 103],
        end_of_text: Some(100),
    };

    fn sample(window: u64) -> Sample {
        Sample {
            epoch: 0,
            window,
            start: 0,
        }
    }

    /// What the rearranged document says in its own order.
    fn read(document: &[u32]) -> Vec<u32> {
        let place = |mark| document.iter().position(|&token| token == mark);
        let Some((suffix, middle)) = place(102).zip(place(103)) else {
            return document.to_vec();
        };
        assert_eq!(document[0], 101);
        let (prefix, middle, end) = (
            &document[1..suffix],
            &document[middle + 1..],
            &document[suffix + 1..middle],
        );
        [prefix, middle, end].concat()
    }

    #[test]
    fn parts_change_places_and_say_the_same() {
        let documents: [Vec<u32>; 3] = [(0..40).collect(), (0..9).collect(), (40..80).collect()];
        let mut rearranged = 0;
        for window in 0..200 {
            let mut tokens = documents.join(&100);
            let plain = tokens.clone();
            FILL_IN.rearrange(&mut tokens, sample(window));
            let mut again = plain.clone();
            FILL_IN.rearrange(&mut again, sample(window));
            assert_eq!((tokens.len(), &tokens), (plain.len(), &again));
            let found = tokens.split(|&token| token == 100);
            for (document, found) in documents.iter().zip(found) {
                let said = read(found);
                assert_eq!(said, document[..said.len()]);
                let is_rearranged = found != document;
                assert_eq!(
                    document.len() - said.len(),
                    if is_rearranged { 3 } else { 0 }
                );
                assert!(!is_rearranged || document.len() >= TOKENS_MIN);
                rearranged += usize::from(is_rearranged);
            }
        }
        assert!((160..240).contains(&rearranged), "{rearranged} of 400");
    }
}
