//! Rotary positions (Su et al. 2021), in Hugging Face's layout: the two halves of a head form the pairs.

use tch::{Device, Kind, Tensor};

use crate::ModelConfig;

/// Cosines and signed sines for every position.
#[derive(Debug)]
pub(crate) struct Rotary {
    cosines: Tensor,
    /// The first half is negated, so that rotating is two products and a roll.
    sines: Tensor,
    half: i64,
}

impl Rotary {
    pub(crate) fn new(config: &ModelConfig, device: Device) -> Self {
        let head_dim = config.head_dim();
        let half = head_dim / 2;
        let mut cosines = Vec::with_capacity(config.context * head_dim);
        let mut sines = Vec::with_capacity(config.context * head_dim);
        // The tables are parameters in all but name: `libm` gives the same bits on every machine.
        for position in 0..config.context {
            for index in 0..head_dim {
                let exponent = -2.0 * (index % half) as f64 / head_dim as f64;
                let angle = position as f64 * libm::pow(config.rope_theta, exponent);
                let sign = if index < half { -1.0 } else { 1.0 };
                cosines.push(libm::cos(angle) as f32);
                sines.push((sign * libm::sin(angle)) as f32);
            }
        }
        let table = |values: &[f32]| {
            Tensor::from_slice(values)
                .view([config.context as i64, 1, head_dim as i64])
                .to_device(device)
        };
        Self {
            cosines: table(&cosines),
            sines: table(&sines),
            half: half as i64,
        }
    }

    /// Turns `[rows, columns, heads, head_dim]`, whose first column is at position `start`.
    pub(crate) fn turn(&self, x: &Tensor, start: i64) -> Tensor {
        let columns = x.size()[1];
        let cosines = self.cosines.narrow(0, start, columns);
        let sines = self.sines.narrow(0, start, columns);
        // Products with the float32 tables are float32, so bfloat16 is rounded once, at the end.
        let turned = (x * cosines).addcmul(&x.roll([self.half], [-1]).to_kind(Kind::Float), &sines);
        turned.to_kind(x.kind())
    }
}
