//! What a run's metrics say about its loss.

use std::collections::BTreeMap;

use serde_json::Value;

/// A loss curve with what happened on the way. Losses are nats per token.
#[derive(Debug, Clone, Default)]
pub(crate) struct Curve {
    /// Step and training loss, in order of steps.
    pub(crate) train: Vec<(u64, f64)>,
    /// Step and held-out loss, in order of steps.
    pub(crate) validation: Vec<(u64, f64)>,
    /// Last step committed before a process was killed, and the process.
    pub(crate) kills: Vec<(u64, String)>,
    /// Loss of a model that knows only how often each token occurs.
    pub(crate) unigram_entropy: f64,
}

impl Curve {
    /// Reads lines of `metrics.jsonl` and of `events.jsonl`, whose evaluations are the held-out losses. A step that was computed
    /// again after a rollback counts as it was last written.
    pub(crate) fn new(rows: &[Value], kills: Vec<(u64, String)>, unigram_entropy: f64) -> Self {
        let (mut train, mut validation) = (BTreeMap::new(), BTreeMap::new());
        for row in rows {
            let Some(step) = row["step"].as_u64() else {
                continue;
            };
            let Some(loss) = row["loss"].as_f64() else {
                continue;
            };
            match row["kind"].as_str() {
                None => train.insert(step, loss),
                Some("evaluation") => validation.insert(step, loss),
                Some(_) => None,
            };
        }
        Self {
            train: train.into_iter().collect(),
            validation: validation.into_iter().collect(),
            kills,
            unigram_entropy,
        }
    }

    /// The training loss as a mean over the steps around each, which takes the batches' luck out of it.
    pub(crate) fn smooth(&self) -> Vec<(u64, f64)> {
        let reach = (self.train.len() / 80).clamp(0, 25);
        let mean = |index: usize| {
            // As far to one side as to the other, or a steep curve would be shifted at its ends.
            let reach = reach.min(index).min(self.train.len() - 1 - index);
            let part = &self.train[index - reach..=index + reach];
            part.iter().map(|(_, loss)| loss).sum::<f64>() / part.len() as f64
        };
        self.train
            .iter()
            .enumerate()
            .map(|(index, (step, _))| (*step, mean(index)))
            .collect()
    }

    /// Where the run ended: its last held-out loss, or the smoothed training loss if nothing was held out.
    pub(crate) fn last(&self) -> Option<f64> {
        self.validation
            .last()
            .copied()
            .or_else(|| self.smooth().last().copied())
            .map(|(_, loss)| loss)
    }

    /// The last step.
    pub(crate) fn steps(&self) -> u64 {
        self.train.last().map_or(0, |(step, _)| *step)
    }

    /// Lowest and highest loss that a picture must show, the entropy line included.
    pub(crate) fn range(&self) -> (f64, f64) {
        let losses = self
            .train
            .iter()
            .chain(&self.validation)
            .map(|(_, loss)| *loss)
            .filter(|loss| loss.is_finite());
        let (low, high) = losses.fold(
            (self.unigram_entropy, self.unigram_entropy),
            |(low, high), loss| (low.min(loss), high.max(loss)),
        );
        let margin = ((high - low) * 0.05).max(0.05);
        ((low - margin).max(0.0), high + margin)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::json;

    /// A run as it might look: falling loss with noise, held-out loss every 50 steps, two kills.
    pub(crate) fn example() -> Curve {
        let metrics: Vec<Value> = (1..=600u32)
            .flat_map(|step| {
                let loss = 3.1 + 5.6 * (-f64::from(step) / 90.0).exp();
                let noise = f64::from(step * 7919 % 101) / 101.0 - 0.5;
                let held_out = (step % 50 == 0)
                    .then(|| json!({"kind": "evaluation", "step": step, "loss": loss + 0.12}));
                std::iter::once(json!({"step": step, "loss": loss + 0.35 * noise})).chain(held_out)
            })
            .collect();
        Curve::new(
            &metrics,
            vec![(40, "worker-1".into()), (80, "shard-0".into())],
            6.9,
        )
    }

    #[test]
    fn metrics_are_read_and_smoothed() {
        let curve = example();
        assert_eq!(
            (curve.train.len(), curve.validation.len(), curve.steps()),
            (600, 12, 600)
        );
        assert!((curve.last().unwrap() - 3.22).abs() < 0.01);
        let spread = |points: &[(u64, f64)]| {
            let tail: Vec<f64> = points[500..580].iter().map(|(_, loss)| *loss).collect();
            tail.iter().copied().fold(f64::MIN, f64::max)
                - tail.iter().copied().fold(f64::MAX, f64::min)
        };
        assert!(spread(&curve.smooth()) < spread(&curve.train) / 2.0);
        let (low, high) = curve.range();
        assert!(low < 3.1 && high > 8.0);
    }

    #[test]
    fn a_step_that_was_repeated_counts_once() {
        let rows = [
            json!({"step": 2, "loss": 3.0}),
            json!({"step": 1, "loss": 4.0}),
            json!({"step": 2, "loss": 2.0}),
        ];
        assert_eq!(Curve::new(&rows, vec![], 1.0).train, [(1, 4.0), (2, 2.0)]);
    }
}
