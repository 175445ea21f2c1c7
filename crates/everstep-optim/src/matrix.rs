//! Products of matrices that have the same bits on every machine.
//!
//! An element of a product is added up term by term in the order of the inner dimension, and a term is rounded before it is added. So
//! neither the width of vectors nor the division of the work can change a bit, and wider vectors are used where the machine has them.

/// Rows of a product that are computed together.
const ROWS: usize = 4;

/// A row-major matrix, or its transpose.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    is_transposed: bool,
}

impl<'a> Matrix<'a> {
    /// `rows` times `columns` values, row by row.
    pub(crate) fn new(values: &'a [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(values.len(), rows * columns, "a matrix has all its values");
        Self {
            values,
            rows,
            columns,
            is_transposed: false,
        }
    }

    /// What was a column is a row.
    pub(crate) fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            is_transposed: !self.is_transposed,
            ..self
        }
    }

    /// Copies `count` values of a row from `column` on.
    fn copy(&self, row: usize, column: usize, into: &mut [f32]) {
        if self.is_transposed {
            let values = self.values[column * self.rows + row..].iter();
            for (target, value) in into.iter_mut().zip(values.step_by(self.rows)) {
                *target = *value;
            }
        } else {
            into.copy_from_slice(&self.values[row * self.columns + column..][..into.len()]);
        }
    }
}

/// `a b`, row by row. `a` must not be transposed.
pub(crate) fn product(a: Matrix<'_>, b: Matrix<'_>) -> Vec<f32> {
    assert!(!a.is_transposed, "only the second factor is copied");
    assert_eq!(a.columns, b.rows, "the inner dimensions are equal");
    let mut out = vec![0.0; a.rows * b.columns];
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the machine has what the function is compiled for.
            #[allow(unsafe_code)]
            unsafe {
                with_avx512(a, b, &mut out);
            }
            return out;
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: as above.
            #[allow(unsafe_code)]
            unsafe {
                with_avx2(a, b, &mut out);
            }
            return out;
        }
    }
    multiply::<8>(a, b, &mut out);
    out
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn with_avx512(a: Matrix<'_>, b: Matrix<'_>, out: &mut [f32]) {
    multiply::<32>(a, b, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn with_avx2(a: Matrix<'_>, b: Matrix<'_>, out: &mut [f32]) {
    multiply::<16>(a, b, out);
}

/// In panels of `COLUMNS` columns.
#[inline(always)]
fn multiply<const COLUMNS: usize>(a: Matrix<'_>, b: Matrix<'_>, out: &mut [f32]) {
    let (inner, width) = (a.columns, b.columns);
    let mut panel = vec![[0.0; COLUMNS]; inner];
    for column in (0..width).step_by(COLUMNS) {
        let count = COLUMNS.min(width - column);
        for (row, line) in panel.iter_mut().enumerate() {
            b.copy(row, column, &mut line[..count]);
        }
        for first in (0..a.rows).step_by(ROWS) {
            let rows = ROWS.min(a.rows - first);
            // Rows beyond the last are computed and thrown away.
            let line = |row: usize| &a.values[(first + row.min(rows - 1)) * inner..][..inner];
            let lines = [line(0), line(1), line(2), line(3)];
            let sums = rows_by_panel(lines, &panel);
            for (row, sums) in sums.iter().enumerate().take(rows) {
                out[(first + row) * width + column..][..count].copy_from_slice(&sums[..count]);
            }
        }
    }
}

/// The sums of [`ROWS`] rows. Four arrays and loops over numbers: so the compiler keeps them in vectors, which it does neither with one array
/// of arrays nor with iterators.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
fn rows_by_panel<const COLUMNS: usize>(
    [a0, a1, a2, a3]: [&[f32]; ROWS],
    panel: &[[f32; COLUMNS]],
) -> [[f32; COLUMNS]; ROWS] {
    let mut s0 = [0.0; COLUMNS];
    let mut s1 = [0.0; COLUMNS];
    let mut s2 = [0.0; COLUMNS];
    let mut s3 = [0.0; COLUMNS];
    for index in 0..panel.len() {
        let line = &panel[index];
        let (f0, f1, f2, f3) = (a0[index], a1[index], a2[index], a3[index]);
        for column in 0..COLUMNS {
            s0[column] += f0 * line[column];
        }
        for column in 0..COLUMNS {
            s1[column] += f1 * line[column];
        }
        for column in 0..COLUMNS {
            s2[column] += f2 * line[column];
        }
        for column in 0..COLUMNS {
            s3[column] += f3 * line[column];
        }
    }
    [s0, s1, s2, s3]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize, salt: u32) -> Vec<f32> {
        (0..count as u32)
            .map(|index| {
                let bits = (index ^ salt).wrapping_mul(0x9e37_79b9) >> 8;
                bits as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// Term by term.
    fn plain(a: &[f32], b: &[f32], [m, k, n]: [usize; 3]) -> Vec<f32> {
        let element = |row: usize, column: usize| {
            (0..k).fold(0.0f32, |sum, index| {
                sum + a[row * k + index] * b[index * n + column]
            })
        };
        (0..m * n)
            .map(|index| element(index / n, index % n))
            .collect()
    }

    #[test]
    fn every_width_gives_the_bits_of_the_plain_loop() {
        for shape in [[1, 1, 1], [3, 5, 7], [4, 16, 32], [9, 33, 65], [32, 7, 16]] {
            let [m, k, n] = shape;
            let (a, b) = (values(m * k, 1), values(k * n, 2));
            let expected = plain(&a, &b, shape);
            let (left, right) = (Matrix::new(&a, m, k), Matrix::new(&b, k, n));
            assert_eq!(product(left, right), expected, "{shape:?}");
            let mut out = vec![0.0; m * n];
            multiply::<8>(left, right, &mut out);
            assert_eq!(out, expected, "{shape:?}");
            multiply::<32>(left, right, &mut out);
            assert_eq!(out, expected, "{shape:?}");
        }
    }

    #[test]
    fn a_transpose_is_what_its_copy_is() {
        let (m, k, n) = (5, 6, 9);
        let (a, b) = (values(m * k, 3), values(n * k, 4));
        let copied: Vec<f32> = (0..k * n)
            .map(|index| b[(index % n) * k + index / n])
            .collect();
        let left = Matrix::new(&a, m, k);
        assert_eq!(
            product(left, Matrix::new(&b, n, k).transposed()),
            product(left, Matrix::new(&copied, k, n))
        );
    }
}
