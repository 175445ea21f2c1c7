//! Shrinks a failing run: fewer faults, then a smaller cluster, as long as it fails in the same way.

use std::fmt;

use everstep_protocol::Member;

use crate::outcome::Outcome;
use crate::plan::{Moment, Plan, Target};

/// Leaving something out changes what meets what, so each candidate is tried with this many seeds.
const SEEDS_PER_CANDIDATE: u64 = 6;
/// Runs that a search may take.
const RUNS_MAX: u64 = 20_000;

/// The smallest failing run that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Minimal {
    /// Its plan.
    pub plan: Plan,
    /// Its seed.
    pub seed: u64,
    /// What does not hold.
    pub violation: String,
    /// Runs that the search took.
    pub num_runs: u64,
}

impl fmt::Display for Minimal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "# {}", self.violation)?;
        writeln!(
            f,
            "# smallest of {} runs; write it to a file and replay it: cargo xtask sim --plan FILE --seed {} --trace",
            self.num_runs, self.seed
        )?;
        write!(f, "{}", self.plan)
    }
}

/// The invariant that a violation names.
fn class(violation: &str) -> &str {
    violation.split(": ").nth(1).unwrap_or(violation)
}

struct Search<'a> {
    run: &'a dyn Fn(&Plan, u64) -> Outcome,
    best: Minimal,
}

/// Shrinks a run that fails; `None` if it does not.
pub fn minimise(plan: &Plan, seed: u64) -> Option<Minimal> {
    minimise_with(plan, seed, &crate::run_plan)
}

pub(crate) fn minimise_with(
    plan: &Plan,
    seed: u64,
    run: &dyn Fn(&Plan, u64) -> Outcome,
) -> Option<Minimal> {
    let outcome = run(plan, seed);
    let violation = outcome.violation.clone()?;
    let mut search = Search {
        run,
        best: Minimal {
            plan: plan.clone(),
            seed,
            violation,
            num_runs: 1,
        },
    };
    search.adopt(explicit(plan, &outcome));
    loop {
        let before = search.best.plan.clone();
        search.fewer_faults();
        search.smaller();
        if search.best.plan == before || search.best.num_runs >= RUNS_MAX {
            return Some(search.best);
        }
    }
}

/// The plan with every strike that happened at its time and on its processes, whatever it had waited for.
fn explicit(plan: &Plan, outcome: &Outcome) -> Plan {
    let mut explicit = plan.clone();
    explicit.faults.retain(|fault| {
        fault.action.is_condition()
            && !matches!(fault.action, crate::plan::Action::Aftershock { .. })
    });
    let actor = |member: &Member| Target::Actor(member.role, member.index);
    for strike in &outcome.strikes {
        for member in &strike.members {
            explicit.push(
                strike.action.clone(),
                actor(member),
                Moment::At(strike.at_ms),
            );
        }
    }
    explicit
}

impl Search<'_> {
    /// Keeps the candidate if it fails like the original.
    fn adopt(&mut self, candidate: Plan) -> bool {
        if candidate == self.best.plan || candidate.check().is_err() {
            return false;
        }
        for offset in 0..SEEDS_PER_CANDIDATE {
            if self.best.num_runs >= RUNS_MAX {
                return false;
            }
            self.best.num_runs += 1;
            let seed = self.best.seed.wrapping_add(offset);
            let outcome = (self.run)(&candidate, seed);
            if let Some(violation) = outcome.violation
                && class(&violation) == class(&self.best.violation)
            {
                self.best.plan = candidate;
                self.best.seed = seed;
                self.best.violation = violation;
                return true;
            }
        }
        false
    }

    /// Delta debugging over the list of faults (Zeller, Hildebrandt 2002): leaves out ever smaller parts of it.
    fn fewer_faults(&mut self) {
        let mut length = self.best.plan.faults.len().div_ceil(2);
        while length > 0 {
            let mut start = 0;
            while start < self.best.plan.faults.len() {
                let mut candidate = self.best.plan.clone();
                let end = (start + length).min(candidate.faults.len());
                candidate.faults.drain(start..end);
                if !self.adopt(candidate) {
                    start += length;
                }
            }
            length = if length == 1 { 0 } else { length.div_ceil(2) };
        }
    }

    /// Fewer processes, slots, blocks and steps, and less that is special.
    fn smaller(&mut self) {
        type Field = fn(&mut Plan) -> &mut u64;
        type Count = fn(&mut Plan) -> &mut u32;
        const COUNTS: [Count; 7] = [
            |plan| &mut plan.topology.num_workers,
            |plan| &mut plan.topology.num_shards,
            |plan| &mut plan.topology.num_coordinators,
            |plan| &mut plan.topology.replication,
            |plan| &mut plan.workload.num_slots,
            |plan| &mut plan.workload.num_blocks,
            |plan| &mut plan.workload.num_chunks,
        ];
        const FIELDS: [Field; 5] = [
            |plan| &mut plan.workload.num_steps,
            |plan| &mut plan.workload.checkpoint_every,
            |plan| &mut plan.workload.evaluate_every,
            |plan| &mut plan.timing.seed_max_ms,
            |plan| &mut plan.timing.store_max_ms,
        ];
        for count in COUNTS {
            let value = *count(&mut self.best.plan);
            for smaller in [1, value / 2, value.saturating_sub(1)] {
                let mut candidate = self.best.plan.clone();
                *count(&mut candidate) = smaller;
                if smaller < value && self.adopt(candidate) {
                    break;
                }
            }
        }
        for field in FIELDS {
            let value = *field(&mut self.best.plan);
            for smaller in [0, 1, value / 2, value.saturating_sub(1)] {
                let mut candidate = self.best.plan.clone();
                *field(&mut candidate) = smaller;
                // A store operation takes its time, a little.
                candidate.timing.store_max_ms = candidate.timing.store_max_ms.max(1);
                if smaller < value && self.adopt(candidate) {
                    break;
                }
            }
        }
        let mut apart = self.best.plan.clone();
        apart.topology.colocated = false;
        self.adopt(apart);
    }
}
