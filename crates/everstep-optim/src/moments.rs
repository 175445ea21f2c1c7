//! In which type the optimizer keeps its running means.

use bytemuck::Pod;
use serde::{Deserialize, Serialize};

/// Type of an optimizer's running means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MomentDtype {
    /// Four bytes each.
    #[default]
    Float32,
    /// Two bytes each, rounded after every step (DeepSeek-V3 §3.3.3). Two of them share a word of the [`BlockState`](crate::BlockState).
    Bfloat16,
}

impl MomentDtype {
    /// Words of four bytes that hold `len` values.
    pub fn words(self, len: usize) -> usize {
        match self {
            Self::Float32 => len,
            Self::Bfloat16 => len.div_ceil(2),
        }
    }

    /// Whether it is the default.
    // serde asks for a reference.
    #[allow(clippy::trivially_copy_pass_by_ref)]
    pub fn is_float32(&self) -> bool {
        *self == Self::Float32
    }
}

/// A running mean as it is kept; what is done with it is done in `f32`.
pub(crate) trait Moment: Pod + Send {
    fn load(self) -> f32;
    fn store(value: f32) -> Self;

    /// The first `len` values in words that may hold one more.
    fn view(words: &mut [f32], len: usize) -> &mut [Self] {
        &mut bytemuck::cast_slice_mut(words)[..len]
    }
}

impl Moment for f32 {
    fn load(self) -> f32 {
        self
    }

    fn store(value: f32) -> Self {
        value
    }
}

/// The upper half of an `f32`.
pub(crate) type Bfloat16 = u16;

impl Moment for Bfloat16 {
    fn load(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }

    /// Rounds to nearest, ties to even. Every NaN becomes the quiet one without payload.
    fn store(value: f32) -> Self {
        let bits = value.to_bits();
        // Carries into the upper half exactly if the lower half is above the tie, or at it with an odd upper half.
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        if value.is_nan() {
            0x7fc0
        } else {
            rounded as u16
        }
    }
}
