//! The flattened parameter vector and its blocks.
//!
//! All parameters of a model, in canonical order, form one vector. Blocks are ranges of it that never cross an
//! optimizer group. Whatever touches state is done per block in a fixed order, so neither the number nor the
//! placement of shards can change a bit.

use std::collections::BTreeSet;
use std::ops::Range;

use everstep_protocol::BlockId;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// How a parameter starts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Init {
    /// Normally distributed around 0.
    Normal {
        /// Standard deviation.
        std: f32,
    },
    /// All ones (norm scales).
    Ones,
    /// All zeros (biases).
    Zeros,
}

/// What a step does to a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Update {
    /// AdamW with weight decay (matrices).
    Decayed,
    /// Muon with weight decay (whole matrices of layers).
    Muon,
    /// AdamW without (norms and biases).
    Plain,
    /// A router's bias moves by `rate` against the sign of its gradient, which is the load of an expert above the mean: load balancing
    /// without an auxiliary loss (Wang et al. 2024; DeepSeek-V3 §2.1.2). It is no part of the gradient's norm.
    Balance {
        /// The step, γ.
        rate: f32,
    },
}

impl Update {
    /// Groups lie in this order in the flattened vector.
    fn rank(self) -> u8 {
        match self {
            Self::Decayed | Self::Muon => 0,
            Self::Plain => 1,
            Self::Balance { .. } => 2,
        }
    }

    fn hash(self, hasher: &mut blake3::Hasher) {
        match self {
            Self::Decayed => hasher.update(&[1]),
            Self::Plain => hasher.update(&[0]),
            Self::Balance { rate } => hasher.update(&[2]).update(&rate.to_le_bytes()),
            Self::Muon => hasher.update(&[3]),
        };
    }

    /// Whether one may follow the other in the flattened vector. Only matrices may alternate.
    fn may_precede(self, next: Self) -> bool {
        self.rank() < next.rank() || (self.rank() == 0 && next.rank() == 0)
    }
}

/// One tensor of a model, as the shards see it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ParameterSpec {
    /// Name in Hugging Face's convention.
    pub name: String,
    /// Shape, row-major.
    pub shape: Vec<usize>,
    /// Initial values.
    pub init: Init,
    /// What a step does to it.
    pub update: Update,
    /// Which of [`OptimizerConfig::group`](crate::OptimizerConfig::group) it belongs to, from 1 on; 0 for none.
    #[serde(default)]
    pub group: u8,
}

impl ParameterSpec {
    /// Number of elements.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A maximal run of one block: a range of the flattened vector inside one optimizer group.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Block {
    /// First element in the flattened vector.
    pub offset: usize,
    /// Number of elements.
    pub len: usize,
    /// What a step does to all of it.
    pub update: Update,
    /// [`ParameterSpec::group`] of all of it.
    #[serde(default)]
    pub group: u8,
}

/// All parameters of a model and their division in blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    parameters: Vec<ParameterSpec>,
    offsets: Vec<usize>,
    blocks: Vec<Block>,
    num_elements: usize,
}

/// Where a piece of a block lies in a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Index of the parameter in [`Layout::parameters`].
    pub parameter: usize,
    /// Elements of that parameter, row-major.
    pub parameter_range: Range<usize>,
    /// The same elements, counted from the block's first.
    pub block_range: Range<usize>,
}

/// Why parameters cannot be laid out.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LayoutError {
    /// There is nothing to train.
    #[error("a layout needs at least one parameter")]
    NoParameters,
    /// A block must hold something.
    #[error("blocks must have at least one element")]
    EmptyBlocks,
    /// A group is one range.
    #[error(
        "parameter `{name}` belongs before its predecessor; first come matrices, then those without, then routers' biases, \
         all with one rate"
    )]
    GroupOrder {
        /// The parameter.
        name: String,
    },
    /// Names identify tensors in checkpoints and exports.
    #[error("parameter `{name}` is listed twice")]
    DuplicateName {
        /// The parameter.
        name: String,
    },
    /// A dimension of 0, or more elements than this machine can count.
    #[error(
        "parameter `{name}` has shape {shape:?}; allowed are 1 or more elements that fit in memory"
    )]
    Shape {
        /// The parameter.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A standard deviation that no normal distribution has.
    #[error("parameter `{name}` has init std {std}; allowed are finite numbers of 0 or more")]
    Std {
        /// The parameter.
        name: String,
        /// Its standard deviation, as text.
        std: String,
    },
    /// Blocks are numbered with 32 bits.
    #[error(
        "{num_blocks} blocks are too many; allowed are {}; make blocks larger",
        BlockId::MAX
    )]
    TooManyBlocks {
        /// How many there would be.
        num_blocks: usize,
    },
}

