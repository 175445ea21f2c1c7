//! The choice of a token from logits. Plain numbers, the same on every machine.

use everstep_protocol::random::Stream;

use crate::ModelError;

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 always takes the likeliest token.
    pub temperature: f64,
    /// Only the likeliest tokens that together have at least this probability; 1 for all.
    pub top_p: f64,
    /// Only this many of the likeliest tokens; 0 for all.
    pub top_k: usize,
}

impl Default for Sampling {
    /// The model's own distribution.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
        }
    }
}

impl Sampling {
    /// The likeliest token, always.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
    };

    /// Whether the options can be used.
    ///
    /// # Errors
    /// [`ModelError::Option`] names the first that cannot.
    pub fn check(&self) -> Result<(), ModelError> {
        let bad = |field, value: f64, allowed| ModelError::Option {
            field,
            value: value.to_string(),
            allowed,
        };
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(bad("temperature", self.temperature, "0 or more"));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(bad("top_p", self.top_p, "above 0, up to 1"));
        }
        Ok(())
    }

    /// Chooses a token. Takes one draw from `stream`, or none if the temperature is 0.
    ///
    /// Of equal logits the lower token counts as the likelier.
    ///
    /// # Errors
    /// [`ModelError::NotFinite`] if there are no logits or one is not finite; [`ModelError::Option`] as [`Self::check`].
    pub fn choose(&self, logits: &[f32], stream: &mut Stream) -> Result<i64, ModelError> {
        self.check()?;
        if logits.is_empty() || !logits.iter().all(|logit| logit.is_finite()) {
            return Err(ModelError::NotFinite);
        }
        let mut order: Vec<usize> = (0..logits.len()).collect();
        let likelier = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
        let kept = match self.top_k {
            _ if self.temperature == 0.0 => 1,
            0 => logits.len(),
            top_k => top_k.min(logits.len()),
        };
        if kept < order.len() {
            order.select_nth_unstable_by(kept - 1, likelier);
            order.truncate(kept);
        }
        order.sort_unstable_by(likelier);
        if kept == 1 {
            return Ok(order[0] as i64);
        }
        let likeliest = f64::from(logits[order[0]]);
        let weights: Vec<f64> = order
            .iter()
            .map(|&token| libm::exp((f64::from(logits[token]) - likeliest) / self.temperature))
            .collect();
        Ok(order[self.place(&weights, stream.unit_f64())] as i64)
    }

    /// The index that `draw`, in `[0, 1)`, falls on among descending weights.
    fn place(&self, weights: &[f64], draw: f64) -> usize {
        let total: f64 = weights.iter().sum();
        let mut nucleus = 0.0;
        let mut count = 0;
        for weight in weights {
            nucleus += weight;
            count += 1;
            if nucleus >= self.top_p * total {
                break;
            }
        }
        let mut left = draw * nucleus;
        for (index, weight) in weights[..count].iter().enumerate() {
            left -= weight;
            if left < 0.0 {
                return index;
            }
        }
        count - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use everstep_protocol::random::Purpose;

    fn counts(sampling: Sampling, logits: &[f32]) -> Vec<usize> {
        let mut stream = Stream::new(1, Purpose::Sampling, &[]);
        let mut counts = vec![0; logits.len()];
        for _ in 0..4000 {
            counts[sampling.choose(logits, &mut stream).unwrap() as usize] += 1;
        }
        counts
    }

    #[test]
    fn frequencies_follow_the_distribution() {
        // Probabilities 1/2, 1/8, 3/8.
        let logits = [4.0f32.ln(), 0.0, 3.0f32.ln()];
        let seen = counts(Sampling::default(), &logits);
        for (seen, expected) in seen.iter().zip([2000usize, 500, 1500]) {
            assert!(seen.abs_diff(expected) < 150, "{seen} {expected}");
        }
        // At temperature 1/2 the odds are squared: 16, 1, 9.
        let cold = counts(
            Sampling {
                temperature: 0.5,
                ..Sampling::default()
            },
            &logits,
        );
        assert!(cold[0].abs_diff(4000 * 16 / 26) < 150, "{cold:?}");
    }

    #[test]
    fn cuts_keep_only_the_likeliest() {
        let logits = [4.0f32.ln(), 0.0, 3.0f32.ln()];
        assert_eq!(
            counts(
                Sampling {
                    top_k: 2,
                    ..Sampling::default()
                },
                &logits
            )[1],
            0
        );
        assert_eq!(
            counts(
                Sampling {
                    top_p: 0.8,
                    ..Sampling::default()
                },
                &logits
            )[1],
            0
        );
        assert_eq!(
            counts(
                Sampling {
                    top_p: 0.4,
                    ..Sampling::default()
                },
                &logits
            ),
            [4000, 0, 0]
        );
        assert_eq!(counts(Sampling::GREEDY, &[1.0, 3.0, 3.0]), [0, 4000, 0]);
        assert!(
            counts(
                Sampling {
                    top_k: 9,
                    ..Sampling::default()
                },
                &logits
            )[1] > 0
        );
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let mut stream = Stream::new(1, Purpose::Sampling, &[]);
        assert!(matches!(
            Sampling::default().choose(&[f32::NAN, 1.0], &mut stream),
            Err(ModelError::NotFinite)
        ));
        assert!(matches!(
            Sampling::default().choose(&[], &mut stream),
            Err(ModelError::NotFinite)
        ));
        let error = Sampling {
            top_p: 0.0,
            ..Sampling::default()
        }
        .check()
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            "top_p=`0` is not allowed; allowed: above 0, up to 1"
        );
        let error = Sampling {
            temperature: -1.0,
            ..Sampling::default()
        }
        .check()
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            "temperature=`-1` is not allowed; allowed: 0 or more"
        );
    }
}
