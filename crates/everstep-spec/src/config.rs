//! What a model is: the `[model]` table of a run file and of a checkpoint.

use serde::{Deserialize, Serialize};

mod experts;
mod latent;
mod prediction;
mod same_model;
mod scaling;

pub use experts::ExpertsConfig;
pub use latent::LatentConfig;
pub use prediction::PredictionConfig;
pub use scaling::{LinearConfig, Llama3Config, RopeScaling, YarnConfig};

/// Family of a model: it decides tensor names, the orientation of matrices and the defaults of all other fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// Hugging Face's `LlamaForCausalLM`.
    Llama,
    /// Hugging Face's `GPT2LMHeadModel`, whose matrices are stored as `[in, out]`.
    Gpt2,
    /// Hugging Face's `DeepseekV3ForCausalLM`: latent attention and experts.
    #[serde(rename = "deepseek_v3")]
    DeepseekV3,
}

/// Normalisation before attention, before the MLP and after the last layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Norm {
    /// Root mean square, with a scale.
    Rms,
    /// Mean and variance, with a scale, and with a shift if the model has biases.
    Layer,
}

/// How a token's position enters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Positions {
    /// Rotation of queries and keys (RoPE).
    Rope,
    /// One learned vector per position, added to the token's.
    Learned,
}

/// The feed-forward part of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mlp {
    /// `down(silu(gate(x)) * up(x))`.
    Swiglu,
    /// `down(gelu(up(x)))` with the error function (nanoGPT).
    Gelu,
    /// The same with GPT-2's tanh approximation (`gelu_new` in Hugging Face).
    GeluTanh,
}

/// A decoder-only transformer. Fields left out take the defaults of the architecture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "Fields")]
pub struct ModelConfig {
    /// Family of the model.
    pub architecture: Architecture,
    /// Number of tokens; 0 if left out, for whoever knows the tokenizer to fill in.
    pub vocab_size: usize,
    /// Number of layers.
    pub layers: usize,
    /// Number of attention heads.
    pub heads: usize,
    /// Number of key and value heads, each shared by `heads / kv_heads` query heads; `heads` if left out, and for `deepseek_v3`.
    pub kv_heads: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Inner width of the MLP; `8/3 * width` rounded up to a multiple of 32 for `swiglu`, else `4 * width`.
    pub ffn_width: usize,
    /// Longest sequence in tokens.
    pub context: usize,
    /// Whether the output matrix is the token embedding; `true` for `gpt2`, else `false`.
    pub tied_embeddings: bool,
    /// Share of activations dropped in training (embeddings, attention weights, residual branches); 0.
    pub dropout: f64,
    /// Normalisation; `layer` for `gpt2`, else `rms`.
    pub norm: Norm,
    /// Positions; `learned` for `gpt2`, else `rope`.
    pub positions: Positions,
    /// MLP; `gelu` for `gpt2`, else `swiglu`.
    pub mlp: Mlp,
    /// Base of the rotation's wavelengths; 10000.
    pub rope_theta: f64,
    /// Added to the variance in norms; 1e-5, for `deepseek_v3` 1e-6.
    pub norm_eps: f64,
    /// Standard deviation of initial weights, divided by `sqrt(2 * layers)` for what enters the residual stream; 0.02.
    pub init_std: f64,
    /// Whether projections and layer norms have biases; `true` for `gpt2`, else `false`.
    pub bias: bool,
    /// A Hugging Face folder whose weights training starts from, relative to the run file; drawn from the run's seed if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<String>,
    /// What [`WeightsFolder::digest`](crate::hugging_face::WeightsFolder::digest) says of that folder; filled in when a run begins. If it
    /// is given, a folder with other weights is refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_digest: Option<String>,
    /// Stretches the rotation; not at all if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Latent attention, of `deepseek_v3` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mla: Option<LatentConfig>,
    /// Experts, of `deepseek_v3` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moe: Option<ExpertsConfig>,
    /// Multi-token prediction, of `deepseek_v3` only; none if left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtp: Option<PredictionConfig>,
}

