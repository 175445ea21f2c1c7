//! What becomes of a step whose gradient is not finite or whose loss is a spike. What it goes by is part of every block's state, which
//! replicas and checkpoints hold, so the verdict on a step is a pure function of the steps before it: the same under any leader, after any loss.

/// What the verdict on a step needs to know of the steps before it. The same in every block of a version.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct History {
    /// Losses in the mean and the variance, at most the window.
    pub num_losses: u32,
    /// Exponentially weighted mean of the losses of applied steps, in nats.
    pub loss_mean: f64,
    /// Their exponentially weighted variance.
    pub loss_variance: f64,
    /// Steps skipped in a row, up to now.
    pub num_skipped: u32,
}

/// The verdict on a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Its update is applied.
    Apply,
    /// It is skipped: its gradient or loss is not finite, or it has no tokens.
    NotFinite,
    /// It is skipped: its loss is a spike.
    Spike,
}

/// When a loss is a spike.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossPolicy {
    /// A loss that is more than this many standard deviations above the mean is a spike; 0: none is.
    pub spike_sd: f64,
    /// The mean and variance weigh losses with `2 / (window + 1)`, and before so many losses are known none is a spike.
    pub window: u32,
}

/// The standard deviation counts as at least this share of the mean: a loss that has hardly moved has hardly a deviation.
const SD_SHARE_MIN: f64 = 1e-3;

impl History {
    /// What a loss is compared with: the mean, and the standard deviation that counts.
    pub fn loss_sd(&self) -> f64 {
        self.loss_variance
            .sqrt()
            .max(SD_SHARE_MIN * self.loss_mean.abs())
    }
}

impl LossPolicy {
    /// The verdict on a step with this mean loss after `history`, and the history after it. A loss of a skipped step does not count, or
    /// one spike would make room for the next.
    pub fn judge(&self, history: &History, loss: f64, is_finite: bool) -> (Verdict, History) {
        let skipped = History {
            num_skipped: history.num_skipped.saturating_add(1),
            ..*history
        };
        if !is_finite {
            return (Verdict::NotFinite, skipped);
        }
        if self.spike_sd <= 0.0 {
            let mut next = *history;
            next.num_skipped = 0;
            return (Verdict::Apply, next);
        }
        let limit = history.loss_mean + self.spike_sd * history.loss_sd();
        if history.num_losses >= self.window.max(1) && loss > limit {
            return (Verdict::Spike, skipped);
        }
        (Verdict::Apply, self.count(history, loss))
    }

    /// One more loss. The first ones count alike, as in a plain mean.
    fn count(&self, history: &History, loss: f64) -> History {
        let window = self.window.max(1);
        let num_losses = history.num_losses.saturating_add(1).min(window);
        let weight = (2.0 / (f64::from(window) + 1.0)).max(1.0 / f64::from(num_losses));
        let deviation = loss - history.loss_mean;
        History {
            num_losses,
            loss_mean: history.loss_mean + weight * deviation,
            loss_variance: (1.0 - weight)
                * (history.loss_variance + weight * deviation * deviation),
            num_skipped: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: LossPolicy = LossPolicy {
        spike_sd: 6.0,
        window: 20,
    };

    fn after(losses: impl IntoIterator<Item = f64>) -> History {
        losses
            .into_iter()
            .fold(History::default(), |history, loss| {
                POLICY.judge(&history, loss, true).1
            })
    }

    #[test]
    fn nothing_is_a_spike_before_the_window_is_full() {
        let history = after((0..19).map(|step| 4.0 - f64::from(step) * 0.01));
        assert_eq!(POLICY.judge(&history, 1e6, true).0, Verdict::Apply);
        let history = after((0..20).map(|step| 4.0 - f64::from(step) * 0.01));
        assert_eq!(POLICY.judge(&history, 1e6, true).0, Verdict::Spike);
        assert_eq!(
            POLICY.judge(&history, 0.0, true).0,
            Verdict::Apply,
            "good news"
        );
    }

    #[test]
    fn skipped_steps_leave_mean_and_variance_and_are_counted_in_a_row() {
        let before = after((0..50).map(|step| 3.0 + f64::from(step % 5) * 0.1));
        let (verdict, after_spike) = POLICY.judge(&before, 9.0, true);
        assert_eq!(verdict, Verdict::Spike);
        let (verdict, after_nan) = POLICY.judge(&after_spike, f64::INFINITY, false);
        assert_eq!(verdict, Verdict::NotFinite);
        assert_eq!(
            after_nan,
            History {
                num_skipped: 2,
                ..before
            }
        );
        let (verdict, applied) = POLICY.judge(&after_nan, 3.1, true);
        assert_eq!((verdict, applied.num_skipped), (Verdict::Apply, 0));
    }

    #[test]
    fn a_loss_that_does_not_move_has_room_of_a_thousandth() {
        let history = after([2.0; 40]);
        assert_eq!((history.loss_mean, history.loss_variance), (2.0, 0.0));
        assert_eq!(POLICY.judge(&history, 2.011, true).0, Verdict::Apply);
        assert_eq!(POLICY.judge(&history, 2.013, true).0, Verdict::Spike);
    }

    #[test]
    fn without_a_threshold_only_what_is_not_finite_is_skipped() {
        let off = LossPolicy::default();
        let (verdict, history) = off.judge(&History::default(), 1e30, true);
        assert_eq!((verdict, history), (Verdict::Apply, History::default()));
        let (verdict, history) = off.judge(&history, f64::INFINITY, false);
        assert_eq!((verdict, history.num_skipped), (Verdict::NotFinite, 1));
    }
}
