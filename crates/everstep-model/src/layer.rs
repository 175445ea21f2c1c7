//! A layer: attention and MLP of the architecture, each behind a norm and beside the residual stream.

use tch::Tensor;

use crate::attention::Attention;
use crate::cache::Cache;
use crate::config::ModelConfig;
use crate::deepseek_v3::{Experts, LatentAttention, Routing};
use crate::layers::{FeedForward, Normalize, dropout};
use crate::rotary::Rotary;
use crate::spec::Names;
use crate::weights::Weights;

/// What all layers share in a pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pass<'a> {
    /// Tokens of a sequence.
    pub(crate) columns: i64,
    /// Nothing where positions are learned.
    pub(crate) rotary: Option<&'a Rotary>,
    /// Share of activations to drop.
    pub(crate) drop: f64,
    /// Which tokens each token sees, bool `[rows, 1, columns, columns]`; all before it if left out.
    pub(crate) mask: Option<&'a Tensor>,
}

#[derive(Debug)]
pub(crate) struct Layer {
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

impl Layer {
    pub(crate) fn new(weights: &mut Weights, config: &ModelConfig, layer: usize) -> Self {
        let names = Names::of(config);
        let norm = |weights: &mut Weights, name| {
            Normalize::new(weights, config, &names.in_layer(layer, name))
        };
        Self {
            attention_norm: norm(weights, names.attention_norm),
            attention: match &config.mla {
                Some(mla) => {
                    AnyAttention::Latent(LatentAttention::new(weights, config, mla, layer))
                }
                None => AnyAttention::Heads(Attention::new(weights, config, layer)),
            },
            mlp_norm: norm(weights, names.mlp_norm),
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
        }
    }

    /// The residual stream, `[rows * columns, width]`, to the same.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        pass: Pass<'_>,
        cache: Option<&mut Cache>,
        routing: Option<&mut Routing>,
    ) -> Tensor {
        let normed = self.attention_norm.forward(x);
        let attended = match &self.attention {
            AnyAttention::Heads(attention) => attention.forward(&normed, pass, cache),
            AnyAttention::Latent(attention) => attention.forward(&normed, pass, cache),
        };
        let y = x + dropout(attended, pass.drop);
        let normed = self.mlp_norm.forward(&y);
        let fed = match &self.mlp {
            AnyMlp::Dense(mlp) => mlp.forward(&normed),
            AnyMlp::Experts(experts) => experts.forward(&normed, pass.columns, routing),
        };
        y + dropout(fed, pass.drop)
    }
}