/// The table as it is written: everything that has a default is optional.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    architecture: Architecture,
    #[serde(default)]
    vocab_size: usize,
    layers: usize,
    heads: usize,
    kv_heads: Option<usize>,
    width: usize,
    ffn_width: Option<usize>,
    context: usize,
    tied_embeddings: Option<bool>,
    dropout: Option<f64>,
    norm: Option<Norm>,
    positions: Option<Positions>,
    mlp: Option<Mlp>,
    rope_theta: Option<f64>,
    norm_eps: Option<f64>,
    init_std: Option<f64>,
    bias: Option<bool>,
    init: Option<String>,
    init_digest: Option<String>,
    rope_scaling: Option<RopeScaling>,
    mla: Option<LatentConfig>,
    moe: Option<ExpertsConfig>,
    mtp: Option<PredictionConfig>,
}

/// A field whose value cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}=`{value}` is not allowed; allowed: {allowed}")]
pub struct ConfigError {
    /// Name of the field; those of a table within have its name before a dot.
    pub field: String,
    /// What it holds.
    pub value: String,
    /// What it may hold.
    pub allowed: String,
}

impl ModelConfig {
    /// A model of `architecture` with its defaults; `vocab_size` is left at 0.
    pub fn new(
        architecture: Architecture,
        layers: usize,
        heads: usize,
        width: usize,
        context: usize,
    ) -> Self {
        let is_gpt2 = architecture == Architecture::Gpt2;
        let mlp = if is_gpt2 { Mlp::Gelu } else { Mlp::Swiglu };
        Self {
            architecture,
            vocab_size: 0,
            layers,
            heads,
            kv_heads: heads,
            width,
            ffn_width: default_ffn_width(mlp, width),
            context,
            tied_embeddings: is_gpt2,
            dropout: 0.0,
            norm: if is_gpt2 { Norm::Layer } else { Norm::Rms },
            positions: if is_gpt2 {
                Positions::Learned
            } else {
                Positions::Rope
            },
            mlp,
            rope_theta: 10_000.0,
            norm_eps: match architecture {
                Architecture::DeepseekV3 => 1e-6,
                Architecture::Llama | Architecture::Gpt2 => 1e-5,
            },
            init_std: 0.02,
            bias: is_gpt2,
            init: None,
            init_digest: None,
            rope_scaling: None,
            mla: None,
            moe: None,
            mtp: None,
        }
    }

    /// Width of one attention head where heads share the width of the residual stream.
    pub fn head_dim(&self) -> usize {
        self.width / self.heads
    }

    /// Width of what is rotated in a head.
    pub fn rope_dim(&self) -> usize {
        match &self.mla {
            Some(mla) => mla.qk_rope_head_dim,
            None => self.head_dim(),
        }
    }

