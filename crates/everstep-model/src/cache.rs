//! Keys and values of the tokens that a sequence has so far.

use tch::{Device, Kind, Tensor};

use crate::ModelConfig;

/// Memory for one sequence, or several of equal length, up to the model's context.
#[derive(Debug)]
pub(crate) struct Cache {
    layers: Vec<(Tensor, Tensor)>,
    len: i64,
}

impl Cache {
    pub(crate) fn new(config: &ModelConfig, rows: usize, kind: Kind, device: Device) -> Self {
        let shape =
            [rows, config.kv_heads, config.context, config.head_dim()].map(|len| len as i64);
        let empty = || Tensor::zeros(shape, (kind, device));
        Self {
            layers: (0..config.layers).map(|_| (empty(), empty())).collect(),
            len: 0,
        }
    }

    /// Tokens held.
    pub(crate) fn len(&self) -> i64 {
        self.len
    }

    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    /// Puts a layer's keys and values, `[rows, kv_heads, columns, head_dim]`, behind those held, and gives them all.
    pub(crate) fn extend(
        &mut self,
        layer: usize,
        keys: &Tensor,
        values: &Tensor,
    ) -> (Tensor, Tensor) {
        let columns = keys.size()[2];
        let (held_keys, held_values) = &self.layers[layer];
        held_keys.narrow(2, self.len, columns).copy_(keys);
        held_values.narrow(2, self.len, columns).copy_(values);
        let end = self.len + columns;
        (held_keys.narrow(2, 0, end), held_values.narrow(2, 0, end))
    }

    /// Counts the columns that every layer was extended by.
    pub(crate) fn advance(&mut self, columns: i64) {
        self.len += columns;
    }
}
