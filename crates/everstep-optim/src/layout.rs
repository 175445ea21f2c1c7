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

/// One tensor of a model, as the shards see it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ParameterSpec {
    /// Name in Hugging Face's convention.
    pub name: String,
    /// Shape, row-major.
    pub shape: Vec<usize>,
    /// Initial values.
    pub init: Init,
    /// Whether weight decay applies (matrices yes; norms and biases no).
    pub decay: bool,
}

impl ParameterSpec {
    /// Number of elements.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A maximal run of one block: a range of the flattened vector inside one optimizer group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// First element in the flattened vector.
    pub offset: usize,
    /// Number of elements.
    pub len: usize,
    /// Whether weight decay applies to all of it.
    pub decay: bool,
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
    /// Decayed parameters come first, so that a group is one range.
    #[error(
        "parameter `{name}` has weight decay but follows one without; all decayed parameters come first"
    )]
    DecayOrder {
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
    /// elements each. Blocks of a group (decayed, not decayed) have sizes that differ by one element at most.
    ///
    /// # Errors
    /// [`LayoutError`] if a parameter is unusable, or if a decayed one follows one that is not.
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
        let mut num_decayed = 0usize;
        for (index, parameter) in parameters.iter().enumerate() {
            let name = || parameter.name.clone();
            if !names.insert(parameter.name.as_str()) {
                return Err(LayoutError::DuplicateName { name: name() });
            }
            if parameter.decay && index > 0 && !parameters[index - 1].decay {
                return Err(LayoutError::DecayOrder { name: name() });
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
            if parameter.decay {
                num_decayed = num_elements;
            }
        }
        let groups = [
            (0, num_decayed, true),
            (num_decayed, num_elements - num_decayed, false),
        ];
        let num_blocks = groups
            .iter()
            .map(|&(_, len, _)| len.div_ceil(block_elements))
            .sum::<usize>();
        if BlockId::try_from(num_blocks).is_err() {
            return Err(LayoutError::TooManyBlocks { num_blocks });
        }
        let mut blocks = Vec::with_capacity(num_blocks);
        for (mut offset, group_len, decay) in groups {
            let count = group_len.div_ceil(block_elements);
            for index in 0..count {
                let len = group_len / count + usize::from(index < group_len % count);
                blocks.push(Block { offset, len, decay });
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

    /// BLAKE3 of a canonical encoding of the parameters (names, shapes, initial values, decay) and the blocks. Layouts
    /// with equal digests give equal runs.
    pub fn digest(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        let mut number = |value: u64| {
            hasher.update(&value.to_le_bytes());
        };
        number(LAYOUT_ENCODING);
        number(self.blocks.len() as u64);
        for block in &self.blocks {
            number(block.offset as u64);
            number(block.len as u64);
            number(u64::from(block.decay));
        }
        number(self.parameters.len() as u64);
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
            hasher.update(&[u8::from(parameter.decay)]);
        }
        hasher.finalize()
    }
}

/// Version of the encoding under [`Layout::digest`].
const LAYOUT_ENCODING: u64 = 1;

#[cfg(test)]
mod tests;