    /// Whether every field can be used, `vocab_size` included.
    ///
    /// # Errors
    /// The first field that cannot, with what is allowed.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let counts = [
            ("vocab_size", self.vocab_size),
            ("layers", self.layers),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("width", self.width),
            ("ffn_width", self.ffn_width),
            ("context", self.context),
        ];
        for (field, value) in counts {
            check(field, value, (1..=COUNT_MAX).contains(&value), || {
                format!("1 to {COUNT_MAX}")
            })?;
        }
        match self.architecture {
            Architecture::DeepseekV3 => self.validate_deepseek()?,
            Architecture::Llama | Architecture::Gpt2 => self.validate_heads()?,
        }
        if let Some(scaling) = &self.rope_scaling {
            scaling.validate()?;
        }
        check(
            "dropout",
            self.dropout,
            (0.0..1.0).contains(&self.dropout),
            || "0 or more, below 1".into(),
        )?;
        for (field, value) in [
            ("rope_theta", self.rope_theta),
            ("norm_eps", self.norm_eps),
            ("init_std", self.init_std),
        ] {
            check(field, value, value.is_finite() && value > 0.0, || {
                "a number above 0".into()
            })?;
        }
        if let Some(init) = &self.init {
            check("init", init, !init.is_empty(), || {
                "the folder of a model, or leave it out".into()
            })?;
        }
        if let Some(digest) = &self.init_digest {
            let is_digest = digest.len() == 64
                && digest
                    .bytes()
                    .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
            check(
                "init_digest",
                digest,
                is_digest && self.init.is_some(),
                || "64 hexadecimal digits, together with init, or leave it out".into(),
            )?;
        }
        Ok(())
    }

    fn validate_heads(&self) -> Result<(), ConfigError> {
        let divides = |whole: usize, part: usize| part != 0 && whole.is_multiple_of(part);
        check("heads", self.heads, divides(self.width, self.heads), || {
            format!("a divisor of width=`{}`", self.width)
        })?;
        check(
            "kv_heads",
            self.kv_heads,
            divides(self.heads, self.kv_heads),
            || format!("a divisor of heads=`{}`", self.heads),
        )?;
        let paired = self.positions == Positions::Learned || self.head_dim().is_multiple_of(2);
        check("width", self.width, paired, || {
            "an even width / heads, for rope turns pairs".into()
        })?;
        for (field, is_given) in [
            ("mla", self.mla.is_some()),
            ("moe", self.moe.is_some()),
            ("mtp", self.mtp.is_some()),
        ] {
            check(field, "a table", !is_given, || {
                "nothing; architecture=`deepseek_v3` has it".into()
            })?;
        }
        let rotates = self.positions == Positions::Rope || self.rope_scaling.is_none();
        check("rope_scaling", "a table", rotates, || {
            "nothing; positions=`rope` has it".into()
        })
    }

    fn validate_deepseek(&self) -> Result<(), ConfigError> {
        let needed = |field| ConfigError {
            field,
            value: String::new(),
            allowed: "a table, which architecture=`deepseek_v3` needs".to_owned(),
        };
        let mla = self.mla.as_ref().ok_or_else(|| needed("mla".to_owned()))?;
        let moe = self.moe.as_ref().ok_or_else(|| needed("moe".to_owned()))?;
        mla.validate()?;
        moe.validate(self.layers)?;
        if let Some(mtp) = &self.mtp {
            mtp.validate(self.context)?;
        }
        let aligned = self.width.is_multiple_of(experts::GROUPED_ALIGNMENT);
        check("width", self.width, aligned, || {
            format!("a multiple of {}", experts::GROUPED_ALIGNMENT)
        })?;
        check(
            "kv_heads",
            self.kv_heads,
            self.kv_heads == self.heads,
            || format!("heads=`{}`, or leave it out", self.heads),
        )?;
        check("bias", self.bias, !self.bias, || "false".into())?;
        for (field, value, holds, allowed) in [
            (
                "norm",
                format!("{:?}", self.norm),
                self.norm == Norm::Rms,
                "rms",
            ),
            (
                "positions",
                format!("{:?}", self.positions),
                self.positions == Positions::Rope,
                "rope",
            ),
            (
                "mlp",
                format!("{:?}", self.mlp),
                self.mlp == Mlp::Swiglu,
                "swiglu",
            ),
        ] {
            check(field, value.to_lowercase(), holds, || allowed.into())?;
        }
        Ok(())
    }
}

/// Sizes beyond this are slips of the keyboard, and products of four of them could overflow.
const COUNT_MAX: usize = 1 << 24;

fn check(
    field: &str,
    value: impl ToString,
    holds: bool,
    allowed: impl FnOnce() -> String,
) -> Result<(), ConfigError> {
    if holds {
        Ok(())
    } else {
        Err(ConfigError {
            field: field.to_owned(),
            value: value.to_string(),
            allowed: allowed(),
        })
    }
}

fn default_ffn_width(mlp: Mlp, width: usize) -> usize {
    match mlp {
        Mlp::Swiglu => width.saturating_mul(8).div_ceil(3).next_multiple_of(32),
        Mlp::Gelu | Mlp::GeluTanh => width.saturating_mul(4),
    }
}

