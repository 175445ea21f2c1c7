//! Multi-head latent attention (DeepSeek-V2 §2.1; DeepSeek-V3 equations 1 to 11): keys and values of all heads are made from one narrow
//! latent, which is all that generation keeps of a token, beside one rotated key.

use tch::Tensor;

use crate::attention::attend;
use crate::cache::Cache;
use crate::layer::Pass;
use crate::layers::{Linear, Normalize};
use crate::weights::Weights;
use everstep_spec::config::{LatentConfig, ModelConfig, RopeScaling};
use everstep_spec::spec::Names;

/// Hugging Face's norms of latents take this, whatever the model's own is.
const LATENT_EPS: f64 = 1e-6;

/// The attention of one layer. Suffixes: b rows, t tokens (q of queries, k of keys), h heads, n width without position, r rotated width,
/// c latent width, v width of values.
#[derive(Debug)]
pub(crate) struct LatentAttention {
    /// What is read from the residual stream: queries or their latent (W^DQ), the latent of keys and values (W^DKV), the rotated key (W^KR).
    down: Linear,
    /// The queries of all heads from their latent (W^UQ and W^QR), if they have one.
    queries: Option<(Normalize, Linear)>,
    latent_norm: Normalize,
    /// Keys and values of all heads, `[h * (n + v), c]` (W^UK and W^UV).
    up: Linear,
    output: Linear,
    layer: usize,
    heads: i64,
    nope: i64,
    rope: i64,
    latent: i64,
    value: i64,
    scale: f64,
}

impl LatentAttention {
    pub(crate) fn new(
        weights: &mut Weights,
        config: &ModelConfig,
        mla: &LatentConfig,
        layer: usize,
    ) -> Self {
        let names = Names::of(config);
        let name = |suffix: &str| names.in_layer(layer, suffix);
        let first = match mla.q_lora_rank {
            Some(_) => "self_attn.q_a_proj",
            None => "self_attn.q_proj",
        };
        let down = [name(first), name("self_attn.kv_a_proj_with_mqa")];
        let down = Linear::new(weights, config, &down);
        let mut norm =
            |suffix: &str, width: usize| Normalize::rms(weights, &name(suffix), width, LATENT_EPS);
        let latent_norm = norm("self_attn.kv_a_layernorm", mla.kv_lora_rank);
        let query_norm = mla
            .q_lora_rank
            .map(|rank| norm("self_attn.q_a_layernorm", rank));
        let mut linear = |suffix: &str| Linear::new(weights, config, &[name(suffix)]);
        let scaling = config.rope_scaling.as_ref();
        Self {
            down,
            queries: query_norm.map(|norm| (norm, linear("self_attn.q_b_proj"))),
            latent_norm,
            up: linear("self_attn.kv_b_proj"),
            output: linear("self_attn.o_proj"),
            layer,
            heads: config.heads as i64,
            nope: mla.qk_nope_head_dim as i64,
            rope: mla.qk_rope_head_dim as i64,
            latent: mla.kv_lora_rank as i64,
            value: mla.v_head_dim as i64,
            scale: scaling.map_or(1.0, RopeScaling::logit_scale)
                / (mla.qk_head_dim() as f64).sqrt(),
        }
    }

    /// `[rows * columns, width]` to the same. With a cache, the tokens follow those that it holds.
    pub(crate) fn forward(&self, x: &Tensor, pass: Pass<'_>, cache: Option<&mut Cache>) -> Tensor {
        let (columns, rotary) = (pass.columns, pass.rotary);
        let rotary = rotary.expect("a model with latent attention rotates its positions");
        let tokens = x.size()[0];
        let rows = tokens / columns;
        let start = cache.as_ref().map_or(0, |cache| cache.len());
        let down = self.down.forward(x);
        let first = down.size()[1] - self.latent - self.rope;
        let parts = down.split_with_sizes([first, self.latent, self.rope], 1);

        let queries = match &self.queries {
            Some((norm, up)) => up.forward(&norm.forward(&parts[0])),
            None => parts[0].shallow_clone(),
        };
        let queries = queries
            .reshape([rows, columns, self.heads, self.nope + self.rope])
            .split_with_sizes([self.nope, self.rope], 3);
        let q_bhqn = queries[0].transpose(1, 2);
        let q_bhqr = rotary.turn_interleaved(&queries[1], start).transpose(1, 2);
        let latent_b1kc = self
            .latent_norm
            .forward(&parts[1])
            .view([rows, 1, columns, self.latent]);
        let k_b1kr = rotary
            .turn_interleaved(&parts[2].reshape([rows, columns, 1, self.rope]), start)
            .transpose(1, 2);

        let is_decoding = cache.is_some() && columns == 1;
        let (latent_b1kc, k_b1kr) = match cache {
            Some(cache) => cache.extend(self.layer, &latent_b1kc, &k_b1kr),
            None => (latent_b1kc, k_b1kr),
        };
        let attended_bhqv = if is_decoding {
            self.absorbed(&q_bhqn, &q_bhqr, &latent_b1kc, &k_b1kr, pass)
        } else {
            self.plain(&q_bhqn, &q_bhqr, &latent_b1kc, &k_b1kr, pass)
        };
        let joined = attended_bhqv
            .transpose(1, 2)
            .reshape([tokens, self.heads * self.value]);
        self.output.forward(&joined)
    }

    /// Makes the keys and values of every head.
    fn plain(
        &self,
        q_bhqn: &Tensor,
        q_bhqr: &Tensor,
        latent_b1kc: &Tensor,
        k_b1kr: &Tensor,
        pass: Pass<'_>,
    ) -> Tensor {
        let [rows, _, held, _] = latent_b1kc.size()[..] else {
            unreachable!("latents have four dimensions")
        };
        let made = self
            .up
            .forward(&latent_b1kc.reshape([rows * held, self.latent]))
            .view([rows, held, self.heads, self.nope + self.value])
            .split_with_sizes([self.nope, self.value], 3);
        let k_bhkr = k_b1kr.expand([rows, self.heads, held, self.rope], false);
        let keys = Tensor::cat(&[made[0].transpose(1, 2), k_bhkr], 3);
        let queries = Tensor::cat(&[q_bhqn, q_bhqr], 3);
        let values = made[1].transpose(1, 2);
        attend(&queries, &keys, &values, pass, Some(self.scale))
    }

    /// The same without them, for a few queries: W^UK moves to the queries and W^UV behind the sum, so that latents are keys and values.
    fn absorbed(
        &self,
        q_bhqn: &Tensor,
        q_bhqr: &Tensor,
        latent_b1kc: &Tensor,
        k_b1kr: &Tensor,
        pass: Pass<'_>,
    ) -> Tensor {
        let up = self
            .up
            .weight
            .view([self.heads, self.nope + self.value, self.latent])
            .split_with_sizes([self.nope, self.value], 1);
        let (up_key_hnc, up_value_hvc) = (&up[0], &up[1]);
        let q_bhqc = q_bhqn.matmul(up_key_hnc);
        let queries = Tensor::cat(&[&q_bhqc, q_bhqr], 3);
        let keys = Tensor::cat(&[latent_b1kc, k_b1kr], 3);
        let in_all_heads = |x: &Tensor| {
            let mut size = x.size();
            size[1] = self.heads;
            x.expand(&size, false)
        };
        let attended_bhqc = attend(
            &queries,
            &in_all_heads(&keys),
            &in_all_heads(latent_b1kc),
            pass,
            Some(self.scale),
        );
        attended_bhqc.matmul(&up_value_hvc.transpose(1, 2))
    }
}
