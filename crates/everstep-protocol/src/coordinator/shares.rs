//! How tasks are shared between workers of different pace.

/// An even split is kept while it takes no longer than this many times the best one: it sends least, and measures are noisy.
const EVEN_SLACK: f64 = 1.25;
/// Of uneven splits, the one with the longest aligned pieces is taken that takes no longer than this many times the best.
const ALIGNED_SLACK: f64 = 1.1;

/// What a worker has to do already, and how fast it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    /// Until it is free.
    pub(super) busy_ms: f64,
    /// Time per task.
    pub(super) slot_ms: f64,
}

impl Load {
    fn with(&self, count: usize) -> f64 {
        self.busy_ms + count as f64 * self.slot_ms
    }
}

/// Contiguous pieces of `all`, one for each worker, so that they end as early as they can. Pieces begin at multiples of large powers of
/// two where that costs little: such pieces are summed before they are sent.
pub(super) fn split<'a>(all: &'a [u32], workers: &[Load]) -> Vec<&'a [u32]> {
    let counts = counts(all.len(), workers);
    let mut rest = all;
    counts
        .into_iter()
        .map(|count| {
            let (piece, after) = rest.split_at(count);
            rest = after;
            piece
        })
        .collect()
}

fn counts(total: usize, workers: &[Load]) -> Vec<usize> {
    if workers.is_empty() {
        return Vec::new();
    }
    let (base, extra) = (total / workers.len(), total % workers.len());
    let even: Vec<usize> = (0..workers.len())
        .map(|part| base + usize::from(part < extra))
        .collect();
    let best_ms = makespan(&greedy(total, 1, workers), workers);
    if makespan(&even, workers) <= EVEN_SLACK * best_ms {
        return even;
    }
    let mut unit = total.next_power_of_two();
    loop {
        let counts = greedy(total, unit, workers);
        if unit == 1 || makespan(&counts, workers) <= ALIGNED_SLACK * best_ms {
            return counts;
        }
        unit /= 2;
    }
}

/// Gives piece after piece of `unit` tasks to whoever would be done with it first.
fn greedy(total: usize, unit: usize, workers: &[Load]) -> Vec<usize> {
    let mut counts = vec![0; workers.len()];
    let mut left = total;
    while left > 0 {
        let piece = unit.min(left);
        let ends_ms = |worker: usize| workers[worker].with(counts[worker] + piece);
        let first = (0..workers.len()).min_by(|a, b| ends_ms(*a).total_cmp(&ends_ms(*b)));
        let Some(first) = first else {
            break;
        };
        counts[first] += piece;
        left -= piece;
    }
    counts
}

/// When the last of those that get something is done.
fn makespan(counts: &[usize], workers: &[Load]) -> f64 {
    counts
        .iter()
        .zip(workers)
        .filter(|(count, _)| **count > 0)
        .map(|(count, worker)| worker.with(*count))
        .fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn workers(slot_ms: &[f64]) -> Vec<Load> {
        slot_ms
            .iter()
            .map(|slot_ms| Load {
                busy_ms: 0.0,
                slot_ms: *slot_ms,
            })
            .collect()
    }

    #[test]
    fn equals_share_evenly_whatever_the_noise() {
        assert_eq!(counts(8, &workers(&[100.0, 112.0])), [4, 4]);
        assert_eq!(counts(8, &workers(&[100.0, 95.0, 104.0])), [3, 3, 2]);
        assert_eq!(counts(2, &workers(&[1.0, 1.0, 1.0])), [1, 1, 0]);
        assert_eq!(counts(0, &workers(&[1.0])), [0]);
        assert!(counts(3, &[]).is_empty());
    }

    #[test]
    fn slow_workers_get_less_and_very_slow_ones_nothing() {
        assert_eq!(counts(16, &workers(&[100.0, 300.0])), [12, 4]);
        assert_eq!(counts(8, &workers(&[100.0, 100.0, 1000.0])), [4, 4, 0]);
        let busy = Load {
            busy_ms: 200.0,
            slot_ms: 100.0,
        };
        assert_eq!(counts(2, &[workers(&[100.0])[0], busy]), [2, 0]);
    }

    proptest! {
        #[test]
        fn everything_is_given_out_about_as_well_as_possible(
            total in 0usize..40,
            slot_ms in prop::collection::vec(1.0f64..1000.0, 1..6),
        ) {
            let workers = workers(&slot_ms);
            let shares = counts(total, &workers);
            prop_assert_eq!(shares.iter().sum::<usize>(), total);
            let best_ms = makespan(&greedy(total, 1, &workers), &workers);
            prop_assert!(makespan(&shares, &workers) <= EVEN_SLACK * best_ms);
            let all: Vec<u32> = (0..total as u32).collect();
            prop_assert_eq!(split(&all, &workers).concat(), all);
        }
    }
}
