//! What attention needs of the tokens that a sequence has so far: keys and values, or the latent and the rotated key that they are made of.

use tch::{Device, Kind, Tensor};

use everstep_spec::ModelConfig;

/// Memory for one sequence, or several of equal length, up to the model's context.
#[derive(Debug)]
pub(crate) struct Cache {
    layers: Vec<(Tensor, Tensor)>,
    len: i64,
}

impl Cache {
    pub(crate) fn new(config: &ModelConfig, rows: usize, kind: Kind, device: Device) -> Self {
        let (heads, widths) = match &config.mla {
            Some(mla) => (1, [mla.kv_lora_rank, mla.qk_rope_head_dim]),
            None => (config.kv_heads, [config.head_dim(); 2]),
        };
        let empty = |width: usize| {
            let shape = [rows, heads, config.context, width].map(|len| len as i64);
            Tensor::zeros(shape, (kind, device))
        };
        Self {
            layers: (0..config.layers)
                .map(|_| (empty(widths[0]), empty(widths[1])))
                .collect(),
            len: 0,
        }
    }

    /// Tokens held.
    pub(crate) fn len(&self) -> i64 {
        self.len
    }

    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    /// Puts a layer's keys and values, `[rows, heads, columns, width]` each, behind those held, and gives them all.
    pub(crate) fn extend(
        &mut self,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
    ) -> (Tensor, Tensor) {
        let columns = keys.size()[2];
        let (held_keys, held_values) = &self.layers[layer];
        held_keys.narrow(2, self.len, columns).copy_(keys);
        held_values.narrow(2, self.len, columns).copy_(values);
        let end = self.len + columns;
        (held_keys.narrow(2, 0, end), held_values.narrow(2, 0, end))
    }

    /// Counts the columns that every layer was extended by.
    pub(crate) fn advance(&mut self, columns: i64) {
        self.len += columns;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use everstep_spec::config::{Architecture, LatentConfig};

    fn bytes_per_token(config: &ModelConfig, kind: Kind) -> usize {
        let rows = 3;
        let cache = Cache::new(config, rows, kind, Device::Cpu);
        let tensors = cache
            .layers
            .iter()
            .flat_map(|(keys, values)| [keys, values]);
        let bytes: usize = tensors
            .map(|x| x.numel() * x.kind().elt_size_in_bytes())
            .sum();
        bytes / (rows * config.context)
    }

    #[test]
    fn a_token_takes_what_the_papers_say() {
        // DeepSeek-V3: (512 + 64) values in each of 61 layers.
        let deepseek = ModelConfig {
            mla: Some(LatentConfig {
                q_lora_rank: Some(1536),
                kv_lora_rank: 512,
                qk_nope_head_dim: 128,
                qk_rope_head_dim: 64,
                v_head_dim: 128,
            }),
            ..ModelConfig::new(Architecture::DeepseekV3, 61, 128, 7168, 4)
        };
        assert_eq!(bytes_per_token(&deepseek, Kind::BFloat16), 70_272);
        // Llama-3.1-8B: keys and values of 8 heads of 128 in 32 layers.
        let llama = ModelConfig {
            kv_heads: 8,
            ..ModelConfig::new(Architecture::Llama, 32, 32, 4096, 4)
        };
        assert_eq!(bytes_per_token(&llama, Kind::BFloat16), 131_072);
    }
}
