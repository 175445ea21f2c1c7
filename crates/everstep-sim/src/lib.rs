//! Seeded simulator of a whole cluster and the invariants it checks.
//!
//! One thread, one seed, virtual time. The real coordinator, shard and worker machines run on a network that delays,
//! reorders, drops, duplicates and cuts, in processes that crash, freeze and come back empty, against a store that takes its time. The
//! objective is a toy whose result is computed directly, so every seed must end in that result. A chaos phase is followed by
//! healing, after which the run must finish.
//!
//! Checked at every event:
//!
//! 1. each slot enters each block's sum exactly once, so states and sums have the undisturbed bits;
//! 2. no step is decided before it is reduced on all replicas of the view, or fewer replicas were declared;
//! 3. decisions of different leaders are equal;
//! 4. applied steps only grow, except by a declared rollback;
//! 5. a committed manifest names objects that exist and verify;
//! 6. after healing, the run finishes.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod check;
mod coverage;
mod detect;
mod drain;
mod effects;
mod fault;
mod minimise;
mod network;
mod outcome;
mod phase;
mod plan;
mod process;
mod store;
mod strike;
mod summary;
mod swarm;
pub mod toy;
mod watch;
mod weather;
mod world;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

pub use coverage::Branch;
pub use fault::Fault;
pub use minimise::{Minimal, minimise};
pub use outcome::{Digest, Outcome, Recovery, Strike};
pub use phase::Phase;
pub use plan::{Action, Moment, Plan, PlanError, PlannedFault, Target, Timing, Topology, Workload};
pub use summary::{COVERAGE_SEEDS_MIN, Count, Summary};

/// Runs a plan, which must pass [`Plan::check`]; the same plan and seed always run the same way.
pub fn run_plan(plan: &Plan, seed: u64) -> Outcome {
    world::World::new(plan.clone(), seed, None).run()
}

/// Runs a plan and hands every line of its story to `trace`.
pub fn run_plan_traced(plan: &Plan, seed: u64, trace: &mut dyn FnMut(String)) -> Outcome {
    world::World::new(plan.clone(), seed, Some(trace)).run()
}

/// Runs one seed: its swarm plan, with its draws.
pub fn run_seed(seed: u64) -> Outcome {
    world::World::new(Plan::of_seed(seed), seed, None).run()
}

/// Runs one seed and hands every line of its story to `trace`.
pub fn run_seed_traced(seed: u64, trace: &mut dyn FnMut(String)) -> Outcome {
    world::World::new(Plan::of_seed(seed), seed, Some(trace)).run()
}

/// Runs `num_seeds` seeds from `first` on over `num_threads` threads (at least one).
pub fn run_many(first: u64, num_seeds: u64, num_threads: usize) -> Summary {
    campaign(first, num_seeds, num_threads, &run_seed)
}

/// Runs one plan with the draws of `num_seeds` seeds from `first` on, over `num_threads` threads (at least one).
pub fn run_plan_many(plan: &Plan, first: u64, num_seeds: u64, num_threads: usize) -> Summary {
    let mut summary = campaign(first, num_seeds, num_threads, &|seed| run_plan(plan, seed));
    summary.is_of_one_plan = true;
    summary
}

fn campaign(
    first: u64,
    num_seeds: u64,
    num_threads: usize,
    run: &(dyn Fn(u64) -> Outcome + Sync),
) -> Summary {
    /// Seeds that a thread takes at once.
    const CHUNK: u64 = 16;
    let started = Instant::now();
    let next = AtomicU64::new(0);
    let work = || {
        let mut summary = Summary::default();
        loop {
            let chunk = next.fetch_add(CHUNK, Ordering::Relaxed);
            if chunk >= num_seeds {
                return summary;
            }
            for offset in chunk..(chunk + CHUNK).min(num_seeds) {
                summary.add(run(first.wrapping_add(offset)));
            }
        }
    };
    let mut summary = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..num_threads.max(1)).map(|_| scope.spawn(work)).collect();
        let mut all = Summary::default();
        for thread in threads {
            match thread.join() {
                Ok(part) => all.merge(part),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    });
    summary.seconds = started.elapsed().as_secs_f64();
    summary
}

#[cfg(test)]
mod tests;
