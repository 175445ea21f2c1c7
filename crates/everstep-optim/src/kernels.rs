//! The loops over memory: each is one pass that the compiler vectorises. Vectorising cannot change a bit: operations are
//! element-wise and exactly rounded, and sums keep a fixed order lane by lane.

use crate::moments::{Bfloat16, Moment};

/// What one AdamW step does to every element of a block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct AdamStep {
    /// Factor on the gradient sum.
    pub(crate) scale: f32,
    /// Factor on parameters: 1 - learning rate × weight decay.
    pub(crate) keep: f32,
    /// 1 - beta1.
    pub(crate) first_weight: f32,
    /// beta2.
    pub(crate) second_keep: f32,
    /// 1 - beta2.
    pub(crate) second_weight: f32,
    /// 1 / sqrt(1 - beta2^t).
    pub(crate) root_factor: f32,
    /// Added to the denominator.
    pub(crate) eps: f32,
    /// Learning rate / (1 - beta1^t).
    pub(crate) step_size: f32,
}

/// Independent partial sums of [`squared_norm`]. Part of the product: another number gives other bits.
const LANES: usize = 16;

/// `left += right`.
pub(crate) fn add_assign(left: &mut [f32], right: &[f32]) {
    assert_eq!(
        left.len(),
        right.len(),
        "ranges of one block have one length"
    );
    for (left, right) in left.iter_mut().zip(right) {
        *left += right;
    }
}

/// `left + right`.
pub(crate) fn add(left: &[f32], right: &[f32]) -> Vec<f32> {
    assert_eq!(
        left.len(),
        right.len(),
        "ranges of one block have one length"
    );
    left.iter()
        .zip(right)
        .map(|(left, right)| left + right)
        .collect()
}

/// Sum of squares. Finite if and only if all values are: no sum of squares of `f32` overflows `f64`.
pub(crate) fn squared_norm(values: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let chunks = values.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(value) * f64::from(value);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(tail) {
        *lane += f64::from(value) * f64::from(value);
    }
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
    }
    lanes[0]
}

/// One step of AdamW (Loshchilov and Hutter 2019), in the order of operations of `torch.optim.AdamW`.
pub(crate) fn adamw<M: Moment>(
    parameters: &mut [f32],
    first: &mut [M],
    second: &mut [M],
    gradient: &[f32],
    step: &AdamStep,
) {
    let len = parameters.len();
    assert!(
        first.len() == len && second.len() == len && gradient.len() == len,
        "the parts of one block have one length"
    );
    let moments = first.iter_mut().zip(second);
    for ((parameter, (first, second)), gradient) in parameters.iter_mut().zip(moments).zip(gradient)
    {
        let gradient = gradient * step.scale;
        let mean = first.load();
        let mean = mean + step.first_weight * (gradient - mean);
        let square = second.load() * step.second_keep + step.second_weight * gradient * gradient;
        let denominator = square.sqrt() * step.root_factor + step.eps;
        *parameter = *parameter * step.keep - step.step_size * (mean / denominator);
        // Only what the next step finds is rounded.
        *first = M::store(mean);
        *second = M::store(square);
    }
}

/// Moves each mean towards its value by this weight, as `torch.optim.swa_utils` does.
pub(crate) fn average(means: &mut [f32], values: &[f32], weight: f32) {
    assert_eq!(
        means.len(),
        values.len(),
        "the parts of one block have one length"
    );
    for (mean, &value) in means.iter_mut().zip(values) {
        *mean += weight * (value - *mean);
    }
}

/// Moves each bias by `rate` down if its expert's load is above the mean, and up if it is below.
pub(crate) fn balance(biases: &mut [f32], excess: &[f32], rate: f32) {
    assert_eq!(
        biases.len(),
        excess.len(),
        "the parts of one block have one length"
    );
    for (bias, &excess) in biases.iter_mut().zip(excess) {
        if excess != 0.0 {
            *bias -= rate.copysign(excess);
        }
    }
}

/// The values as bfloat16.
pub(crate) fn to_bfloat16(values: &[f32]) -> Vec<u16> {
    values.iter().map(|&value| Bfloat16::store(value)).collect()
}

#[cfg(test)]
mod tests;
