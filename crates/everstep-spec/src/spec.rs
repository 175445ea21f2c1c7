//! The tensors of a model in canonical order: the layout of the flattened parameter vector.

use std::ops::Range;

use everstep_optim::{Init, ParameterSpec, Update};

use crate::config::{Architecture, ExpertsConfig, LatentConfig, Mlp, ModelConfig, Norm, Positions};

/// All parameters of the model in canonical order, with Hugging Face's names, shapes and orientation.
///
/// Matrices, which decay, come first in the order in which the model uses them; then the norms and biases, which do
/// not; then the routers' biases, which no gradient moves. So each optimizer group is one run of the vector and is cut in few blocks, and matrices that read the same
/// input (queries, keys and values; gate and up) are neighbours that can be multiplied as one.
///
/// # Panics
/// If `config` is not valid.
pub fn parameters(config: &ModelConfig) -> Vec<ParameterSpec> {
    let names = Names::of(config);
    let mut list = Collector::new(config);
    list.table(names.tokens, config.vocab_size);
    if config.positions == Positions::Learned {
        list.table(names.positions, config.context);
    }
    for layer in 0..config.layers {
        list.layer(&names, layer);
    }
    list.norm(names.last_norm);
    if !config.tied_embeddings {
        list.table(names.output, config.vocab_size);
    }
    for module in prediction_layers(config) {
        list.prediction(&names, module);
    }
    list.finish()
}

/// Whether a tensor has a row for each token or position: embeddings and the output matrix.
pub fn is_table(config: &ModelConfig, name: &str) -> bool {
    let names = Names::of(config);
    [names.tokens, names.positions, names.output].contains(&name)
}

/// The layers behind the last one, which predict tokens after the next one.
pub fn prediction_layers(config: &ModelConfig) -> Range<usize> {
    let modules = config.mtp.as_ref().map_or(0, |mtp| mtp.modules);
    config.layers..config.layers + modules
}

/// The suffixes and prefixes in which the architectures differ.
#[derive(Debug)]
pub struct Names {
    /// The token embedding.
    pub tokens: &'static str,
    /// The embedding of positions, where they are learned.
    pub positions: &'static str,
    /// Before the number of a layer.
    pub layers: &'static str,
    /// In a layer: the norm before attention.
    pub attention_norm: &'static str,
    /// In a layer: the norm before the feed-forward part.
    pub mlp_norm: &'static str,
    /// In a layer: what gates the feed-forward part.
    pub gate: &'static str,
    /// In a layer: the feed-forward part's way in.
    pub up: &'static str,
    /// In a layer: its way out.
    pub down: &'static str,
    /// The norm after the last layer.
    pub last_norm: &'static str,
    /// The output matrix, if it is not the token embedding.
    pub output: &'static str,
}

impl Names {
    /// Those of an architecture.
    pub fn of(config: &ModelConfig) -> Self {
        match config.architecture {
            Architecture::Llama | Architecture::DeepseekV3 => Self {
                tokens: "model.embed_tokens.weight",
                positions: "model.embed_positions.weight",
                layers: "model.layers",
                attention_norm: "input_layernorm",
                mlp_norm: "post_attention_layernorm",
                gate: "mlp.gate_proj",
                up: "mlp.up_proj",
                down: "mlp.down_proj",
                last_norm: "model.norm",
                output: "lm_head.weight",
            },
            Architecture::Gpt2 => Self {
                tokens: "transformer.wte.weight",
                positions: "transformer.wpe.weight",
                layers: "transformer.h",
                attention_norm: "ln_1",
                mlp_norm: "ln_2",
                gate: "mlp.c_gate",
                up: "mlp.c_fc",
                down: "mlp.c_proj",
                last_norm: "transformer.ln_f",
                output: "lm_head.weight",
            },
        }
    }

    /// The full name of something in a layer.
    pub fn in_layer(&self, layer: usize, suffix: &str) -> String {
        format!("{}.{layer}.{suffix}", self.layers)
    }
}

