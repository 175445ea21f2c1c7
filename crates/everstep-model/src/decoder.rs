//! The whole forward pass: tokens to logits.

use everstep_torch::CrossEntropies;
use tch::{Device, Kind, Tensor};

use crate::batch::IGNORED_TARGET;
use crate::cache::Cache;
use crate::deepseek_v3::{Prediction, Routing};
use crate::layer::{Pass, SharedLayer};
use crate::layers::{Normalize, dropout, in_one_order, is_even, is_in_one_order};
use crate::rotary::Rotary;
use crate::weights::Weights;
use everstep_spec::config::{ModelConfig, Positions};
use everstep_spec::spec::{Names, prediction_layers};

/// All layers, holding leaves of the weights.
#[derive(Debug)]
pub(crate) struct Decoder {
    tokens: Tensor,
    positions: Option<Tensor>,
    rotary: Option<Rotary>,
    layers: Vec<SharedLayer>,
    last_norm: Normalize,
    /// `[vocab_size, width]`; the token embedding if they are tied.
    output: Tensor,
    /// They predict tokens after the next one, while training.
    predictions: Vec<Prediction>,
    width: i64,
    /// Whether backward computes each layer again, while training.
    pub(crate) is_recomputed: bool,
}

impl Decoder {
    pub(crate) fn new(weights: &mut Weights, config: &ModelConfig, device: Device) -> Self {
        let names = Names::of(config);
        let tokens = weights.leaf(&[names.tokens.to_owned()]);
        let learned = config.positions == Positions::Learned;
        Self {
            positions: learned.then(|| weights.leaf(&[names.positions.to_owned()])),
            rotary: (!learned).then(|| Rotary::new(config, device)),
            layers: (0..config.layers)
                .map(|layer| SharedLayer::new(weights, config, layer))
                .collect(),
            last_norm: Normalize::new(weights, config, names.last_norm),
            output: if config.tied_embeddings {
                tokens.shallow_clone()
            } else {
                weights.leaf(&[names.output.to_owned()])
            },
            predictions: prediction_layers(config)
                .map(|layer| Prediction::new(weights, config, layer))
                .collect(),
            tokens,
            width: config.width as i64,
            is_recomputed: false,
        }
    }

    /// The residual stream after the last norm, `[rows * columns, width]`, for tokens `[rows, columns]`.
    ///
    /// `drop` and `mask` as in [`Pass`]. With a cache, the tokens follow those that it holds. `routing` learns of the experts.
    pub(crate) fn hidden(
        &self,
        tokens: &Tensor,
        drop: f64,
        mask: Option<&Tensor>,
        mut cache: Option<&mut Cache>,
        mut routing: Option<&mut Routing>,
    ) -> Tensor {
        let columns = tokens.size()[1];
        let pass = self.pass(columns, drop, mask);
        let start = cache.as_ref().map_or(0, |cache| cache.len());
        let mut x = self.embed(tokens, start, columns);
        x = dropout(x, drop).view([-1, self.width]);
        for layer in &self.layers {
            x = layer.forward(&x, pass, cache.as_deref_mut(), routing.as_deref_mut());
        }
        if let Some(cache) = cache {
            cache.advance(columns);
        }
        self.last_norm.forward(&x)
    }

    /// For each module in turn, its residual stream after its norm, `[rows * columns, width]`: that of the k-th module predicts, at each
    /// position, the token k places after the next one, and `tokens_after[k - 1]` are those k - 1 places after the next one.
    pub(crate) fn predictions(
        &self,
        hidden: &Tensor,
        tokens_after: &[Tensor],
        drop: f64,
        mask: Option<&Tensor>,
        routing: &mut Routing,
    ) -> Vec<Tensor> {
        let mut h = hidden.shallow_clone();
        let mut made = Vec::with_capacity(self.predictions.len());
        for (module, tokens) in self.predictions.iter().zip(tokens_after) {
            let columns = tokens.size()[1];
            let embedded = self.embed(tokens, 0, columns).view([-1, self.width]);
            let pass = self.pass(columns, drop, mask);
            h = module.forward(&h, &embedded, pass, routing);
            made.push(h.shallow_clone());
        }
        made
    }

    fn pass<'a>(&'a self, columns: i64, drop: f64, mask: Option<&'a Tensor>) -> Pass<'a> {
        Pass {
            columns,
            rotary: self.rotary.as_ref(),
            drop,
            mask,
            is_recomputed: self.is_recomputed,
        }
    }

    /// Float32 logits `[tokens, vocab_size]` of `[tokens, width]`.
    pub(crate) fn logits(&self, hidden: &Tensor) -> Tensor {
        let is_even = is_even(hidden.size()[0]);
        in_one_order(is_even, hidden, &self.output, |x, output| {
            x.linear(output, None::<&Tensor>)
        })
        .to_kind(Kind::Float)
    }

    /// Cross-entropies of the logits of `[tokens, width]` with `targets` `[tokens]`, the z-loss in their objective.
    pub(crate) fn cross_entropies(
        &self,
        hidden: &Tensor,
        targets: &Tensor,
        z_loss: f64,
    ) -> CrossEntropies {
        let (hidden, output) = if is_in_one_order(is_even(hidden.size()[0]), hidden) {
            (hidden.shallow_clone(), self.output.shallow_clone())
        } else {
            (
                hidden.to_kind(Kind::Float),
                self.output.to_kind(Kind::Float),
            )
        };
        everstep_torch::cross_entropies(&hidden, &output, targets, IGNORED_TARGET, z_loss)
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
