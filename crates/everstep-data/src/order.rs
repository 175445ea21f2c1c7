//! Which windows a slot sees in a step.

use everstep_protocol::random::{Purpose, Stream};

use crate::error::DataError;
use crate::permutation::Permutation;

/// The order of samples: a pure function of `(seed, t, v)`, equal in every process and for every number of workers.
///
/// Samples are numbered through the whole run, `g = (t * slots + v) * rows_per_slot + row` (less for each smaller step before, if the batch
/// grows). Sample `g` is window
/// `g % windows` of epoch `g / windows`, taken through the epoch's own permutation of all windows. Each epoch also
/// shifts the grid of windows by a phase of its own, so that epochs cut the text at different places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SampleOrder {
    seed: u64,
    windows: u64,
    phases: u64,
    context: usize,
    slots: usize,
    rows_per_slot: usize,
    /// Pairs of a step and the rows of a slot in the steps before it, from the pair before on.
    ramp: Vec<(u64, usize)>,
}

/// One sample of the order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sample {
    /// The pass over the data that the sample belongs to, from 0.
    pub epoch: u64,
    /// The window, `0..windows`, each once per epoch.
    pub window: u64,
    /// The window's first token in the split.
    pub start: u64,
}

impl SampleOrder {
    /// The order over a split of `tokens` tokens in windows of `context` tokens, for `slots` slots of
    /// `rows_per_slot` rows each.
    ///
    /// # Errors
    /// [`DataError::TooShort`] if not even one window and the token after it fit; [`DataError::Config`] if
    /// `context`, `slots` or `rows_per_slot` is 0.
    pub fn new(
        seed: u64,
        tokens: u64,
        context: usize,
        slots: usize,
        rows_per_slot: usize,
    ) -> Result<Self, DataError> {
        for (field, value) in [
            ("data.context", context),
            ("batch.slots", slots),
            ("batch.rows", rows_per_slot),
        ] {
            if value == 0 {
                return Err(DataError::config(field, "is 0; allowed: at least 1"));
            }
        }
        let length = context as u64;
        if tokens <= length {
            return Err(DataError::TooShort {
                tokens,
                context: length,
            });
        }
        // Room for the token after the last window and, where possible, for every phase below `context`.
        let windows = ((tokens - length) / length).max(1);
        let phases = (tokens - windows * length).min(length);
        Ok(Self {
            seed,
            windows,
            phases,
            context,
            slots,
            rows_per_slot,
            ramp: Vec::new(),
        })
    }

    /// The same, but for steps before the last of `ramp`: those before the step of a pair, from that of the pair before on, have the
    /// pair's number of rows in a slot.
    ///
    /// Panics if the steps do not grow.
    #[must_use]
    pub fn with_ramp(mut self, ramp: Vec<(u64, usize)>) -> Self {
        assert!(ramp.is_sorted_by(|a, b| a.0 < b.0), "{ramp:?}");
        self.ramp = ramp;
        self
    }

    /// Windows in an epoch.
    pub fn windows(&self) -> u64 {
        self.windows
    }

    /// Tokens of a window.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Slots of a step.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Rows of a slot in step `step`.
    pub fn rows_per_slot(&self, step: u64) -> usize {
        let stage = self.ramp.iter().find(|(until, _)| step < *until);
        stage.map_or(self.rows_per_slot, |&(_, rows)| rows)
    }

    /// Rows of a slot in all steps before `step`.
    fn rows_before(&self, step: u64) -> u128 {
        let (mut rows, mut start) = (0, 0);
        for &(until, of_slot) in &self.ramp {
            let end = until.min(step);
            rows += u128::from(end.saturating_sub(start)) * of_slot as u128;
            start = end;
        }
        rows + u128::from(step - start) * self.rows_per_slot as u128
    }

    /// The samples of slot `slot` in step `step`, in the order of its rows.
    pub fn samples(&self, step: u64, slot: usize) -> Vec<Sample> {
        assert!(slot < self.slots, "slot {slot} of {}", self.slots);
        let rows = self.rows_per_slot(step) as u128;
        let first = self.rows_before(step) * self.slots as u128 + slot as u128 * rows;
        let windows = u128::from(self.windows);
        let mut current: Option<(u64, u64, Permutation)> = None;
        (first..first + rows)
            .map(|sample| {
                let (epoch, position) = ((sample / windows) as u64, (sample % windows) as u64);
                let (_, phase, permutation) = match &mut current {
                    Some(known) if known.0 == epoch => known,
                    stale => stale.insert(self.epoch(epoch)),
                };
                let window = permutation.apply(position);
                Sample {
                    epoch,
                    window,
                    start: *phase + window * self.context as u64,
                }
            })
            .collect()
    }

