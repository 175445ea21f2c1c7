//! A layer: attention and MLP of the architecture, each behind a norm and beside the residual stream.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use everstep_torch::recomputed;
use tch::Tensor;

use crate::attention::Attention;
use crate::cache::Cache;
use crate::deepseek_v3::{Experts, LatentAttention, Routing};
use crate::layers::{FeedForward, Normalize, dropout};
use crate::rotary::Rotary;
use crate::weights::Weights;
use everstep_spec::config::ModelConfig;
use everstep_spec::spec::Names;

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
    /// Whether backward computes each layer again, instead of keeping what it needs of them.
    pub(crate) is_recomputed: bool,
}

/// A layer as backward may need it: again, and on another thread.
#[derive(Debug)]
pub(crate) struct SharedLayer {
    layer: Arc<Mutex<Layer>>,
    /// By which it is differentiated.
    leaves: Vec<Tensor>,
}

impl SharedLayer {
    pub(crate) fn new(weights: &mut Weights, config: &ModelConfig, layer: usize) -> Self {
        let num_before = weights.leaves().len();
        let layer = Layer::new(weights, config, layer);
        let leaves = weights.leaves()[num_before..].iter();
        Self {
            leaves: leaves.map(|(_, leaf)| leaf.shallow_clone()).collect(),
            layer: Arc::new(Mutex::new(layer)),
        }
    }

    /// As [`Layer::forward`].
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        pass: Pass<'_>,
        cache: Option<&mut Cache>,
        routing: Option<&mut Routing>,
    ) -> Tensor {
        match routing {
            Some(routing) if pass.is_recomputed => self.forward_again_in_backward(x, pass, routing),
            routing => lock(&self.layer).forward(x, pass, cache, routing),
        }
    }

    fn forward_again_in_backward(
        &self,
        x: &Tensor,
        pass: Pass<'_>,
        routing: &mut Routing,
    ) -> Tensor {
        let layer = self.layer.clone();
        let rotary = pass.rotary.map(Rotary::shallow_clone);
        let mask = pass.mask.map(Tensor::shallow_clone);
        let Pass { columns, drop, .. } = pass;
        // Of the loads only those of the first time count.
        let loads = Arc::new(Mutex::new(Vec::new()));
        let seen = loads.clone();
        let mut outputs = recomputed(x, &self.leaves, drop > 0.0, move |x| {
            let pass = Pass {
                columns,
                rotary: rotary.as_ref(),
                drop,
                mask: mask.as_ref(),
                is_recomputed: false,
            };
            let mut routing = Routing::default();
            let y = lock(&layer).forward(x, pass, None, Some(&mut routing));
            *lock(&seen) = routing.excess;
            [y].into_iter().chain(routing.losses).collect()
        })
        .into_iter();
        let y = outputs.next().expect("a layer gives its residual stream");
        routing.losses.extend(outputs);
        routing.excess.append(&mut lock(&loads));
        y
    }
}

/// A panic while it was held ends the process's actor; nothing of a layer changes in a pass.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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

impl Layer {
    fn new(weights: &mut Weights, config: &ModelConfig, layer: usize) -> Self {
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
    fn forward(
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
