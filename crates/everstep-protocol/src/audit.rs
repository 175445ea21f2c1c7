//! Audits: which slots are computed twice, and what follows when the digests differ.
//!
//! Which slots are audited is a counter-based draw, so everybody knows it without being told. The gradient of an audited slot that
//! counts, and at least one more that does not, are compared by digest before the step is decided.
//!
//! A device that lies in a share `f` of its slots is caught the first time that one of those is audited: with audit share `a` and
//! `n` slots of a step on that device, after `1 / (a * f)` of its slots on average, which is `1 / (a * f * n)` steps; the chance that it is still
//! undetected after `k` steps is `(1 - a * f)^(n * k)`. Flips in 1 % of the slots and audits of 10 % find it after 1000 of its slots.
//! What it spoiled in slots that were not audited stays: only with share 1 is nothing ever committed that one device alone says.

use crate::ids::{Member, Step};
use crate::message::Digest;
use crate::random::{Purpose, Stream};

/// The share of slots that are audited, as every member knows it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AuditPlan {
    /// Seed of the draws.
    pub seed: u64,
    /// Share of slots, 0 to 1.
    pub share: f64,
}

impl AuditPlan {
    /// Whether the slot is audited: a pure function of the plan, the step and the slot.
    pub fn covers(&self, step: Step, slot: u32) -> bool {
        self.share > 0.0
            && Stream::new(self.seed, Purpose::Audit, &[step.0, u64::from(slot)]).unit_f64()
                < self.share
    }
}

/// What the digests of one slot say so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Two workers agree, or two computations of the only one.
    Agreed,
    /// Another computation is needed.
    Open {
        /// Whether digests differ.
        mismatch: bool,
    },
    /// These lied.
    Guilty {
        /// Each culprit and what it said.
        culprits: Vec<(Member, Digest)>,
        /// What the others agree on; `None` if the culprits only contradicted themselves.
        truth: Option<Digest>,
    },
}

/// Judges the digests of one slot, each from its own computation. `num_workers`: workers that could be asked now.
///
/// An honest worker says the same whenever it is asked. So a worker is guilty if two others (lives of one worker are not two) agree on
/// something else, more of them than on anything else, or if it contradicts itself. One against one is not enough.
pub fn judge(testimonies: &[(Member, Digest)], num_workers: usize) -> Verdict {
    let mut digests: Vec<Digest> = testimonies.iter().map(|(_, digest)| *digest).collect();
    digests.sort();
    digests.dedup();
    let supporters = |digest: &Digest| {
        let mut workers: Vec<u32> = testimonies
            .iter()
            .filter(|(_, said)| said == digest)
            .map(|(worker, _)| worker.index)
            .collect();
        workers.sort_unstable();
        workers.dedup();
        workers.len()
    };
    if let [only] = digests.as_slice() {
        let enough = supporters(only) >= 2 || (num_workers <= 1 && testimonies.len() >= 2);
        return if enough {
            Verdict::Agreed
        } else {
            Verdict::Open { mismatch: false }
        };
    }
    if digests.is_empty() {
        return Verdict::Open { mismatch: false };
    }
    let mut ranked: Vec<(usize, Digest)> = digests
        .iter()
        .map(|digest| (supporters(digest), *digest))
        .collect();
    ranked.sort();
    let truth = match ranked.as_slice() {
        [.., (second, _), (first, digest)] if *first >= 2 && first > second => Some(*digest),
        _ => None,
    };
    let contradicts_itself = |worker: &Member| {
        let mut said = testimonies
            .iter()
            .filter(|(other, _)| other.same_actor(worker))
            .map(|(_, digest)| digest);
        let first = said.next();
        said.any(|digest| Some(digest) != first)
    };
    let mut culprits: Vec<(Member, Digest)> = testimonies
        .iter()
        .filter(|(worker, digest)| match truth {
            Some(truth) => *digest != truth,
            None => contradicts_itself(worker),
        })
        .copied()
        .collect();
    culprits.sort();
    culprits.dedup_by_key(|(worker, _)| worker.index);
    if culprits.is_empty() {
        Verdict::Open { mismatch: true }
    } else {
        Verdict::Guilty { culprits, truth }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{reborn, worker};

    fn said(worker: Member, digest: u64) -> (Member, Digest) {
        (worker, Digest([digest, 0]))
    }

    fn guilty(culprits: &[(Member, Digest)], truth: Option<u64>) -> Verdict {
        Verdict::Guilty {
            culprits: culprits.to_vec(),
            truth: truth.map(|digest| Digest([digest, 0])),
        }
    }

    const OPEN: Verdict = Verdict::Open { mismatch: false };
    const DISPUTED: Verdict = Verdict::Open { mismatch: true };

    #[test]
    fn the_share_is_met_and_the_draw_is_pure() {
        let plan = AuditPlan {
            seed: 3,
            share: 0.1,
        };
        let count = (0..1000)
            .flat_map(|step| (0..10).map(move |slot| (Step(step), slot)))
            .filter(|(step, slot)| plan.covers(*step, *slot))
            .count();
        assert!((900..1100).contains(&count), "{count}");
        let all = AuditPlan { share: 1.0, ..plan };
        assert!((0..1000).all(|slot| all.covers(Step(5), slot)));
        assert!(!AuditPlan::default().covers(Step(0), 0));
    }

    #[test]
    fn two_workers_or_the_only_one_twice_must_agree() {
        assert_eq!(judge(&[], 2), OPEN);
        assert_eq!(judge(&[said(worker(0), 1)], 2), OPEN);
        assert_eq!(
            judge(&[said(worker(0), 1), said(worker(1), 1)], 2),
            Verdict::Agreed
        );
        let twice = [said(worker(0), 1), said(reborn(worker(0)), 1)];
        assert_eq!(judge(&twice, 2), OPEN, "lives of one worker are one device");
        assert_eq!(judge(&twice, 1), Verdict::Agreed);
    }

    #[test]
    fn the_majority_names_the_culprit() {
        let two = vec![said(worker(0), 1), said(worker(1), 2)];
        assert_eq!(judge(&two, 3), DISPUTED, "one against one");
        let mut three = two.clone();
        three.push(said(worker(2), 1));
        assert_eq!(judge(&three, 3), guilty(&[said(worker(1), 2)], Some(1)));
        let mut different = two.clone();
        different.push(said(worker(2), 3));
        assert_eq!(judge(&different, 3), DISPUTED, "three different digests");
        let mut even = three.clone();
        even.push(said(worker(3), 2));
        assert_eq!(judge(&even, 4), DISPUTED, "two against two");
    }

    #[test]
    fn whoever_contradicts_itself_is_guilty() {
        let again = [said(worker(0), 1), said(worker(1), 2), said(worker(0), 1)];
        assert_eq!(
            judge(&again, 2),
            DISPUTED,
            "two devices that both stand by it"
        );
        let caught = [said(worker(0), 1), said(worker(1), 2), said(worker(1), 3)];
        assert_eq!(judge(&caught, 2), guilty(&[said(worker(1), 2)], None));
        // The second time it told the truth.
        let lucky = [said(worker(0), 1), said(worker(1), 2), said(worker(1), 1)];
        assert_eq!(judge(&lucky, 2), guilty(&[said(worker(1), 2)], Some(1)));
        let alone = [said(worker(0), 1), said(worker(0), 2)];
        assert_eq!(judge(&alone, 1), guilty(&[said(worker(0), 1)], None));
    }
}
