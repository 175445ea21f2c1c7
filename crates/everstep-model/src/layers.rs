//! The parts of a layer: projections, norms, the MLP, dropout.
//!
//! Every operation here is chosen so that its bits do not depend on the number of threads: libtorch's affine layer norm,
//! for one, adds up its scale's gradient thread by thread, and is used without a scale for that reason.

use everstep_torch::fp8::{self, Tile};
use tch::{Device, Kind, Tensor};

use crate::weights::Weights;
use everstep_spec::config::{Architecture, Mlp, ModelConfig, Norm};

/// A matrix and perhaps a bias, applied to `[tokens, in]`.
#[derive(Debug)]
pub(crate) struct Linear {
    pub(crate) weight: Tensor,
    bias: Option<Tensor>,
    /// Whether the matrix is stored as `[in, out]`.
    is_transposed: bool,
    is_fp8: bool,
}

impl Linear {
    /// The named projections, joined if there are several; only those stored as `[out, in]` are neighbours in memory.
    pub(crate) fn new(weights: &mut Weights, config: &ModelConfig, names: &[String]) -> Self {
        let with = |suffix: &str| {
            names
                .iter()
                .map(|name| format!("{name}.{suffix}"))
                .collect::<Vec<_>>()
        };
        Self {
            weight: weights.leaf(&with("weight")),
            bias: config.bias.then(|| weights.leaf(&with("bias"))),
            is_transposed: config.architecture == Architecture::Gpt2,
            is_fp8: weights.is_fp8,
        }
    }

    /// `[tokens, in]` to `[tokens, out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        let is_even = is_even(x.size()[0]);
        product(self.is_fp8, is_even, x, &self.weight, |x, weight| {
            let bias = self.bias.as_ref().map(|bias| bias.to_kind(x.kind()));
            match (self.is_transposed, bias) {
                (false, bias) => x.linear(weight, bias),
                (true, None) => x.mm(weight),
                (true, Some(bias)) => bias.addmm(x, weight),
            }
        })
    }
}

/// A product of activations and weights; with FP8, of both as 8 bits keep them, and so is the gradient that its own products take.
///
/// `is_even`: as [`in_one_order`].
pub(crate) fn product(
    is_fp8: bool,
    is_even: bool,
    x: &Tensor,
    weight: &Tensor,
    multiply: impl Fn(&Tensor, &Tensor) -> Tensor,
) -> Tensor {
    if !is_fp8 {
        return in_one_order(is_even, x, weight, multiply);
    }
    let (x, weight) = (
        fp8::round(x, Tile::ACTIVATIONS),
        fp8::round(weight, Tile::WEIGHTS),
    );
    let y = in_one_order(is_even, &x, &weight, multiply);
    fp8::round_gradient(&y, Tile::ACTIVATIONS)
}

/// Whether so many rows divide evenly among threads.
pub(crate) fn is_even(rows: i64) -> bool {
    rows % 16 == 0
}

/// A product whose bits do not depend on the number of threads. Without instructions for bfloat16, a CPU adds up some rows of a product in
/// bfloat16 in another order if its rows do not divide evenly among threads; those are multiplied in float32, which is no slower there.
pub(crate) fn in_one_order(
    is_even: bool,
    x: &Tensor,
    weight: &Tensor,
    multiply: impl Fn(&Tensor, &Tensor) -> Tensor,
) -> Tensor {
    if is_in_one_order(is_even, x) {
        return multiply(x, weight);
    }
    multiply(&x.to_kind(Kind::Float), &weight.to_kind(Kind::Float)).to_kind(Kind::BFloat16)
}

/// Whether products of `x` add up in one order whatever the number of threads.
pub(crate) fn is_in_one_order(is_even: bool, x: &Tensor) -> bool {
    is_even || x.kind() != Kind::BFloat16 || x.device() != Device::Cpu
}

/// A norm over the last dimension. Statistics are float32 inside libtorch whatever the input's type.
#[derive(Debug)]
pub(crate) struct Normalize {
    kind: Norm,
    scale: Tensor,
    shift: Option<Tensor>,
    eps: f64,
    width: i64,
}

impl Normalize {
    pub(crate) fn new(weights: &mut Weights, config: &ModelConfig, name: &str) -> Self {
        let shifted = config.norm == Norm::Layer && config.bias;
        Self {
            kind: config.norm,
            scale: weights.leaf(&[format!("{name}.weight")]),
            shift: shifted.then(|| weights.leaf(&[format!("{name}.bias")])),
            eps: config.norm_eps,
            width: config.width as i64,
        }
    }

    /// A root mean square over `width` values.
    pub(crate) fn rms(weights: &mut Weights, name: &str, width: usize, eps: f64) -> Self {
        Self {
            kind: Norm::Rms,
            scale: weights.leaf(&[format!("{name}.weight")]),
            shift: None,
            eps,
            width: width as i64,
        }
    }

    /// `[tokens, width]` to the same.
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        match self.kind {
            Norm::Rms => x.rms_norm([self.width], Some(&self.scale), self.eps),
            Norm::Layer => {
                let x = x.layer_norm([self.width], None::<&Tensor>, None, self.eps, false);
                match &self.shift {
                    Some(shift) => shift.addcmul(&x, &self.scale),
                    None => x * &self.scale,
                }
            }
        }
    }
}

/// The MLP of a layer.
#[derive(Debug)]
pub(crate) struct FeedForward {
    kind: Mlp,
    /// Gate and up joined, or gate alone, or nothing.
    gate: Option<Linear>,
    up: Option<Linear>,
    down: Linear,
}

impl FeedForward {
    /// The MLP whose projections have these names; there is no gate without `swiglu`.
    pub(crate) fn new(
        weights: &mut Weights,
        config: &ModelConfig,
        [gate, up, down]: [String; 3],
    ) -> Self {
        let mut linear = |names: &[String]| Linear::new(weights, config, names);
        let (gate, up) = match (config.mlp, config.architecture) {
            (Mlp::Swiglu, Architecture::Gpt2) => (Some(linear(&[gate])), Some(linear(&[up]))),
            (Mlp::Swiglu, _) => (Some(linear(&[gate, up])), None),
            (Mlp::Gelu | Mlp::GeluTanh, _) => (None, Some(linear(&[up]))),
        };
        let down = linear(&[down]);
        Self {
            kind: config.mlp,
            gate,
            up,
            down,
        }
    }

    /// `[tokens, width]` to the same.
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        let up = self.up.as_ref().map(|up| up.forward(x));
        let gate = self.gate.as_ref().map(|gate| gate.forward(x));
        let inner = match (gate, up) {
            (Some(joined), None) => {
                let halves = joined.chunk(2, 1);
                halves[0].silu() * &halves[1]
            }
            (Some(gate), Some(up)) => gate.silu() * up,
            (None, Some(up)) if self.kind == Mlp::GeluTanh => up.gelu("tanh"),
            (None, Some(up)) => up.gelu("none"),
            (None, None) => unreachable!("an MLP has an inner projection"),
        };
        self.down.forward(&inner)
    }
}

/// Drops a share of `x` in training, drawing from libtorch's generator; a share of 0 draws nothing.
pub(crate) fn dropout(x: Tensor, share: f64) -> Tensor {
    if share > 0.0 {
        x.dropout(share, true)
    } else {
        x
    }
}
