//! 8-bit floats with a scale for each tile, as their values are in wider types: the numerics of FP8 training (DeepSeek-V3 §3.3.2) on
//! any device.
//!
//! A scale is the least power of two with which the tile's largest value fits in E4M3, so that the rounded values are exact in bfloat16,
//! and a product of them with float32 sums is what an FP8 matrix product gives.
#![allow(unsafe_code)]

use std::ffi::c_void;

use tch::Tensor;

/// Rows and columns that share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Rows.
    pub rows: i64,
    /// Columns.
    pub columns: i64,
}

impl Tile {
    /// Of activations and gradients: 128 channels of a token.
    pub const ACTIVATIONS: Self = Self {
        rows: 1,
        columns: 128,
    };
    /// Of weights.
    pub const WEIGHTS: Self = Self {
        rows: 128,
        columns: 128,
    };
}

unsafe extern "C" {
    fn everstep_round(x: *const c_void, rows: i64, columns: i64) -> *mut c_void;
    fn everstep_round_gradient(x: *const c_void, rows: i64, columns: i64) -> *mut c_void;
}

/// `[.., rows, columns]` rounded to E4M3 tile by tile, in its own type; a gradient passes as it is.
pub fn round(x: &Tensor, tile: Tile) -> Tensor {
    // SAFETY: the tensor lives through the call, which only reads it.
    let made = unsafe { everstep_round(x.as_ptr().cast(), tile.rows, tile.columns) };
    owned(made)
}

/// The same values; a gradient that passes is rounded tile by tile.
pub fn round_gradient(x: &Tensor, tile: Tile) -> Tensor {
    // SAFETY: as above.
    let made = unsafe { everstep_round_gradient(x.as_ptr().cast(), tile.rows, tile.columns) };
    owned(made)
}

/// Panics where libtorch's own functions would: out of memory, or a tensor without two dimensions.
fn owned(made: *mut c_void) -> Tensor {
    assert!(!made.is_null(), "libtorch refused to round to 8 bits");
    // SAFETY: it was made for us, and nobody else has it.
    unsafe { Tensor::from_ptr(made.cast()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    fn values(x: &Tensor) -> Vec<f32> {
        Vec::try_from(&x.to_kind(Kind::Float).flatten(0, -1)).unwrap()
    }

    #[test]
    fn tiles_keep_three_bits_below_their_own_largest_value() {
        // 1.0625 lies between 1 and 1.125, on a tie that goes to the even one; 0.001 drowns beside 448 but not by itself.
        let x = Tensor::from_slice(&[1.0625f32, 1.1, -3.3, 448.0, 0.001, 0.0]).view([2, 3]);
        let one = round(
            &x,
            Tile {
                rows: 2,
                columns: 4,
            },
        );
        assert_eq!(values(&one), [1.0, 1.125, -3.25, 448.0, 0.001953125, 0.0]);
        let each = round(
            &x,
            Tile {
                rows: 1,
                columns: 1,
            },
        );
        assert_eq!(each.size(), [2, 3]);
        assert_eq!(values(&each), [1.0, 1.125, -3.25, 448.0, 0.0009765625, 0.0]);
        let large = round(&(&x * 1e6), Tile::WEIGHTS);
        assert!((large.double_value(&[1, 0]) / 448e6 - 1.0).abs() < 0.0625);
        assert_eq!(
            values(&round(
                &Tensor::zeros([3, 5], (Kind::Float, Device::Cpu)),
                Tile::WEIGHTS
            )),
            [0.0; 15]
        );
    }

    #[test]
    fn rounded_values_are_exact_in_bfloat16() {
        let x = Tensor::arange(512, (Kind::Float, Device::Cpu)).view([2, 256]) * 0.37 - 40.0;
        let rounded = round(&x, Tile::ACTIVATIONS);
        assert_eq!(values(&rounded.to_kind(Kind::BFloat16)), values(&rounded));
        assert_eq!(
            values(&round(&rounded, Tile::ACTIVATIONS)),
            values(&rounded)
        );
    }

    #[test]
    fn gradients_pass_or_are_rounded() {
        let leaf = || {
            Tensor::from_slice(&[1.0f32, 2.0])
                .view([1, 2])
                .set_requires_grad(true)
        };
        let weights = Tensor::from_slice(&[1.1f32, 448.0]).view([1, 2]);
        let gradient = |x: &Tensor, y: Tensor| {
            let loss = (y * &weights).sum(Kind::Float);
            values(&Tensor::run_backward(&[loss], &[x], false, false)[0])
        };
        let x = leaf();
        assert_eq!(gradient(&x, round(&x, Tile::ACTIVATIONS)), [1.1, 448.0]);
        let x = leaf();
        let same = round_gradient(&x, Tile::ACTIVATIONS);
        assert_eq!(values(&same), [1.0, 2.0]);
        assert_eq!(gradient(&x, same), [1.125, 448.0]);
    }
}
