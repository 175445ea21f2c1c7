//! Which checkpoints are kept: a pure function of what there is.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// What to keep. The newest intact checkpoint and pinned ones are kept whatever it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// The newest so many intact checkpoints; 0 counts as 1. With 1 nothing is left to fall back to.
    pub last: usize,
    /// Those of every step that this number divides.
    pub every_steps: Option<u64>,
    /// So many with the lowest evaluation loss; of equal ones the newer.
    pub best: usize,
}

impl Retention {
    /// Keeps the newest `last` and nothing else.
    pub fn last(last: usize) -> Self {
        Self {
            last,
            every_steps: None,
            best: 0,
        }
    }

    /// The steps to keep, each with all reasons.
    ///
    /// Damaged checkpoints satisfy no rule. They stay as long as they are newer than the oldest of the last ones, so that somebody can
    /// look at them; without an intact one everything stays.
    pub fn kept(&self, checkpoints: &[RetentionInfo]) -> BTreeMap<u64, BTreeSet<KeepReason>> {
        let mut kept: BTreeMap<u64, BTreeSet<KeepReason>> = BTreeMap::new();
        let mut keep = |step: u64, reason: KeepReason| {
            kept.entry(step).or_default().insert(reason);
        };
        let mut intact: Vec<&RetentionInfo> =
            checkpoints.iter().filter(|info| !info.damaged).collect();
        intact.sort_by_key(|info| std::cmp::Reverse(info.step));
        let last = &intact[..self.last.max(1).min(intact.len())];
        for info in last {
            keep(info.step, KeepReason::Last);
        }
        for info in &intact {
            let divides = |every: u64| every > 0 && info.step.is_multiple_of(every);
            if self.every_steps.is_some_and(divides) {
                keep(info.step, KeepReason::Every);
            }
        }
        let mut scored: Vec<(f64, u64)> = intact
            .iter()
            .filter_map(|info| Some((info.evaluation_loss?, info.step)))
            .collect();
        // The sort is stable, and the newer ones come first.
        scored.sort_by(|a, b| a.0.total_cmp(&b.0));
        for (_, step) in scored.into_iter().take(self.best) {
            keep(step, KeepReason::Best);
        }
        let oldest = last.last().map(|info| info.step);
        for info in checkpoints {
            if info.pinned {
                keep(info.step, KeepReason::Pinned);
            }
            if info.damaged && oldest.is_none_or(|oldest| info.step > oldest) {
                keep(info.step, KeepReason::Evidence);
            }
        }
        kept
    }
}

/// What [`Retention`] must know of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RetentionInfo {
    /// The step.
    pub step: u64,
    /// The loss of its evaluation, if one was recorded.
    pub evaluation_loss: Option<f64>,
    /// Whether it is pinned.
    pub pinned: bool,
    /// Whether it is known to be damaged.
    pub damaged: bool,
}

/// Why a checkpoint is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeepReason {
    /// It is one of the newest.
    Last,
    /// Its step is a multiple of [`Retention::every_steps`].
    Every,
    /// Its evaluation loss is one of the lowest.
    Best,
    /// It is pinned.
    Pinned,
    /// It is damaged and recent: somebody may want to look at it.
    Evidence,
}

impl fmt::Display for KeepReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Last => "last",
            Self::Every => "every",
            Self::Best => "best",
            Self::Pinned => "pinned",
            Self::Evidence => "damaged",
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn checkpoints() -> impl Strategy<Value = Vec<RetentionInfo>> {
        let info = (
            proptest::option::of(0..6u8),
            prop::bool::weighted(0.2),
            prop::bool::weighted(0.2),
        );
        prop::collection::btree_map(0..60u64, info, 0..20).prop_map(|steps| {
            let info =
                |(step, (loss, pinned, damaged)): (u64, (Option<u8>, bool, bool))| RetentionInfo {
                    step,
                    evaluation_loss: loss.map(f64::from),
                    pinned,
                    damaged,
                };
            steps.into_iter().map(info).collect()
        })
    }

    fn retention() -> impl Strategy<Value = Retention> {
        (0..5usize, proptest::option::of(0..9u64), 0..4usize).prop_map(
            |(last, every_steps, best)| Retention {
                last,
                every_steps,
                best,
            },
        )
    }

    proptest! {
        #[test]
        fn each_rule_gets_what_it_asks_for(infos in checkpoints(), retention in retention()) {
            let kept = retention.kept(&infos);
            let intact: Vec<&RetentionInfo> = infos.iter().filter(|info| !info.damaged).collect();
            let of = |reason: KeepReason| -> Vec<u64> {
                kept.iter().filter(|(_, reasons)| reasons.contains(&reason)).map(|(step, _)| *step).collect()
            };
            let newest: Vec<u64> = {
                let from = intact.len() - retention.last.max(1).min(intact.len());
                intact[from..].iter().map(|info| info.step).collect()
            };
            prop_assert_eq!(of(KeepReason::Last), newest.clone());
            let every: Vec<u64> = intact
                .iter()
                .map(|info| info.step)
                .filter(|step| retention.every_steps.is_some_and(|every| every > 0 && step % every == 0))
                .collect();
            prop_assert_eq!(of(KeepReason::Every), every);
            let pinned: Vec<u64> = infos.iter().filter(|info| info.pinned).map(|info| info.step).collect();
            prop_assert_eq!(of(KeepReason::Pinned), pinned);

            // Nobody who is not among the best is better than one who is.
            let best = of(KeepReason::Best);
            let scored: Vec<(f64, u64)> =
                intact.iter().filter_map(|info| Some((info.evaluation_loss?, info.step))).collect();
            prop_assert_eq!(best.len(), retention.best.min(scored.len()));
            let (inside, outside): (Vec<_>, Vec<_>) = scored.into_iter().partition(|(_, step)| best.contains(step));
            for (loss, step) in &inside {
                for (other_loss, other) in &outside {
                    prop_assert!(loss < other_loss || (loss == other_loss && step > other));
                }
            }
            for info in infos.iter().filter(|info| info.damaged && !info.pinned) {
                let is_recent = newest.first().is_none_or(|oldest| info.step > *oldest);
                prop_assert_eq!(kept.contains_key(&info.step), is_recent);
            }
        }

        #[test]
        fn the_newest_intact_stays_and_pruning_again_removes_nothing(
            infos in checkpoints(), retention in retention(),
        ) {
            let kept = retention.kept(&infos);
            let newest = infos.iter().rfind(|info| !info.damaged);
            prop_assert!(newest.is_none_or(|info| kept.contains_key(&info.step)));
            let left: Vec<RetentionInfo> =
                infos.iter().filter(|info| kept.contains_key(&info.step)).copied().collect();
            prop_assert_eq!(retention.kept(&left), kept);
        }

        #[test]
        fn the_order_of_the_list_and_looser_rules_take_nothing_away(
            infos in checkpoints(), retention in retention(),
        ) {
            let kept = retention.kept(&infos);
            let mut reversed = infos.clone();
            reversed.reverse();
            prop_assert_eq!(retention.kept(&reversed), kept.clone());
            let looser = Retention { last: retention.last + 1, best: retention.best + 1, ..retention };
            let more = looser.kept(&infos);
            let lost = kept.iter().find(|(step, reasons)| {
                !reasons.contains(&KeepReason::Evidence) && !more.contains_key(step)
            });
            prop_assert_eq!(lost, None);
        }
    }
}
