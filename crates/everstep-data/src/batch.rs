//! Windows of tokens as a loader serves them.

/// The target of a position that does not count, as PyTorch's `ignore_index` has it.
pub const IGNORED: i64 = -100;

/// `rows` windows of `columns` tokens and, for each token, the one that follows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenBatch {
    /// Input tokens, row-major, `rows * columns`.
    pub inputs: Vec<i64>,
    /// The token after each input token, or [`IGNORED`]; row-major, `rows * columns`.
    pub targets: Vec<i64>,
    /// Number of windows.
    pub rows: usize,
    /// Tokens of a window.
    pub columns: usize,
}

impl TokenBatch {
    pub(crate) fn with_capacity(rows: usize, columns: usize) -> Self {
        let capacity = rows * columns;
        Self {
            inputs: Vec::with_capacity(capacity),
            targets: Vec::with_capacity(capacity),
            rows,
            columns,
        }
    }

    /// How many targets count towards the loss.
    pub fn num_targets(&self) -> usize {
        self.targets
            .iter()
            .filter(|&&target| target != IGNORED)
            .count()
    }

    /// The rows `first..first + rows` as a batch of their own, such as a micro-batch. The range must lie inside.
    pub fn slice_rows(&self, first: usize, rows: usize) -> Self {
        let range = first * self.columns..(first + rows) * self.columns;
        Self {
            inputs: self.inputs[range.clone()].to_vec(),
            targets: self.targets[range].to_vec(),
            rows,
            columns: self.columns,
        }
    }

    /// The batch as bytes: rows and columns as u32, then inputs and targets as i32, all little-endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(8 + 4 * (self.inputs.len() + self.targets.len()));
        bytes.extend((self.rows as u32).to_le_bytes());
        bytes.extend((self.columns as u32).to_le_bytes());
        for value in self.inputs.iter().chain(&self.targets) {
            // Tokens fit: a vocabulary has fewer than 2^31 of them, and `IGNORED` is small.
            bytes.extend((*value as i32).to_le_bytes());
        }
        bytes
    }

    /// Reads what [`Self::to_bytes`] wrote; `None` if `bytes` is anything else.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let word =
            |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?) as usize);
        let (rows, columns) = (word(0)?, word(4)?);
        let cells = rows.checked_mul(columns)?;
        if bytes.len() != cells.checked_mul(8)?.checked_add(8)? {
            return None;
        }
        let mut values = bytes[8..]
            .chunks_exact(4)
            .map(|c| i64::from(i32::from_le_bytes([c[0], c[1], c[2], c[3]])));
        let inputs: Vec<i64> = values.by_ref().take(cells).collect();
        let targets: Vec<i64> = values.collect();
        let valid = inputs.iter().all(|&token| token >= 0)
            && targets.iter().all(|&token| token >= 0 || token == IGNORED);
        valid.then_some(Self {
            inputs,
            targets,
            rows,
            columns,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip_and_damage_is_refused() {
        let batch = TokenBatch {
            inputs: vec![1, 2, 70_000, 4],
            targets: vec![2, 3, 4, IGNORED],
            rows: 2,
            columns: 2,
        };
        let bytes = batch.to_bytes();
        assert_eq!(TokenBatch::from_bytes(&bytes), Some(batch.clone()));
        assert_eq!(TokenBatch::from_bytes(&bytes[1..]), None);
        assert_eq!(TokenBatch::from_bytes(&[255; 8]), None);
        assert_eq!(TokenBatch::from_bytes(&[]), None);
        assert_eq!(batch.slice_rows(1, 1).inputs, [70_000, 4]);
        assert_eq!(batch.num_targets(), 3);
    }
}