impl From<Fields> for ModelConfig {
    fn from(fields: Fields) -> Self {
        let base = Self::new(
            fields.architecture,
            fields.layers,
            fields.heads,
            fields.width,
            fields.context,
        );
        let mlp = fields.mlp.unwrap_or(base.mlp);
        Self {
            vocab_size: fields.vocab_size,
            kv_heads: fields.kv_heads.unwrap_or(base.kv_heads),
            ffn_width: fields
                .ffn_width
                .unwrap_or_else(|| default_ffn_width(mlp, fields.width)),
            tied_embeddings: fields.tied_embeddings.unwrap_or(base.tied_embeddings),
            dropout: fields.dropout.unwrap_or(base.dropout),
            norm: fields.norm.unwrap_or(base.norm),
            positions: fields.positions.unwrap_or(base.positions),
            mlp,
            rope_theta: fields.rope_theta.unwrap_or(base.rope_theta),
            norm_eps: fields.norm_eps.unwrap_or(base.norm_eps),
            init_std: fields.init_std.unwrap_or(base.init_std),
            bias: fields.bias.unwrap_or(base.bias),
            init: fields.init,
            init_digest: fields.init_digest,
            rope_scaling: fields.rope_scaling,
            mla: fields.mla,
            moe: fields.moe,
            mtp: fields.mtp,
            ..base
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ModelConfig, toml::de::Error> {
        toml::from_str(text)
    }

    const SMALL: &str = "layers = 2\nheads = 4\nwidth = 64\ncontext = 32\nvocab_size = 100\n";

    #[test]
    fn defaults_follow_the_architecture() {
        let llama = parse(&format!("architecture = \"llama\"\n{SMALL}")).unwrap();
        assert_eq!(
            (llama.norm, llama.positions, llama.mlp),
            (Norm::Rms, Positions::Rope, Mlp::Swiglu)
        );
        assert_eq!((llama.ffn_width, llama.kv_heads), (192, 4));
        assert!(!llama.bias && !llama.tied_embeddings);
        let gpt2 = parse(&format!("architecture = \"gpt2\"\n{SMALL}")).unwrap();
        assert_eq!(
            (gpt2.norm, gpt2.positions, gpt2.mlp),
            (Norm::Layer, Positions::Learned, Mlp::Gelu)
        );
        assert_eq!(gpt2.ffn_width, 256);
        assert!(gpt2.bias && gpt2.tied_embeddings);
        for config in [llama, gpt2] {
            config.validate().unwrap();
            assert_eq!(parse(&toml::to_string(&config).unwrap()).unwrap(), config);
        }
    }

    #[test]
    fn unknown_and_missing_fields_are_named() {
        let error = parse(&format!("architecture = \"llama\"\nlayer = 3\n{SMALL}")).unwrap_err();
        assert!(error.to_string().contains("layer"), "{error}");
        let error =
            parse("architecture = \"llama\"\nheads = 4\nwidth = 64\ncontext = 32\n").unwrap_err();
        assert!(error.to_string().contains("layers"), "{error}");
        let error = parse(&format!("architecture = \"bert\"\n{SMALL}")).unwrap_err();
        assert!(error.to_string().contains("llama"), "{error}");
    }

    #[test]
    fn values_that_cannot_be_used_are_named() {
        let good = ModelConfig {
            vocab_size: 100,
            ..ModelConfig::new(Architecture::Llama, 2, 4, 64, 32)
        };
        good.validate().unwrap();
        let error = |config: ModelConfig| config.validate().unwrap_err();
        let says = |config, text: &str| assert_eq!(error(config).to_string(), text);
        says(
            ModelConfig {
                vocab_size: 0,
                ..good.clone()
            },
            "vocab_size=`0` is not allowed; allowed: 1 to 16777216",
        );
        says(
            ModelConfig {
                heads: 5,
                ..good.clone()
            },
            "heads=`5` is not allowed; allowed: a divisor of width=`64`",
        );
        says(
            ModelConfig {
                kv_heads: 3,
                ..good.clone()
            },
            "kv_heads=`3` is not allowed; allowed: a divisor of heads=`4`",
        );
        says(
            ModelConfig {
                dropout: 1.0,
                ..good.clone()
            },
            "dropout=`1` is not allowed; allowed: 0 or more, below 1",
        );
        says(
            ModelConfig {
                norm_eps: f64::NAN,
                ..good.clone()
            },
            "norm_eps=`NaN` is not allowed; allowed: a number above 0",
        );
        assert_eq!(
            error(ModelConfig {
                width: 4,
                ffn_width: 8,
                ..good.clone()
            })
            .field,
            "width"
        );
        assert_eq!(
            error(ModelConfig {
                layers: usize::MAX,
                ..good
            })
            .field,
            "layers"
        );
    }

    #[test]
    fn a_folder_of_another_model_is_refused() {
        let run = ModelConfig {
            vocab_size: 100,
            dropout: 0.1,
            init_std: 0.1,
            init: Some("folder".into()),
            ..ModelConfig::new(Architecture::Llama, 2, 4, 64, 32)
        };
        let folder = ModelConfig {
            vocab_size: 100,
            ..ModelConfig::new(Architecture::Llama, 2, 4, 64, 2048)
        };
        run.check_same_model(&folder).unwrap();
        let other = ModelConfig {
            kv_heads: 2,
            ..folder
        };
        assert_eq!(
            run.check_same_model(&other).unwrap_err().to_string(),
            "kv_heads=`4` is not allowed; allowed: 2"
        );
        let learned = |context| ModelConfig::new(Architecture::Gpt2, 2, 4, 64, context);
        let error = learned(16).check_same_model(&learned(32)).unwrap_err();
        assert_eq!((&*error.field, &*error.allowed), ("context", "32"));
    }

    const DEEPSEEK: &str = "architecture = \"deepseek_v3\"\nlayers = 2\nheads = 4\nwidth = 64\ncontext = 32\nvocab_size = 100\n\
        [mla]\nkv_lora_rank = 16\nqk_nope_head_dim = 16\nqk_rope_head_dim = 8\nv_head_dim = 16\n\
        [moe]\nexperts = 8\nexperts_per_token = 2\nffn_width = 48\n";

    #[test]
    fn deepseek_v3_has_its_tables() {
        let config = parse(DEEPSEEK).unwrap();
        config.validate().unwrap();
        assert_eq!(config.moe, Some(ExpertsConfig::new(8, 2, 48)));
        assert_eq!((config.norm_eps, config.norm), (1e-6, Norm::Rms));
        assert_eq!(parse(&toml::to_string(&config).unwrap()).unwrap(), config);
        let scaling = "[rope_scaling]\nkind = \"yarn\"\nfactor = 4.0\noriginal_context = 16\n";
        let stretched = parse(&format!("{DEEPSEEK}{scaling}")).unwrap();
        stretched.validate().unwrap();
        let written = toml::to_string(&stretched).unwrap();
        assert_eq!(parse(&written).unwrap(), stretched);
        let error = stretched.check_same_model(&config).unwrap_err();
        assert_eq!(error.field, "rope_scaling.beta_fast");
        let mut slow = config.clone();
        slow.moe.as_mut().unwrap().balance_rate = 0.0;
        slow.check_same_model(&config).unwrap();
    }

    #[test]
    fn fields_of_tables_are_named() {
        let says = |from: &str, to: &str, text: &str| {
            assert!(DEEPSEEK.contains(from), "{from}");
            let config = parse(&DEEPSEEK.replace(from, to)).unwrap();
            assert_eq!(config.validate().unwrap_err().to_string(), text);
        };
        says(
            "qk_rope_head_dim = 8",
            "qk_rope_head_dim = 7",
            "mla.qk_rope_head_dim=`7` is not allowed; allowed: an even number, for rope turns pairs",
        );
        says(
            "experts = 8",
            "experts = 0",
            "moe.experts=`0` is not allowed; allowed: 1 to 16777216",
        );
        says(
            "experts_per_token = 2",
            "experts_per_token = 9",
            "moe.experts_per_token=`9` is not allowed; allowed: 1 to 8, the experts of moe.groups_per_token groups",
        );
        says(
            "ffn_width = 48",
            "ffn_width = 49",
            "moe.ffn_width=`49` is not allowed; allowed: a multiple of 8",
        );
        says(
            "ffn_width = 48",
            "ffn_width = 48\ngroups = 3",
            "moe.groups=`3` is not allowed; allowed: a divisor of moe.experts=`8`",
        );
        says(
            "deepseek_v3",
            "llama",
            "mla=`a table` is not allowed; allowed: nothing; architecture=`deepseek_v3` has it",
        );
        says(
            "context = 32",
            "context = 32\nbias = true",
            "bias=`true` is not allowed; allowed: false",
        );
        let bare = DEEPSEEK.split("[moe]").next().unwrap();
        let error = parse(bare).unwrap().validate().unwrap_err();
        assert_eq!(
            error.to_string(),
            "moe=`` is not allowed; allowed: a table, which architecture=`deepseek_v3` needs"
        );
        let error = parse(&DEEPSEEK.replace("kv_lora_rank", "kv_rank")).unwrap_err();
        assert!(error.to_string().contains("kv_lora_rank"), "{error}");
    }

    #[test]
    fn a_digest_needs_a_folder() {
        let mut config = ModelConfig {
            vocab_size: 100,
            init_digest: Some("0".repeat(64)),
            ..ModelConfig::new(Architecture::Llama, 2, 4, 64, 32)
        };
        assert_eq!(config.validate().unwrap_err().field, "init_digest");
        config.init = Some("folder".into());
        config.validate().unwrap();
        assert_eq!(parse(&toml::to_string(&config).unwrap()).unwrap(), config);
        config.init_digest = Some("0".repeat(63));
        assert_eq!(config.validate().unwrap_err().field, "init_digest");
        config.init = Some(String::new());
        assert_eq!(config.validate().unwrap_err().field, "init");
    }
}
