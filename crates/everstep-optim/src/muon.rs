//! Muon: momentum whose direction is made orthogonal, for the matrices between embedding and output (Jordan et al. 2024), scaled as
//! AdamW's steps are (Liu et al. 2025, Moonlight), so that one learning rate and one decay serve both.

use serde::{Deserialize, Serialize};

use crate::kernels;
use crate::matrix::{Matrix, product};
use crate::moments::Moment;

/// Muon for a layer's matrices; embeddings, output, norms and biases stay with AdamW.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MuonConfig {
    /// Decay of the running mean of gradients; 0.95.
    #[serde(default = "default_momentum")]
    pub momentum: f64,
    /// Root mean square of a step, over the learning rate; 0.2, which is about that of AdamW.
    #[serde(default = "default_rms")]
    pub rms: f64,
}

fn default_momentum() -> f64 {
    0.95
}

fn default_rms() -> f64 {
    0.2
}

impl Default for MuonConfig {
    fn default() -> Self {
        Self {
            momentum: default_momentum(),
            rms: default_rms(),
        }
    }
}

/// What one step does to a matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct MuonStep {
    /// Factor on the gradient sum.
    pub(crate) scale: f32,
    /// Factor on parameters: 1 - learning rate × weight decay.
    pub(crate) keep: f32,
    /// Decay of the running mean.
    pub(crate) momentum: f32,
    /// Learning rate × root mean square of a step.
    pub(crate) rms: f64,
}

/// Times the iteration of Newton and Schulz is applied, and its coefficients.
const ITERATIONS: usize = 5;
const COEFFICIENTS: [f32; 3] = [3.4445, -4.7750, 2.0315];
/// A matrix of a smaller norm is not brought to norm 1.
const NORM_MIN: f32 = 1e-7;

/// Moves a matrix of `[rows, columns]`.
pub(crate) fn muon<M: Moment>(
    parameters: &mut [f32],
    momentum: &mut [M],
    gradient: &[f32],
    shape: [usize; 2],
    step: &MuonStep,
) {
    let len = parameters.len();
    assert!(
        momentum.len() == len && gradient.len() == len,
        "the parts of one block have one length"
    );
    // Nesterov's: the mean as it will be after one more of this gradient.
    let ahead = momentum.iter_mut().zip(gradient).map(|(kept, gradient)| {
        let gradient = gradient * step.scale;
        let mean = kept.load();
        let mean = mean + (1.0 - step.momentum) * (gradient - mean);
        *kept = M::store(mean);
        gradient + step.momentum * (mean - gradient)
    });
    let direction = orthogonal(ahead.collect(), shape);
    let longest = shape[0].max(shape[1]) as f64;
    let step_size = (step.rms * longest.sqrt()) as f32;
    for (parameter, direction) in parameters.iter_mut().zip(direction) {
        *parameter = *parameter * step.keep - step_size * direction;
    }
}

/// The nearest matrix, about, whose rows or columns (whichever are fewer) are orthogonal and of length 1.
fn orthogonal(mut x: Vec<f32>, [rows, columns]: [usize; 2]) -> Vec<f32> {
    let norm = (kernels::squared_norm(&x).sqrt() as f32).max(NORM_MIN);
    for value in &mut x {
        *value /= norm;
    }
    if rows <= columns {
        return iterate(x, rows, columns);
    }
    let tall = transpose(&x, rows, columns);
    transpose(&iterate(tall, columns, rows), columns, rows)
}

/// `rows <= columns`: the smaller of the two squares is computed.
fn iterate(mut x: Vec<f32>, rows: usize, columns: usize) -> Vec<f32> {
    let [a, b, c] = COEFFICIENTS;
    for _ in 0..ITERATIONS {
        let wide = Matrix::new(&x, rows, columns);
        // [rows, rows]
        let gram = product(wide, wide.transposed());
        let square = Matrix::new(&gram, rows, rows);
        let mut polynomial = product(square, square);
        for (value, gram) in polynomial.iter_mut().zip(&gram) {
            *value = b * gram + c * *value;
        }
        // [rows, columns]
        let moved = product(Matrix::new(&polynomial, rows, rows), wide);
        for (value, moved) in x.iter_mut().zip(moved) {
            *value = a * *value + moved;
        }
    }
    x
}

fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut turned = Vec::with_capacity(values.len());
    for column in 0..columns {
        turned.extend((0..rows).map(|row| values[row * columns + column]));
    }
    turned
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize) -> Vec<f32> {
        (0..count as u32)
            .map(|index| (index.wrapping_mul(0x9e37_79b9) >> 8) as f32 / (1 << 23) as f32 - 1.0)
            .collect()
    }

    #[test]
    fn directions_are_nearly_orthogonal_whichever_side_is_longer() {
        for [rows, columns] in [[6, 20], [20, 6], [8, 8]] {
            let x = orthogonal(values(rows * columns), [rows, columns]);
            let wide = if rows <= columns {
                x
            } else {
                transpose(&x, rows, columns)
            };
            let (rows, columns) = (rows.min(columns), rows.max(columns));
            for row in 0..rows {
                let line = &wide[row * columns..][..columns];
                let norm = kernels::squared_norm(line).sqrt();
                // The coefficients bring singular values near 1, not to it.
                assert!((0.5..1.4).contains(&norm), "{rows}x{columns}: {norm}");
            }
        }
        assert_eq!(orthogonal(vec![0.0; 12], [3, 4]), [0.0; 12]);
    }
}
