//! Multi-token prediction (DeepSeek-V3 §2.2, equations 21 to 23).

use tch::Tensor;

use super::Routing;
use crate::layer::{Pass, SharedLayer};
use crate::layers::{Linear, Normalize};
use crate::weights::Weights;
use everstep_spec::config::ModelConfig;
use everstep_spec::spec::Names;

/// The k-th module: from what the model, or the module before, knows at a position, and the token k places after it, to what predicts
/// the token after that. Embedding and output matrix are the model's own.
#[derive(Debug)]
pub(crate) struct Prediction {
    embedding_norm: Normalize,
    hidden_norm: Normalize,
    /// `[width, 2 * width]`; the embedding's half comes first in checkpoints, unlike in the paper.
    join: Linear,
    layer: SharedLayer,
    last_norm: Normalize,
}

impl Prediction {
    pub(crate) fn new(weights: &mut Weights, config: &ModelConfig, layer: usize) -> Self {
        let names = Names::of(config);
        let name = |suffix: &str| names.in_layer(layer, suffix);
        Self {
            embedding_norm: Normalize::new(weights, config, &name("enorm")),
            hidden_norm: Normalize::new(weights, config, &name("hnorm")),
            join: Linear::new(weights, config, &[name("eh_proj")]),
            layer: SharedLayer::new(weights, config, layer),
            last_norm: Normalize::new(weights, config, &name("shared_head.norm")),
        }
    }

    /// `[tokens, width]` twice to the same; the last norm is part of it.
    pub(crate) fn forward(
        &self,
        hidden: &Tensor,
        embedded: &Tensor,
        pass: Pass<'_>,
        routing: &mut Routing,
    ) -> Tensor {
        let e = self.embedding_norm.forward(embedded);
        let h = self.hidden_norm.forward(hidden);
        // [tokens, 2 * width] to [tokens, width]
        let x = self.join.forward(&Tensor::cat(&[e, h], 1));
        let y = self.layer.forward(&x, pass, None, Some(routing));
        self.last_norm.forward(&y)
    }
}