impl Layout {
    /// Lays out `parameters` in the given, canonical order and divides them in blocks of at most `block_elements`
    /// elements each. Blocks of a run of one [`Update`] and one group have sizes that differ by one element at most; those of [`Update::Muon`] hold
    /// whole matrices.
    ///
    /// # Errors
    /// [`LayoutError`] if a parameter is unusable, or if groups are mixed.
    pub fn new(parameters: Vec<ParameterSpec>, block_elements: usize) -> Result<Self, LayoutError> {
        if parameters.is_empty() {
            return Err(LayoutError::NoParameters);
        }
        if block_elements == 0 {
            return Err(LayoutError::EmptyBlocks);
        }
        let mut names = BTreeSet::new();
        let mut offsets = Vec::with_capacity(parameters.len());
        let mut num_elements = 0usize;
        let mut runs: Vec<((Update, u8), usize)> = Vec::new();
        for parameter in &parameters {
            let name = || parameter.name.clone();
            if !names.insert(parameter.name.as_str()) {
                return Err(LayoutError::DuplicateName { name: name() });
            }
            if let Init::Normal { std } = parameter.init
                && !(std.is_finite() && std >= 0.0)
            {
                return Err(LayoutError::Std {
                    name: name(),
                    std: std.to_string(),
                });
            }
            let shape_error = || LayoutError::Shape {
                name: name(),
                shape: parameter.shape.clone(),
            };
            let elements = parameter
                .shape
                .iter()
                .try_fold(1usize, |product, &dim| product.checked_mul(dim))
                .filter(|&elements| elements > 0)
                .ok_or_else(shape_error)?;
            offsets.push(num_elements);
            // A byte count must fit, too: buffers hold four bytes per element.
            num_elements = num_elements
                .checked_add(elements)
                .filter(|&sum| sum <= isize::MAX as usize / 4)
                .ok_or_else(shape_error)?;
            let kind = (parameter.update, parameter.group);
            // Matrices that are made orthogonal stay whole, however large.
            let fits = |len: usize| kind.0 != Update::Muon || len + elements <= block_elements;
            match runs.last_mut() {
                Some((last, len)) if *last == kind && fits(*len) => *len += elements,
                Some((last, _)) if last.0 != kind.0 && !last.0.may_precede(kind.0) => {
                    return Err(LayoutError::GroupOrder { name: name() });
                }
                _ => runs.push((kind, elements)),
            }
        }
        let count_of = |update: Update, len: usize| match update {
            Update::Muon => 1,
            _ => len.div_ceil(block_elements),
        };
        let num_blocks = runs
            .iter()
            .map(|&((update, _), len)| count_of(update, len))
            .sum::<usize>();
        if BlockId::try_from(num_blocks).is_err() {
            return Err(LayoutError::TooManyBlocks { num_blocks });
        }
        let mut blocks = Vec::with_capacity(num_blocks);
        let mut offset = 0;
        for ((update, group), run_len) in runs {
            let count = count_of(update, run_len);
            for index in 0..count {
                let len = run_len / count + usize::from(index < run_len % count);
                blocks.push(Block {
                    offset,
                    len,
                    update,
                    group,
                });
                offset += len;
            }
        }
        Ok(Self {
            parameters,
            offsets,
            blocks,
            num_elements,
        })
    }

    /// All parameters, in canonical order.
    pub fn parameters(&self) -> &[ParameterSpec] {
        &self.parameters
    }

    /// First element of parameter `index` in the flattened vector. Panics if there is no such parameter.
    pub fn offset(&self, index: usize) -> usize {
        self.offsets[index]
    }

    /// All blocks, in the order of their numbers.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Block number `block`. Panics if there is no such block.
    pub fn block(&self, block: BlockId) -> Block {
        self.blocks[block as usize]
    }

    /// Rows and columns of a parameter: its first dimension, and the product of all others.
    pub(crate) fn matrix(&self, parameter: usize) -> [usize; 2] {
        let shape = &self.parameters[parameter].shape;
        let rows = shape.first().copied().unwrap_or(1);
        [rows, shape.iter().skip(1).product()]
    }

    /// Number of blocks.
    pub fn num_blocks(&self) -> u32 {
        self.blocks.len() as u32
    }

    /// Number of elements of all parameters.
    pub fn num_elements(&self) -> usize {
        self.num_elements
    }

    /// The pieces of tensors that make up a block, in order. Panics if there is no such block.
    pub fn segments(&self, block: BlockId) -> impl Iterator<Item = Segment> + '_ {
        let block = self.block(block);
        let end = block.offset + block.len;
        let first = self
            .offsets
            .partition_point(|&offset| offset <= block.offset)
            - 1;
        (first..self.parameters.len())
            .take_while(move |&parameter| self.offsets[parameter] < end)
            .map(move |parameter| {
                let offset = self.offsets[parameter];
                let from = offset.max(block.offset);
                let to = (offset + self.parameters[parameter].num_elements()).min(end);
                Segment {
                    parameter,
                    parameter_range: from - offset..to - offset,
                    block_range: from - block.offset..to - block.offset,
                }
            })
    }

    /// BLAKE3 of a canonical encoding of the parameters (names, shapes, initial values, updates) and the blocks. Layouts
    /// with equal digests give equal runs.
    pub fn digest(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        let number = |hasher: &mut blake3::Hasher, value: u64| {
            hasher.update(&value.to_le_bytes());
        };
        number(&mut hasher, LAYOUT_ENCODING);
        number(&mut hasher, self.blocks.len() as u64);
        for block in &self.blocks {
            number(&mut hasher, block.offset as u64);
            number(&mut hasher, block.len as u64);
            block.update.hash(&mut hasher);
            // Once the update was a number of eight bytes.
            hasher.update(&[block.group, 0, 0, 0, 0, 0, 0]);
        }
        number(&mut hasher, self.parameters.len() as u64);
        for parameter in &self.parameters {
            let (kind, std) = match parameter.init {
                Init::Normal { std } => (0u64, std),
                Init::Ones => (1, 0.0),
                Init::Zeros => (2, 0.0),
            };
            hasher.update(&(parameter.name.len() as u64).to_le_bytes());
            hasher.update(parameter.name.as_bytes());
            hasher.update(&(parameter.shape.len() as u64).to_le_bytes());
            for &dim in &parameter.shape {
                hasher.update(&(dim as u64).to_le_bytes());
            }
            hasher.update(&kind.to_le_bytes());
            hasher.update(&std.to_le_bytes());
            parameter.update.hash(&mut hasher);
        }
        hasher.finalize()
    }
}

/// Version of the encoding under [`Layout::digest`].
const LAYOUT_ENCODING: u64 = 1;

#[cfg(test)]
mod tests;
