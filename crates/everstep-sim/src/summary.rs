//! What a campaign of seeds showed.

use std::collections::BTreeMap;
use std::fmt;

use crate::coverage::Branch;
use crate::fault::Fault;
use crate::outcome::{Outcome, Recovery};

/// How often a kind happened in a campaign.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Seeds that saw it.
    pub seeds: u64,
    /// Occurrences.
    pub times: u64,
}

/// What a campaign showed.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Seeds run.
    pub num_seeds: u64,
    /// Wall time, in seconds.
    pub seconds: f64,
    /// Events handled.
    pub num_events: u64,
    /// Steps decided.
    pub num_decisions: u64,
    /// Slots leased again.
    pub slots_recomputed: u64,
    /// Seeds without any fault.
    pub num_undisturbed: u64,
    /// Faults that happened.
    pub faults: BTreeMap<Fault, Count>,
    /// Recoveries that happened.
    pub recoveries: BTreeMap<Recovery, Count>,
    /// Rare branches that were taken.
    pub branches: BTreeMap<Branch, Count>,
    /// Longest virtual time that a healed cluster took to finish, and its seed.
    pub slowest: (u64, u64),
    /// Whether all seeds ran one given plan, which need not meet everything.
    pub is_of_one_plan: bool,
    /// Failing seeds and what failed, in seed order.
    pub violations: Vec<(u64, String)>,
}

/// Campaigns of at least this many seeds must have seen everything.
pub const COVERAGE_SEEDS_MIN: u64 = 5000;

fn add<K: Ord>(counts: &mut BTreeMap<K, Count>, seen: BTreeMap<K, u64>) {
    for (kind, times) in seen {
        let count = counts.entry(kind).or_default();
        count.seeds += 1;
        count.times += times;
    }
}

fn merge<K: Ord>(counts: &mut BTreeMap<K, Count>, other: BTreeMap<K, Count>) {
    for (kind, count) in other {
        let mine = counts.entry(kind).or_default();
        mine.seeds += count.seeds;
        mine.times += count.times;
    }
}

fn table<K: fmt::Display>(
    f: &mut fmt::Formatter<'_>,
    title: &str,
    counts: &BTreeMap<K, Count>,
) -> fmt::Result {
    writeln!(f, "{title:<26} {:>9} {:>10}", "seeds", "times")?;
    for (kind, count) in counts {
        let kind = kind.to_string();
        writeln!(f, "{kind:<26} {:>9} {:>10}", count.seeds, count.times)?;
    }
    Ok(())
}

impl Summary {
    /// Adds a seed.
    pub fn add(&mut self, outcome: Outcome) {
        self.num_seeds += 1;
        self.num_events += outcome.num_events;
        self.num_decisions += outcome.num_decisions;
        self.slots_recomputed += outcome.slots_recomputed;
        self.num_undisturbed += u64::from(outcome.faults.is_empty());
        let healing_ms = outcome.virtual_ms.saturating_sub(outcome.healed_ms);
        self.slowest = self.slowest.max((healing_ms, outcome.seed));
        add(&mut self.faults, outcome.faults);
        add(&mut self.recoveries, outcome.recoveries);
        add(&mut self.branches, outcome.branches);
        if let Some(violation) = outcome.violation {
            self.violations.push((outcome.seed, violation));
        }
    }

    /// Adds another part of the same campaign.
    pub fn merge(&mut self, other: Summary) {
        self.num_seeds += other.num_seeds;
        self.num_events += other.num_events;
        self.num_decisions += other.num_decisions;
        self.slots_recomputed += other.slots_recomputed;
        self.num_undisturbed += other.num_undisturbed;
        self.slowest = self.slowest.max(other.slowest);
        merge(&mut self.faults, other.faults);
        merge(&mut self.recoveries, other.recoveries);
        merge(&mut self.branches, other.branches);
        self.violations.extend(other.violations);
        self.violations.sort();
    }

    /// Seeds per second of wall time.
    pub fn seeds_per_second(&self) -> f64 {
        self.num_seeds as f64 / self.seconds.max(1e-9)
    }

    /// Kinds of faults and recoveries that a campaign of this size should have seen and has not: a chaos test must not pass
    /// without chaos.
    pub fn unseen(&self) -> Vec<String> {
        if self.num_seeds < COVERAGE_SEEDS_MIN || self.is_of_one_plan {
            return Vec::new();
        }
        let faults = Fault::all()
            .filter(|fault| !self.faults.contains_key(fault))
            .map(|fault| fault.to_string());
        let recoveries = Recovery::ALL
            .iter()
            .filter(|recovery| !self.recoveries.contains_key(recovery))
            .map(Recovery::to_string);
        let branches = Branch::ALL
            .iter()
            .filter(|branch| {
                self.num_seeds >= branch.seeds_min() && !self.branches.contains_key(branch)
            })
            .map(Branch::to_string);
        faults.chain(recoveries).chain(branches).collect()
    }

    /// Whether every invariant held everywhere, and the campaign met what it must.
    pub fn passed(&self) -> bool {
        self.violations.is_empty() && self.unseen().is_empty()
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} seeds in {:.1} s: {:.0} seeds/s; {} events, {} decisions, {} slots leased again, {} seeds undisturbed",
            self.num_seeds,
            self.seconds,
            self.seeds_per_second(),
            self.num_events,
            self.num_decisions,
            self.slots_recomputed,
            self.num_undisturbed,
        )?;
        let (healing_ms, seed) = self.slowest;
        writeln!(
            f,
            "longest way from healing to the end: {healing_ms} virtual ms, in seed {seed}"
        )?;
        table(f, "fault", &self.faults)?;
        table(f, "recovery", &self.recoveries)?;
        table(f, "rare branch", &self.branches)?;
        for kind in self.unseen() {
            writeln!(f, "never happened: {kind}")?;
        }
        for (seed, violation) in self.violations.iter().take(20) {
            let of_plan = if self.is_of_one_plan {
                "--plan FILE "
            } else {
                ""
            };
            writeln!(
                f,
                "violation in seed {seed}: {violation}\n  replay: cargo xtask sim {of_plan}--seed {seed} --trace\n  shrink: cargo xtask sim {of_plan}--seed {seed} --minimise"
            )?;
        }
        write!(
            f,
            "{}",
            if self.passed() {
                "no violation"
            } else {
                "FAILED"
            }
        )
    }
}
