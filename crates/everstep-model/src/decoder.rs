//! The whole forward pass: tokens to logits.

use tch::{Device, Kind, Tensor};

use crate::attention::Attention;
use crate::cache::Cache;
use crate::config::{ModelConfig, Positions};
use crate::deepseek_v3::{Experts, LatentAttention, Routing};
use crate::layers::{FeedForward, Normalize, dropout};
use crate::rotary::Rotary;
use crate::spec::Names;
use crate::weights::Weights;

/// All layers, holding leaves of the weights.
#[derive(Debug)]
pub(crate) struct Decoder {
    tokens: Tensor,
    positions: Option<Tensor>,
    rotary: Option<Rotary>,
    layers: Vec<Layer>,
    last_norm: Normalize,
    /// `[vocab_size, width]`; the token embedding if they are tied.
    output: Tensor,
    width: i64,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Normalize,
    attention: AnyAttention,
    mlp_norm: Normalize,
    mlp: AnyMlp,
}

#[derive(Debug)]
enum AnyAttention {
    /// Every head, or group of heads, has its keys and values.
    Heads(Attention),
    Latent(LatentAttention),
}

#[derive(Debug)]
enum AnyMlp {
    Dense(FeedForward),
    Experts(Experts),
}

impl Decoder {
    pub(crate) fn new(weights: &mut Weights, config: &ModelConfig, device: Device) -> Self {
        let names = Names::of(config);
        let tokens = weights.leaf(&[names.tokens.to_owned()]);
        let learned = config.positions == Positions::Learned;
        let layer = |weights: &mut Weights, layer| Layer {
            attention_norm: Normalize::new(
                weights,
                config,
                &names.in_layer(layer, names.attention_norm),
            ),
            attention: match &config.mla {
                Some(mla) => {
                    AnyAttention::Latent(LatentAttention::new(weights, config, mla, layer))
                }
                None => AnyAttention::Heads(Attention::new(weights, config, layer)),
            },
            mlp_norm: Normalize::new(weights, config, &names.in_layer(layer, names.mlp_norm)),
            mlp: match &config.moe {
                Some(moe) if layer >= moe.dense_layers => {
                    AnyMlp::Experts(Experts::new(weights, config, moe, layer))
                }
                _ => {
                    let projections = [names.gate, names.up, names.down];
                    let projections = projections.map(|name| names.in_layer(layer, name));
                    AnyMlp::Dense(FeedForward::new(weights, config, projections))
                }
            },
        };
        Self {
            positions: learned.then(|| weights.leaf(&[names.positions.to_owned()])),
            rotary: (!learned).then(|| Rotary::new(config, device)),
            layers: (0..config.layers)
                .map(|index| layer(weights, index))
                .collect(),
            last_norm: Normalize::new(weights, config, names.last_norm),
            output: if config.tied_embeddings {
                tokens.shallow_clone()
            } else {
                weights.leaf(&[names.output.to_owned()])
            },
            tokens,
            width: config.width as i64,
        }
    }

    /// The residual stream after the last norm, `[rows * columns, width]`, for tokens `[rows, columns]`.
    ///
    /// `drop` is the share of activations to drop. With a cache, the tokens follow those that it holds. `routing` learns of the experts.
    pub(crate) fn hidden(
        &self,
        tokens: &Tensor,
        drop: f64,
        mut cache: Option<&mut Cache>,
        mut routing: Option<&mut Routing>,
    ) -> Tensor {
        let columns = tokens.size()[1];
        let start = cache.as_ref().map_or(0, |cache| cache.len());
        let mut x = self.embed(tokens, start, columns);
        x = dropout(x, drop).view([-1, self.width]);
        for layer in &self.layers {
            let normed = layer.attention_norm.forward(&x);
            let cache = cache.as_deref_mut();
            let attended = match (&layer.attention, &self.rotary) {
                (AnyAttention::Heads(attention), rotary) => {
                    attention.forward(&normed, columns, rotary.as_ref(), drop, cache)
                }
                (AnyAttention::Latent(attention), Some(rotary)) => {
                    attention.forward(&normed, columns, rotary, drop, cache)
                }
                (AnyAttention::Latent(_), None) => unreachable!("latent attention rotates"),
            };
            let y = &x + dropout(attended, drop);
            let normed = layer.mlp_norm.forward(&y);
            let fed = match &layer.mlp {
                AnyMlp::Dense(mlp) => mlp.forward(&normed),
                AnyMlp::Experts(experts) => {
                    experts.forward(&normed, columns, routing.as_deref_mut())
                }
            };
            x = y + dropout(fed, drop);
        }
        if let Some(cache) = cache {
            cache.advance(columns);
        }
        self.last_norm.forward(&x)
    }

    /// Float32 logits `[tokens, vocab_size]` of `[tokens, width]`.
    pub(crate) fn logits(&self, hidden: &Tensor) -> Tensor {
        hidden
            .linear(&self.output, None::<&Tensor>)
            .to_kind(Kind::Float)
    }

    fn embed(&self, tokens: &Tensor, start: i64, columns: i64) -> Tensor {
        // Rows are looked up in float32, so that the gradients of a token that occurs often add up in float32.
        let table = self.tokens.to_kind(Kind::Float);
        let x = Tensor::embedding(&table, tokens, -1, false, false);
        let x = match &self.positions {
            Some(positions) => x + positions.narrow(0, start, columns),
            None => x,
        };
        x.to_kind(self.tokens.kind())
    }
}
