//! Rotary positions (Su et al. 2021), in Hugging Face's layout: the two halves of a head form the pairs. DeepSeek's neighbours form the
//! pairs; they are moved to the halves, which no product of a query and a key sees.

use tch::{Device, Kind, Tensor};

use everstep_spec::config::{ModelConfig, RopeScaling};

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
        let head_dim = config.rope_dim();
        let half = head_dim / 2;
        let frequencies = frequencies(config, half);
        let scaling = config.rope_scaling.as_ref();
        let scale = scaling.map_or(1.0, RopeScaling::rotation_scale);
        let mut cosines = Vec::with_capacity(config.context * head_dim);
        let mut sines = Vec::with_capacity(config.context * head_dim);
        // The tables are parameters in all but name: `libm` gives the same bits on every machine.
        for position in 0..config.context {
            for index in 0..head_dim {
                let angle = position as f64 * frequencies[index % half];
                let sign = if index < half { -scale } else { scale };
                cosines.push((scale * libm::cos(angle)) as f32);
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

    /// The same tables.
    pub(crate) fn shallow_clone(&self) -> Self {
        Self {
            cosines: self.cosines.shallow_clone(),
            sines: self.sines.shallow_clone(),
            half: self.half,
        }
    }

    /// The same for heads whose pairs are neighbours; the result has the first of each pair before the second ones.
    pub(crate) fn turn_interleaved(&self, x: &Tensor, start: i64) -> Tensor {
        let mut size = x.size();
        size.pop();
        size.extend([self.half, 2]);
        let halves = x.reshape(&size).transpose(-1, -2).flatten(-2, -1);
        self.turn(&halves, start)
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

/// By how many radians each pair turns from one position to the next.
fn frequencies(config: &ModelConfig, half: usize) -> Vec<f64> {
    let (dim, theta) = ((2 * half) as f64, config.rope_theta);
    (0..half)
        .map(|index| {
            let plain = libm::pow(theta, -2.0 * index as f64 / dim);
            match &config.rope_scaling {
                Some(scaling) => scaling.stretch(plain, index, dim, theta),
                None => plain,
            }
        })
        .collect()
}