struct Collector<'a> {
    config: &'a ModelConfig,
    matrices: Vec<ParameterSpec>,
    vectors: Vec<ParameterSpec>,
    router_biases: Vec<ParameterSpec>,
}

impl<'a> Collector<'a> {
    fn new(config: &'a ModelConfig) -> Self {
        Self {
            config,
            matrices: Vec::new(),
            vectors: Vec::new(),
            router_biases: Vec::new(),
        }
    }

    fn matrix(&mut self, name: String, shape: [usize; 2], std: f64) {
        let init = Init::Normal { std: std as f32 };
        self.matrices.push(ParameterSpec {
            name,
            shape: shape.to_vec(),
            init,
            update: Update::Decayed,
            group: 0,
        });
    }

    fn vector(&mut self, name: String, len: usize, init: Init) {
        self.vectors.push(ParameterSpec {
            name,
            shape: vec![len],
            init,
            update: Update::Plain,
            group: 0,
        });
    }

    /// One vector of the model's width for each of `rows` tokens or positions.
    fn table(&mut self, name: &str, rows: usize) {
        self.matrix(
            name.to_owned(),
            [rows, self.config.width],
            self.config.init_std,
        );
    }

    fn norm(&mut self, name: &str) {
        self.vector(format!("{name}.weight"), self.config.width, Init::Ones);
        if self.config.norm == Norm::Layer && self.config.bias {
            self.vector(format!("{name}.bias"), self.config.width, Init::Zeros);
        }
    }

    fn linear(&mut self, name: &str, inputs: usize, outputs: usize) {
        self.projection(name, inputs, outputs, self.config.init_std);
    }

    /// A projection into the residual stream: `2 * layers` of them add up, so each starts smaller (GPT-2).
    fn residual(&mut self, name: &str, inputs: usize, outputs: usize) {
        let sum = (2 * self.config.layers) as f64;
        self.projection(name, inputs, outputs, self.config.init_std / sum.sqrt());
    }

    fn projection(&mut self, name: &str, inputs: usize, outputs: usize, std: f64) {
        let shape = match self.config.architecture {
            Architecture::Llama | Architecture::DeepseekV3 => [outputs, inputs],
            Architecture::Gpt2 => [inputs, outputs],
        };
        self.matrix(format!("{name}.weight"), shape, std);
        if self.config.bias {
            self.vector(format!("{name}.bias"), outputs, Init::Zeros);
        }
    }

    fn layer(&mut self, names: &Names, layer: usize) {
        let (width, ffn) = (self.config.width, self.config.ffn_width);
        let name = |suffix: &str| names.in_layer(layer, suffix);
        self.norm(&name(names.attention_norm));
        match (self.config.architecture, &self.config.mla) {
            (_, Some(mla)) => self.latent_attention(mla, &name),
            (Architecture::Gpt2, None) => {
                let kv = self.config.kv_heads * self.config.head_dim();
                self.linear(&name("attn.c_attn"), width, width + 2 * kv);
                self.residual(&name("attn.c_proj"), width, width);
            }
            (_, None) => {
                let kv = self.config.kv_heads * self.config.head_dim();
                self.linear(&name("self_attn.q_proj"), width, width);
                self.linear(&name("self_attn.k_proj"), width, kv);
                self.linear(&name("self_attn.v_proj"), width, kv);
                self.residual(&name("self_attn.o_proj"), width, width);
            }
        }
        self.norm(&name(names.mlp_norm));
        match &self.config.moe {
            Some(moe) if layer >= moe.dense_layers => self.experts(moe, &name),
            _ => {
                if self.config.mlp == Mlp::Swiglu {
                    self.linear(&name(names.gate), width, ffn);
                }
                self.linear(&name(names.up), width, ffn);
                self.residual(&name(names.down), ffn, width);
            }
        }
    }

