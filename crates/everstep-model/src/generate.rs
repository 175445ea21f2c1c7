//! Tokens from a prompt, with a cache of keys and values.

use std::ops::ControlFlow;

use everstep_protocol::random::{Purpose, Stream};
use everstep_torch::bytes;
use tch::{Tensor, no_grad};

use crate::batch::check_tokens;
use crate::cache::Cache;
use crate::error::ModelError;
use crate::model::Model;
use crate::sample::Sampling;

/// How a text goes on.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Largest number of tokens to make.
    pub tokens_max: usize,
    /// Tokens that end the text; the one that does is part of it.
    pub stop: Vec<i64>,
}

/// The draws of sample `sample` of prompt `prompt` in a run with `seed`.
pub fn sampling_stream(seed: u64, prompt: u64, sample: u64) -> Stream {
    Stream::new(seed, Purpose::Sampling, &[prompt, sample])
}

impl Model {
    /// Continues `prompt` and gives the new tokens; equal streams give equal tokens.
    ///
    /// `on_token` sees each token as it is made and may break off. A text that outgrows the model's context goes on with
    /// the latter half of what the model sees.
    ///
    /// # Errors
    /// [`ModelError::EmptyBatch`] for an empty prompt, [`ModelError::UnknownToken`], [`ModelError::Option`], or
    /// [`ModelError::NotFinite`] if the parameters are broken.
    pub fn generate(
        &self,
        prompt: &[i64],
        options: &GenerateOptions,
        mut stream: Stream,
        mut on_token: impl FnMut(i64) -> ControlFlow<()>,
    ) -> Result<Vec<i64>, ModelError> {
        options.sampling.check()?;
        let mut sequence = self.sequence();
        let mut made = Vec::new();
        let mut next = prompt.to_vec();
        while made.len() < options.tokens_max {
            let logits = sequence.push(&next)?;
            let token = options.sampling.choose(&logits, &mut stream)?;
            made.push(token);
            if on_token(token).is_break() || options.stop.contains(&token) {
                break;
            }
            next = vec![token];
        }
        Ok(made)
    }

    /// An empty sequence, to be fed token by token.
    pub fn sequence(&self) -> Sequence<'_> {
        let cache = Cache::new(self.config(), 1, self.dtype.kind(), self.device());
        Sequence {
            model: self,
            cache,
            seen: Vec::new(),
        }
    }
}

/// A text that grows, with the keys and values of what it has.
#[derive(Debug)]
pub struct Sequence<'a> {
    model: &'a Model,
    cache: Cache,
    /// The tokens in the cache.
    seen: Vec<i64>,
}

impl Sequence<'_> {
    /// Appends tokens and gives the float32 logits, `vocab_size`, of the token that follows.
    ///
    /// Beyond the model's context, the oldest tokens are forgotten so that half of it is free again.
    ///
    /// # Errors
    /// [`ModelError::EmptyBatch`] for no tokens, [`ModelError::UnknownToken`]; the sequence is then unchanged.
    pub fn push(&mut self, tokens: &[i64]) -> Result<Vec<f32>, ModelError> {
        let config = self.model.config();
        if tokens.is_empty() {
            return Err(ModelError::EmptyBatch);
        }
        check_tokens(tokens, config)?;
        self.seen.extend_from_slice(tokens);
        let mut columns = tokens.len();
        if self.seen.len() > config.context {
            let kept = config.context.div_ceil(2);
            self.seen.drain(..self.seen.len() - kept);
            self.cache.clear();
            columns = kept;
        }
        let fed = &self.seen[self.seen.len() - columns..];
        let logits = no_grad(|| {
            let input = Tensor::from_slice(fed)
                .unsqueeze(0)
                .to_device(self.model.device());
            let hidden = self
                .model
                .decoder
                .hidden(&input, 0.0, None, Some(&mut self.cache), None);
            self.model
                .decoder
                .logits(&hidden.narrow(0, columns as i64 - 1, 1))
        });
        let mut values = vec![0.0; config.vocab_size];
        bytes::read_f32(&logits, &mut values)?;
        Ok(values)
    }
}
