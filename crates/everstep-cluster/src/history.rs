//! A block's history as the manifest of a checkpoint keeps it: bits, not digits, so that it comes back as it was.

use everstep_protocol::policy::History;

const VERSION: &str = "h1";

/// Nothing for a history of nothing, so that runs without a policy have manifests without it.
pub(crate) fn to_text(history: &History) -> String {
    if *history == History::default() {
        return String::new();
    }
    let (mean, variance) = (history.loss_mean.to_bits(), history.loss_variance.to_bits());
    let (losses, skipped) = (history.num_losses, history.num_skipped);
    format!("{VERSION} {losses} {mean:016x} {variance:016x} {skipped}")
}

/// `None` for what this version did not write.
pub(crate) fn from_text(text: &str) -> Option<History> {
    if text.is_empty() {
        return Some(History::default());
    }
    let fields: Vec<&str> = text.split(' ').collect();
    let [VERSION, losses, mean, variance, skipped] = fields[..] else {
        return None;
    };
    let number = |hex: &str| u64::from_str_radix(hex, 16).ok().map(f64::from_bits);
    Some(History {
        num_losses: losses.parse().ok()?,
        loss_mean: number(mean)?,
        loss_variance: number(variance)?,
        num_skipped: skipped.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_comes_back() {
        let history = History {
            num_losses: 100,
            loss_mean: 0.1 + 0.2,
            loss_variance: f64::MIN_POSITIVE / 3.0,
            num_skipped: 2,
        };
        assert_eq!(from_text(&to_text(&history)), Some(history));
        assert_eq!(to_text(&History::default()), "");
        assert_eq!(from_text(""), Some(History::default()));
    }

    #[test]
    fn other_text_is_no_history() {
        let text = to_text(&History {
            num_losses: 1,
            ..History::default()
        });
        for end in 1..text.len() - 1 {
            assert_eq!(from_text(&text[..end]), None, "{}", &text[..end]);
        }
        for text in ["h2 1 0 0 0", "h1 x 0 0 0", "h1 1 0 0 0 0", "h1  0 0 0"] {
            assert_eq!(from_text(text), None, "{text}");
        }
    }
}