    /// A module of multi-token prediction: a layer with what leads into it and out of it.
    fn prediction(&mut self, names: &Names, layer: usize) {
        let name = |suffix: &str| names.in_layer(layer, suffix);
        self.norm(&name("enorm"));
        self.norm(&name("hnorm"));
        let width = self.config.width;
        self.linear(&name("eh_proj"), 2 * width, width);
        self.layer(names, layer);
        self.norm(&name("shared_head.norm"));
    }

    fn latent_attention(&mut self, mla: &LatentConfig, name: &impl Fn(&str) -> String) {
        let (width, heads) = (self.config.width, self.config.heads);
        let queries = heads * mla.qk_head_dim();
        match mla.q_lora_rank {
            Some(rank) => self.linear(&name("self_attn.q_a_proj"), width, rank),
            None => self.linear(&name("self_attn.q_proj"), width, queries),
        }
        self.linear(
            &name("self_attn.kv_a_proj_with_mqa"),
            width,
            mla.cached_values(),
        );
        if let Some(rank) = mla.q_lora_rank {
            let norm = name("self_attn.q_a_layernorm.weight");
            self.vector(norm, rank, Init::Ones);
            self.linear(&name("self_attn.q_b_proj"), rank, queries);
        }
        let norm = name("self_attn.kv_a_layernorm.weight");
        self.vector(norm, mla.kv_lora_rank, Init::Ones);
        self.linear(
            &name("self_attn.kv_b_proj"),
            mla.kv_lora_rank,
            heads * (mla.qk_nope_head_dim + mla.v_head_dim),
        );
        self.residual(&name("self_attn.o_proj"), heads * mla.v_head_dim, width);
    }

    /// All gates and ups, then all downs, so that the experts of a layer are two tensors.
    fn experts(&mut self, moe: &ExpertsConfig, name: &impl Fn(&str) -> String) {
        let (width, std) = (self.config.width, self.config.init_std);
        self.matrix(name("mlp.gate.weight"), [moe.experts, width], std);
        for id in 0..moe.experts {
            for part in ["gate_proj", "up_proj"] {
                let expert = name(&format!("mlp.experts.{id}.{part}"));
                self.linear(&expert, width, moe.ffn_width);
            }
        }
        for id in 0..moe.experts {
            let expert = name(&format!("mlp.experts.{id}.down_proj"));
            self.residual(&expert, moe.ffn_width, width);
        }
        let shared = moe.shared_experts * moe.ffn_width;
        for part in ["gate_proj", "up_proj"] {
            self.linear(&name(&format!("mlp.shared_experts.{part}")), width, shared);
        }
        self.residual(&name("mlp.shared_experts.down_proj"), shared, width);
        self.router_biases.push(ParameterSpec {
            name: name("mlp.gate.e_score_correction_bias"),
            shape: vec![moe.experts],
            init: Init::Zeros,
            update: Update::Balance {
                rate: moe.balance_rate as f32,
            },
            group: 0,
        });
    }

