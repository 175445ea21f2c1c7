//! What a seed, and a campaign of seeds, showed.

use std::collections::BTreeMap;
use std::fmt;

use crate::scenario::Fault;

/// Ways in which the protocol recovered. Every one must occur in a campaign.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Recovery {
    /// Slots of a lost worker were leased again.
    SlotsReleased,
    /// Slots of a slow worker were leased a second time.
    SlotsDoubled,
    /// A backup became primary.
    ShardPromoted,
    /// A joining replica was seeded and became a backup.
    BackupSeeded,
    /// Blocks were declared to have fewer replicas than configured.
    Degraded,
    /// The run went back to a committed checkpoint, or to its initial weights.
    Rollback,
    /// A later leader went on from what the shards held.
    Resumed,
    /// A leader learned that a later epoch exists.
    Deposed,
    /// A member was told that it had been declared lost.
    Expelled,
    /// A checkpoint was committed.
    CheckpointCommitted,
    /// A checkpoint could not be completed.
    CheckpointAbandoned,
    /// A process loaded a checkpoint other than the initial weights.
    CheckpointLoaded,
}

impl Recovery {
    /// All kinds.
    pub const ALL: [Recovery; 12] = [
        Recovery::SlotsReleased,
        Recovery::SlotsDoubled,
        Recovery::ShardPromoted,
        Recovery::BackupSeeded,
        Recovery::Degraded,
        Recovery::Rollback,
        Recovery::Resumed,
        Recovery::Deposed,
        Recovery::Expelled,
        Recovery::CheckpointCommitted,
        Recovery::CheckpointAbandoned,
        Recovery::CheckpointLoaded,
    ];
}

impl fmt::Display for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What one seed showed.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// The first invariant that did not hold, and how.
    pub violation: Option<String>,
    /// Virtual time until the last process was done.
    pub virtual_ms: u64,
    /// Events handled.
    pub num_events: u64,
    /// Steps decided, repeats included.
    pub num_decisions: u64,
    /// Slots leased again.
    pub slots_recomputed: u64,
    /// How often each fault happened.
    pub faults: BTreeMap<Fault, u64>,
    /// How often each recovery happened.
    pub recoveries: BTreeMap<Recovery, u64>,
}

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
    /// Failing seeds and what failed, in seed order.
    pub violations: Vec<(u64, String)>,
}

/// Campaigns of at least this many seeds must have seen everything.
pub const COVERAGE_SEEDS_MIN: u64 = 2000;

impl Summary {
    /// Adds a seed.
    pub fn add(&mut self, outcome: Outcome) {
        self.num_seeds += 1;
        self.num_events += outcome.num_events;
        self.num_decisions += outcome.num_decisions;
        self.slots_recomputed += outcome.slots_recomputed;
        self.num_undisturbed += u64::from(outcome.faults.is_empty());
        for (fault, times) in outcome.faults {
            let count = self.faults.entry(fault).or_default();
            count.seeds += 1;
            count.times += times;
        }
        for (recovery, times) in outcome.recoveries {
            let count = self.recoveries.entry(recovery).or_default();
            count.seeds += 1;
            count.times += times;
        }
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
        for (fault, count) in other.faults {
            let mine = self.faults.entry(fault).or_default();
            mine.seeds += count.seeds;
            mine.times += count.times;
        }
        for (recovery, count) in other.recoveries {
            let mine = self.recoveries.entry(recovery).or_default();
            mine.seeds += count.seeds;
            mine.times += count.times;
        }
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
        if self.num_seeds < COVERAGE_SEEDS_MIN {
            return Vec::new();
        }
        let faults = Fault::ALL
            .iter()
            .filter(|fault| !self.faults.contains_key(fault))
            .map(Fault::to_string);
        let recoveries = Recovery::ALL
            .iter()
            .filter(|recovery| !self.recoveries.contains_key(recovery))
            .map(Recovery::to_string);
        faults.chain(recoveries).collect()
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
        writeln!(f, "{:<22} {:>9} {:>10}", "fault", "seeds", "times")?;
        for (fault, count) in &self.faults {
            writeln!(
                f,
                "{:<22} {:>9} {:>10}",
                fault.to_string(),
                count.seeds,
                count.times
            )?;
        }
        writeln!(f, "{:<22} {:>9} {:>10}", "recovery", "seeds", "times")?;
        for (recovery, count) in &self.recoveries {
            writeln!(
                f,
                "{:<22} {:>9} {:>10}",
                recovery.to_string(),
                count.seeds,
                count.times
            )?;
        }
        for kind in self.unseen() {
            writeln!(f, "never happened: {kind}")?;
        }
        for (seed, violation) in self.violations.iter().take(20) {
            writeln!(
                f,
                "violation in seed {seed}: {violation}\n  replay: cargo xtask sim --seed {seed} --trace"
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
