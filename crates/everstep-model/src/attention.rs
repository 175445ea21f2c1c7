//! Causal attention with grouped queries.

use tch::{Kind, Tensor};

use crate::cache::Cache;
use crate::layer::Pass;
use crate::layers::Linear;
use crate::rotary::Rotary;
use crate::weights::Weights;
use everstep_spec::config::{Architecture, ModelConfig};
use everstep_spec::spec::Names;

/// The attention of one layer.
#[derive(Debug)]
pub(crate) struct Attention {
    /// Queries, keys and values in one product.
    inputs: Linear,
    output: Linear,
    layer: usize,
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
}

impl Attention {
    pub(crate) fn new(weights: &mut Weights, config: &ModelConfig, layer: usize) -> Self {
        let names = Names::of(config);
        let (inputs, output): (&[&str], _) = match config.architecture {
            Architecture::Llama | Architecture::DeepseekV3 => (
                &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                "self_attn.o_proj",
            ),
            Architecture::Gpt2 => (&["attn.c_attn"], "attn.c_proj"),
        };
        let inputs: Vec<String> = inputs
            .iter()
            .map(|name| names.in_layer(layer, name))
            .collect();
        Self {
            inputs: Linear::new(weights, config, &inputs),
            output: Linear::new(weights, config, &[names.in_layer(layer, output)]),
            layer,
            heads: config.heads as i64,
            kv_heads: config.kv_heads as i64,
            head_dim: config.head_dim() as i64,
        }
    }

    /// `[rows * columns, width]` to the same. With a cache, the tokens follow those that it holds.
    pub(crate) fn forward(&self, x: &Tensor, pass: Pass<'_>, cache: Option<&mut Cache>) -> Tensor {
        let columns = pass.columns;
        let tokens = x.size()[0];
        let all_heads = self.heads + 2 * self.kv_heads;
        let joined =
            self.inputs
                .forward(x)
                .view([tokens / columns, columns, all_heads, self.head_dim]);
        let (queries, keys, values) = self.split(
            &joined,
            pass.rotary,
            cache.as_ref().map_or(0, |cache| cache.len()),
        );
        let (keys, values) = match cache {
            Some(cache) => cache.extend(self.layer, &keys, &values),
            None => (keys, values),
        };
        let attended = attend(
            &queries,
            &self.share(&keys),
            &self.share(&values),
            pass,
            None,
        );
        self.output.forward(
            &attended
                .transpose(1, 2)
                .reshape([tokens, self.heads * self.head_dim]),
        )
    }

    /// Queries, keys and values, each `[rows, heads, columns, head_dim]`, turned to their positions.
    fn split(
        &self,
        joined: &Tensor,
        rotary: Option<&Rotary>,
        start: i64,
    ) -> (Tensor, Tensor, Tensor) {
        let (queries, keys, values) = match rotary {
            Some(rotary) => {
                let parts = joined.split_with_sizes([self.heads + self.kv_heads, self.kv_heads], 2);
                let turned = rotary
                    .turn(&parts[0], start)
                    .split_with_sizes([self.heads, self.kv_heads], 2);
                (
                    turned[0].transpose(1, 2),
                    turned[1].transpose(1, 2),
                    parts[1].transpose(1, 2),
                )
            }
            None => {
                let parts = joined.split_with_sizes([self.heads, self.kv_heads, self.kv_heads], 2);
                (
                    parts[0].transpose(1, 2),
                    parts[1].transpose(1, 2),
                    parts[2].transpose(1, 2),
                )
            }
        };
        (queries, keys, values)
    }

    /// Gives every query head its key or value head: `[rows, kv_heads, …]` to `[rows, heads, …]`.
    fn share(&self, x: &Tensor) -> Tensor {
        if self.heads == self.kv_heads {
            return x.shallow_clone();
        }
        let [rows, _, columns, _] = x.size()[..] else {
            unreachable!("keys and values have four dimensions")
        };
        let group = self.heads / self.kv_heads;
        x.unsqueeze(2)
            .expand([rows, self.kv_heads, group, columns, self.head_dim], false)
            .reshape([rows, self.heads, columns, self.head_dim])
    }
}

/// Causal attention of the last tokens, `[rows, heads, columns, …]`, to all held; `scale` is on the logits, `1 / sqrt(width of a head)` if
/// left out.
pub(crate) fn attend(
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    pass: Pass<'_>,
    scale: Option<f64>,
) -> Tensor {
    let (columns, held) = (queries.size()[2], keys.size()[2]);
    // A single query sees all keys. Otherwise libtorch's causal mask is right only if nothing was held before.
    let causal = columns > 1 && columns == held && pass.mask.is_none();
    let late = (columns > 1 && columns < held).then(|| {
        Tensor::ones([columns, held], (Kind::Bool, queries.device())).tril(held - columns)
    });
    let mask = late.as_ref().or(pass.mask);
    Tensor::scaled_dot_product_attention(
        queries, keys, values, mask, pass.drop, causal, scale, false,
    )
}