    fn finish(mut self) -> Vec<ParameterSpec> {
        self.matrices.append(&mut self.vectors);
        self.matrices.append(&mut self.router_biases);
        self.matrices
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PredictionConfig;

    fn shapes(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
        parameters(config)
            .into_iter()
            .map(|parameter| (parameter.name, parameter.shape))
            .collect()
    }

    #[test]
    fn llama_has_hugging_faces_tensors() {
        let mut config = ModelConfig {
            vocab_size: 256,
            kv_heads: 2,
            ..ModelConfig::new(Architecture::Llama, 1, 4, 64, 128)
        };
        config.ffn_width = 176;
        let expected: [(&str, &[usize]); 12] = [
            ("model.embed_tokens.weight", &[256, 64]),
            ("model.layers.0.self_attn.q_proj.weight", &[64, 64]),
            ("model.layers.0.self_attn.k_proj.weight", &[32, 64]),
            ("model.layers.0.self_attn.v_proj.weight", &[32, 64]),
            ("model.layers.0.self_attn.o_proj.weight", &[64, 64]),
            ("model.layers.0.mlp.gate_proj.weight", &[176, 64]),
            ("model.layers.0.mlp.up_proj.weight", &[176, 64]),
            ("model.layers.0.mlp.down_proj.weight", &[64, 176]),
            ("lm_head.weight", &[256, 64]),
            ("model.layers.0.input_layernorm.weight", &[64]),
            ("model.layers.0.post_attention_layernorm.weight", &[64]),
            ("model.norm.weight", &[64]),
        ];
        let expected: Vec<_> = expected
            .iter()
            .map(|(name, shape)| ((*name).to_owned(), shape.to_vec()))
            .collect();
        assert_eq!(shapes(&config), expected);
    }

    #[test]
    fn gpt2_has_hugging_faces_tensors() {
        let config = ModelConfig {
            vocab_size: 65,
            ..ModelConfig::new(Architecture::Gpt2, 1, 4, 64, 32)
        };
        let expected: [(&str, &[usize]); 16] = [
            ("transformer.wte.weight", &[65, 64]),
            ("transformer.wpe.weight", &[32, 64]),
            ("transformer.h.0.attn.c_attn.weight", &[64, 192]),
            ("transformer.h.0.attn.c_proj.weight", &[64, 64]),
            ("transformer.h.0.mlp.c_fc.weight", &[64, 256]),
            ("transformer.h.0.mlp.c_proj.weight", &[256, 64]),
            ("transformer.h.0.ln_1.weight", &[64]),
            ("transformer.h.0.ln_1.bias", &[64]),
            ("transformer.h.0.attn.c_attn.bias", &[192]),
            ("transformer.h.0.attn.c_proj.bias", &[64]),
            ("transformer.h.0.ln_2.weight", &[64]),
            ("transformer.h.0.ln_2.bias", &[64]),
            ("transformer.h.0.mlp.c_fc.bias", &[256]),
            ("transformer.h.0.mlp.c_proj.bias", &[64]),
            ("transformer.ln_f.weight", &[64]),
            ("transformer.ln_f.bias", &[64]),
        ];
        let expected: Vec<_> = expected
            .iter()
            .map(|(name, shape)| ((*name).to_owned(), shape.to_vec()))
            .collect();
        assert_eq!(shapes(&config), expected);
        let bare = ModelConfig {
            bias: false,
            ..config
        };
        assert!(
            parameters(&bare)
                .iter()
                .all(|parameter| !parameter.name.ends_with(".bias"))
        );
    }

    #[test]
    fn deepseek_v3_has_hugging_faces_tensors() {
        let config = ModelConfig {
            vocab_size: 256,
            ffn_width: 176,
            mla: Some(LatentConfig {
                q_lora_rank: Some(24),
                kv_lora_rank: 16,
                qk_nope_head_dim: 16,
                qk_rope_head_dim: 8,
                v_head_dim: 12,
            }),
            moe: Some(ExpertsConfig {
                shared_experts: 2,
                ..ExpertsConfig::new(2, 1, 48)
            }),
            ..ModelConfig::new(Architecture::DeepseekV3, 2, 4, 64, 128)
        };
        let attention: [(&str, &[usize]); 5] = [
            ("self_attn.q_a_proj.weight", &[24, 64]),
            ("self_attn.kv_a_proj_with_mqa.weight", &[24, 64]),
            ("self_attn.q_b_proj.weight", &[96, 24]),
            ("self_attn.kv_b_proj.weight", &[112, 16]),
            ("self_attn.o_proj.weight", &[64, 48]),
        ];
        let dense: [(&str, &[usize]); 3] = [
            ("mlp.gate_proj.weight", &[176, 64]),
            ("mlp.up_proj.weight", &[176, 64]),
            ("mlp.down_proj.weight", &[64, 176]),
        ];
        let experts: [(&str, &[usize]); 10] = [
            ("mlp.gate.weight", &[2, 64]),
            ("mlp.experts.0.gate_proj.weight", &[48, 64]),
            ("mlp.experts.0.up_proj.weight", &[48, 64]),
            ("mlp.experts.1.gate_proj.weight", &[48, 64]),
            ("mlp.experts.1.up_proj.weight", &[48, 64]),
            ("mlp.experts.0.down_proj.weight", &[64, 48]),
            ("mlp.experts.1.down_proj.weight", &[64, 48]),
            ("mlp.shared_experts.gate_proj.weight", &[96, 64]),
            ("mlp.shared_experts.up_proj.weight", &[96, 64]),
            ("mlp.shared_experts.down_proj.weight", &[64, 96]),
        ];
        let norms: [(&str, &[usize]); 4] = [
            ("input_layernorm.weight", &[64]),
            ("self_attn.q_a_layernorm.weight", &[24]),
            ("self_attn.kv_a_layernorm.weight", &[16]),
            ("post_attention_layernorm.weight", &[64]),
        ];
        let in_layer = |layer: usize, tensors: &[(&str, &[usize])]| -> Vec<_> {
            let name = |suffix: &str| format!("model.layers.{layer}.{suffix}");
            let tensors = tensors.iter();
            tensors
                .map(|(suffix, shape)| (name(suffix), shape.to_vec()))
                .collect()
        };
        let whole = |name: &str, shape: &[usize]| vec![(name.to_owned(), shape.to_vec())];
        let expected = [
            whole("model.embed_tokens.weight", &[256, 64]),
            in_layer(0, &attention),
            in_layer(0, &dense),
            in_layer(1, &attention),
            in_layer(1, &experts),
            whole("lm_head.weight", &[256, 64]),
            in_layer(0, &norms),
            in_layer(1, &norms),
            whole("model.norm.weight", &[64]),
            in_layer(1, &[("mlp.gate.e_score_correction_bias", &[2])]),
        ];
        assert_eq!(shapes(&config), expected.concat());
        let last = parameters(&config).pop().unwrap();
        assert_eq!(last.update, Update::Balance { rate: 1e-3 });

        let config = ModelConfig {
            mtp: Some(PredictionConfig::new(1)),
            ..config
        };
        let joined: [(&str, &[usize]); 2] = [("enorm.weight", &[64]), ("hnorm.weight", &[64])];
        let expected = [
            whole("model.embed_tokens.weight", &[256, 64]),
            in_layer(0, &attention),
            in_layer(0, &dense),
            in_layer(1, &attention),
            in_layer(1, &experts),
            whole("lm_head.weight", &[256, 64]),
            in_layer(2, &[("eh_proj.weight", &[64, 128])]),
            in_layer(2, &attention),
            in_layer(2, &experts),
            in_layer(0, &norms),
            in_layer(1, &norms),
            whole("model.norm.weight", &[64]),
            in_layer(2, &joined),
            in_layer(2, &norms),
            in_layer(2, &[("shared_head.norm.weight", &[64])]),
            in_layer(1, &[("mlp.gate.e_score_correction_bias", &[2])]),
            in_layer(2, &[("mlp.gate.e_score_correction_bias", &[2])]),
        ];
        assert_eq!(shapes(&config), expected.concat());
    }

    #[test]
    fn only_matrices_decay_and_residual_projections_start_smaller() {
        let config = ModelConfig {
            vocab_size: 65,
            ..ModelConfig::new(Architecture::Llama, 8, 4, 64, 32)
        };
        for parameter in parameters(&config) {
            assert_eq!(
                parameter.update == Update::Decayed,
                parameter.shape.len() == 2,
                "{}",
                parameter.name
            );
            let expected = match parameter.name.as_str() {
                name if name.ends_with("norm.weight") => Init::Ones,
                name if name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight") => {
                    Init::Normal { std: 0.005 }
                }
                _ => Init::Normal { std: 0.02 },
            };
            assert_eq!(parameter.init, expected, "{}", parameter.name);
        }
    }
}
