//! The windows of the validation split.

/// The validation split cut in consecutive windows that do not overlap: every token but the first is predicted
/// exactly once. The last window is padded with ignored targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ValidationWindows {
    context: usize,
    total: u64,
    used: u64,
}

impl ValidationWindows {
    /// The windows of `context` tokens over a split of `tokens` tokens. With `max_windows` above 0 at most so many
    /// are used, spread evenly over the split.
    pub fn new(tokens: u64, context: usize, max_windows: u64) -> Self {
        assert!(context > 0, "windows of no tokens");
        let total = tokens.saturating_sub(1).div_ceil(context as u64);
        let used = if max_windows == 0 {
            total
        } else {
            total.min(max_windows)
        };
        Self {
            context,
            total,
            used,
        }
    }

    /// Number of windows that are used.
    pub fn len(&self) -> u64 {
        self.used
    }

    /// True if the split is too short to predict a single token.
    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Tokens of a window.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Number of chunks of `rows` windows; the last one may have fewer rows.
    pub fn chunks(&self, rows: usize) -> u64 {
        self.used.div_ceil(rows.max(1) as u64)
    }

    /// First tokens of the windows of chunk `chunk`.
    pub(crate) fn starts(&self, chunk: u64, rows: usize) -> impl Iterator<Item = u64> {
        let (rows, windows) = (rows.max(1) as u64, *self);
        let first = chunk.saturating_mul(rows).min(self.used);
        (first..first.saturating_add(rows).min(self.used)).map(move |index| {
            let window = u128::from(index) * u128::from(windows.total) / u128::from(windows.used);
            window as u64 * windows.context as u64
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_tile_the_split_and_a_limit_spreads_them() {
        let all = ValidationWindows::new(22, 10, 0);
        assert_eq!((all.len(), all.chunks(2)), (3, 2));
        assert_eq!(
            all.starts(0, 2).chain(all.starts(1, 2)).collect::<Vec<_>>(),
            [0, 10, 20]
        );
        assert_eq!(all.starts(7, 2).count(), 0);
        assert_eq!(ValidationWindows::new(21, 10, 0).len(), 2);
        assert!(ValidationWindows::new(1, 10, 0).is_empty());
        assert!(ValidationWindows::new(0, 10, 4).is_empty());
        let some = ValidationWindows::new(1001, 10, 4);
        assert_eq!(some.starts(0, 9).collect::<Vec<_>>(), [0, 250, 500, 750]);
    }
}
