//! Slow workers: second leases, and shares by pace.

use super::*;

/// One block on one shard, eight slots.
fn bench(num_workers: u32, num_steps: u64) -> Bench {
    let config = CoordinatorConfig {
        num_slots: 8,
        num_blocks: 1,
        num_steps,
        replication: 1,
        num_shards: 1,
        checkpoint_every: 0,
        lease_ms: 5000,
        ..config()
    };
    Bench::training_of(num_workers, 1, config)
}

/// Decides the step; returns the leases of the next one.
fn decide(bench: &mut Bench, step: u64) -> Vec<String> {
    let said = bench.reduced(step, 0);
    said.into_iter()
        .filter(|line| line.contains("lease"))
        .collect()
}

#[test]
fn a_slow_lease_goes_to_an_idle_worker_too_after_a_multiple_of_the_slot_time() {
    let mut bench = bench(2, 3);
    bench.now_ms = 400;
    bench.delivered(worker(0), 0, 0, 4);
    // 100 ms per slot: four slots may take 1.5 * (4 + 1) * 100 ms.
    let said = bench.tick(749);
    assert!(said.iter().all(|line| !line.contains("again")), "{said:?}");
    let said = bench.tick(800);
    assert!(
        said.contains(&"again [4, 5, 6, 7] false".into()),
        "{said:?}"
    );
    assert!(
        said.contains(&"w-0 lease 0 [Slot(4), Slot(5), Slot(6), Slot(7)]".into()),
        "{said:?}"
    );
    // The helper is lost: the slow one still has them, and its result is taken.
    assert_eq!(bench.lose(worker(0)), ["lost worker-0#1"]);
    bench.delivered(worker(1), 0, 4, 8);
    assert_eq!(
        bench.lose(worker(1)),
        ["lost worker-1#1"],
        "nothing is outstanding"
    );
}

#[test]
fn late_slots_are_shared_between_helpers_and_count_once() {
    let mut bench = bench(3, 3);
    bench.now_ms = 300;
    bench.delivered(worker(0), 0, 0, 3);
    bench.delivered(worker(1), 0, 3, 6);
    let said = bench.tick(1000);
    assert!(said.contains(&"again [6, 7] false".into()), "{said:?}");
    assert!(said.contains(&"w-0 lease 0 [Slot(6)]".into()), "{said:?}");
    assert!(said.contains(&"w-1 lease 0 [Slot(7)]".into()), "{said:?}");
    assert_eq!(bench.coordinator.slots_recomputed(), 2);
    // The loser's duplicates change nothing: neither who delivered, nor what is leased.
    assert_eq!(bench.delivered(worker(0), 0, 6, 7), NOTHING);
    assert_eq!(bench.delivered(worker(2), 0, 6, 8), NOTHING);
    assert_eq!(
        bench.lose(worker(2)),
        ["lost worker-2#1", "again [7] true", "w-0 lease 0 [Slot(7)]"][..1],
        "worker 1 holds slot 7 too, so it is not leased again"
    );
}

#[test]
fn as_long_as_no_time_is_known_the_configured_one_counts() {
    let mut bench = bench(1, 3);
    bench.tick(1000);
    bench.hello(worker(1), idle());
    let said = bench.tick(4900);
    assert!(said.iter().all(|line| !line.contains("again")), "{said:?}");
    let said = bench.tick(5000);
    assert!(
        said.contains(
            &"w-1 lease 0 [Slot(0), Slot(1), Slot(2), Slot(3), Slot(4), Slot(5), Slot(6), Slot(7)]"
                .into()
        ),
        "{said:?}"
    );
}

#[test]
fn a_slow_worker_gets_fewer_slots_and_its_share_back() {
    let mut bench = bench(2, 40);
    let mut now_ms = 0;
    let mut shares = Vec::new();
    let mut share = 4;
    for step in 0..30u64 {
        // Worker 1 takes 500 ms per slot in the first ten steps, then as long as worker 0: 100 ms.
        let slow_ms = if step < 10 { 500 } else { 100 };
        shares.push(share);
        let (fast, slow) = (8 - share, share);
        let mut ends = vec![
            (now_ms + 100 * u64::from(fast), worker(0), 0, fast),
            (now_ms + slow_ms * u64::from(slow), worker(1), fast, 8),
        ];
        if share == 0 {
            // It may have been given a slot to measure it.
            ends[1] = (now_ms + slow_ms, worker(1), 7, 8);
        }
        ends.sort();
        for (end_ms, member, start, end) in ends {
            if start < end && (share > 0 || member.index == 0 || end_ms < now_ms + 800) {
                bench.now_ms = end_ms;
                bench.delivered(member, step, start, end);
            }
        }
        now_ms = bench.now_ms;
        let leases = decide(&mut bench, step);
        share = leases
            .iter()
            .find(|line| line.starts_with("w-1"))
            .map_or(0, |line| line.matches("Slot").count() as u32);
        if leases
            .iter()
            .filter(|line| line.contains("Slot(7)"))
            .count()
            == 2
        {
            share = 0;
        }
    }
    assert_eq!(shares[0], 4);
    assert!(shares[3..10].iter().all(|share| *share <= 2), "{shares:?}");
    assert_eq!(shares[29], 4, "{shares:?}");
}
