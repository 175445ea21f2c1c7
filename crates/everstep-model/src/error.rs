//! What can go wrong when a model is built or used.

use everstep_torch::TorchError;

use everstep_spec::ConfigError;

/// Errors of this crate's tensors; none of them leaves a model changed.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A configuration that describes no model.
    #[error("model: {0}")]
    Config(#[from] ConfigError),
    /// Inputs or targets of another length than `rows * columns`.
    #[error("micro-batch {index}: {field} holds {len} tokens; rows * columns=`{expected}`")]
    BatchShape {
        /// Index of the micro-batch.
        index: usize,
        /// `inputs` or `targets`.
        field: &'static str,
        /// Tokens in it.
        len: usize,
        /// Tokens that its shape asks for.
        expected: usize,
    },
    /// A batch without tokens.
    #[error("a batch needs at least one micro-batch, and each at least one row and one column")]
    EmptyBatch,
    /// A sequence beyond the model's context.
    #[error("{columns} tokens in a row are too many; context=`{context}`")]
    TooLong {
        /// Length of the sequence.
        columns: usize,
        /// What the model can take.
        context: usize,
    },
    /// A token that is not in the vocabulary.
    #[error("token {token} is not in the vocabulary; vocab_size=`{vocab_size}`")]
    UnknownToken {
        /// The token.
        token: i64,
        /// Number of tokens.
        vocab_size: usize,
    },
    /// An option that cannot be used.
    #[error("{field}=`{value}` is not allowed; allowed: {allowed}")]
    Option {
        /// Name of the option.
        field: &'static str,
        /// Its value.
        value: String,
        /// What it may hold.
        allowed: &'static str,
    },
    /// Logits that are no numbers: the parameters are broken.
    #[error("the model's logits are not finite")]
    NotFinite,
    /// What libtorch said.
    #[error(transparent)]
    Torch(#[from] TorchError),
}

impl From<tch::TchError> for ModelError {
    fn from(error: tch::TchError) -> Self {
        Self::Torch(error.into())
    }
}