    fn epoch(&self, epoch: u64) -> (u64, u64, Permutation) {
        let mut stream = Stream::new(self.seed, Purpose::Order, &[epoch]);
        let phase = stream.below(self.phases);
        (epoch, phase, Permutation::new(self.windows, &mut stream))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_epoch_visits_every_window_once(
            seed: u64, tokens in 20u64..700, context in 1usize..12, slots in 1usize..6, rows in 1usize..5
        ) {
            let order = SampleOrder::new(seed, tokens, context, slots, rows).unwrap();
            let steps = 3 * order.windows() / (slots * rows) as u64 + 2;
            let all: Vec<Sample> =
                (0..steps).flat_map(|t| (0..slots).map(move |v| (t, v))).flat_map(|(t, v)| order.samples(t, v)).collect();
            for epoch in 0..3 {
                let of_epoch: Vec<&Sample> = all.iter().filter(|sample| sample.epoch == epoch).collect();
                let windows: BTreeSet<u64> = of_epoch.iter().map(|sample| sample.window).collect();
                prop_assert_eq!(of_epoch.len() as u64, order.windows());
                prop_assert_eq!(windows.len() as u64, order.windows());
                // One phase for the whole epoch: windows do not overlap, so slots are disjoint.
                let starts: Vec<u64> = of_epoch.iter().map(|s| s.start - s.window * context as u64).collect();
                prop_assert!(starts.iter().all(|phase| phase == &starts[0]));
            }
            prop_assert!(all.iter().all(|sample| sample.start + (context as u64) < tokens));
        }

        #[test]
        fn a_slot_does_not_depend_on_who_asks_or_how_slots_are_cut(seed: u64, step in 0u64..1 << 40, slots in 1usize..9) {
            let whole = SampleOrder::new(seed, 5000, 7, 1, slots * 2).unwrap();
            let cut = SampleOrder::new(seed, 5000, 7, slots, 2).unwrap();
            let joined: Vec<Sample> = (0..slots).rev().map(|v| cut.samples(step, v)).rev().flatten().collect();
            prop_assert_eq!(whole.samples(step, 0), joined);
        }
    }

    #[test]
    fn a_batch_that_grows_repeats_and_skips_nothing() {
        let plain = SampleOrder::new(3, 10_000, 16, 1, 1).unwrap();
        let ramp = vec![(2, 1), (5, 2)];
        let grows = SampleOrder::new(3, 10_000, 16, 2, 4)
            .unwrap()
            .with_ramp(ramp);
        let all = |order: &SampleOrder, steps: u64| -> Vec<Sample> {
            let slots = (0..steps).flat_map(|t| (0..order.slots()).map(move |v| (t, v)));
            slots.flat_map(|(t, v)| order.samples(t, v)).collect()
        };
        // 2 × 2 × 1, 3 × 2 × 2, 4 × 2 × 4
        assert_eq!(all(&grows, 9), all(&plain, 4 + 12 + 32));
        let rows: Vec<usize> = [0, 1, 2, 4, 5, 9]
            .map(|step| grows.rows_per_slot(step))
            .into();
        assert_eq!(rows, [1, 1, 2, 2, 4, 4]);
    }

    #[test]
    fn epochs_differ_in_order_and_phase() {
        let order = SampleOrder::new(3, 10_000, 64, 1, 1).unwrap();
        let epoch = |e: u64| {
            (0..order.windows())
                .map(|t| order.samples(e * order.windows() + t, 0)[0].start)
                .collect::<Vec<_>>()
        };
        assert_ne!(epoch(0), epoch(1));
        let phases: BTreeSet<u64> = (0..20)
            .map(|e| epoch(e).iter().min().unwrap() % 64)
            .collect();
        assert!(phases.len() > 8, "{phases:?}");
    }

    #[test]
    fn the_order_is_pinned() {
        let order = SampleOrder::new(1337, 1_003_854, 64, 4, 3).unwrap();
        let starts: Vec<u64> = order
            .samples(7, 2)
            .iter()
            .map(|sample| sample.start)
            .collect();
        assert_eq!(
            (order.windows(), starts),
            (15684, vec![434_663, 605_031, 477_415])
        );
    }

    #[test]
    fn a_corpus_of_one_window_works_and_a_shorter_one_says_what_fits() {
        let order = SampleOrder::new(1, 9, 8, 1, 2).unwrap();
        assert_eq!((order.windows(), order.samples(5, 0)[1].start), (1, 0));
        let error = SampleOrder::new(1, 8, 8, 1, 2).unwrap_err().to_string();
        assert_eq!(
            error,
            "data.context: a window of 8 tokens needs 9 tokens, but the training text has only 8; allowed here: 1 to 7"
        );
    }
}
