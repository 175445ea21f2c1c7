use super::*;

#[test]
fn a_seed_replays_exactly() {
    let story = |seed| {
        let mut lines = Vec::new();
        run_seed_traced(seed, &mut |line| lines.push(line));
        lines
    };
    for seed in 0..20 {
        assert_eq!(story(seed), story(seed), "seed {seed}");
    }
}

#[test]
fn undisturbed_seeds_finish_without_recomputing() {
    let calm: Vec<u64> = (0..400)
        .filter(|seed| Plan::of_seed(*seed).faults.is_empty())
        .collect();
    assert!(calm.len() > 10);
    for seed in calm {
        let outcome = run_seed(seed);
        assert_eq!(outcome.violation, None, "seed {seed}");
        assert_eq!(
            outcome.num_decisions,
            Plan::of_seed(seed).workload.num_steps,
            "seed {seed}"
        );
    }
}

#[test]
fn a_campaign_holds_every_invariant() {
    let summary = run_many(0, 300, 2);
    assert!(summary.violations.is_empty(), "{summary}");
    assert_eq!(summary.num_seeds, 300);
}

#[test]
fn a_campaign_without_chaos_does_not_pass() {
    let mut summary = Summary {
        num_seeds: COVERAGE_SEEDS_MIN,
        ..Summary::default()
    };
    assert!(!summary.passed());
    assert_eq!(
        summary.unseen().len(),
        Fault::all().count() + Recovery::ALL.len() + Branch::ALL.len()
    );
    summary.num_seeds = COVERAGE_SEEDS_MIN - 1;
    assert!(summary.passed());
}
