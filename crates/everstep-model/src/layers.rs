//! The parts of a layer: projections, norms, the MLP, dropout.
//!
//! Every operation here is chosen so that its bits do not depend on the number of threads: libtorch's affine layer norm,
//! for one, adds up its scale's gradient thread by thread, and is used without a scale for that reason.

use tch::Tensor;

use crate::config::{Architecture, Mlp, ModelConfig, Norm};
use crate::spec::Names;
use crate::weights::Weights;

/// A matrix and perhaps a bias, applied to `[tokens, in]`.
#[derive(Debug)]
pub(crate) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    architecture: Architecture,
}

impl Linear {
    /// The named projections, joined if there are several; only Llama's orientation has neighbours in memory.
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
            architecture: config.architecture,
        }
    }

    /// `[tokens, in]` to `[tokens, out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        match (self.architecture, &self.bias) {
            (Architecture::Llama, bias) => x.linear(&self.weight, bias.as_ref()),
            (Architecture::Gpt2, None) => x.mm(&self.weight),
            (Architecture::Gpt2, Some(bias)) => bias.addmm(x, &self.weight),
        }
    }
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
    pub(crate) fn new(weights: &mut Weights, config: &ModelConfig, layer: usize) -> Self {
        let names = Names::of(config);
        let gate = names.in_layer(layer, names.gate);
        let up = names.in_layer(layer, names.up);
        let mut linear = |names: &[String]| Linear::new(weights, config, names);
        let (gate, up) = match (config.mlp, config.architecture) {
            (Mlp::Swiglu, Architecture::Llama) => (Some(linear(&[gate, up])), None),
            (Mlp::Swiglu, Architecture::Gpt2) => (Some(linear(&[gate])), Some(linear(&[up]))),
            (Mlp::Gelu | Mlp::GeluTanh, _) => (None, Some(linear(&[up]))),
        };
        let down = linear(&[names.in_layer(layer, names.down)]);
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
