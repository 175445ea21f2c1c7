//! A run that only skips, under its leaders.

use super::*;
use crate::message::GradientReport;
use crate::policy::History;

#[test]
fn a_run_that_skips_for_too_long_is_given_up_by_every_leader() {
    let mut bench = Bench::training(CoordinatorConfig {
        skip_limit: 3,
        ..config()
    });
    let after = |num_skipped| GradientReport {
        history: History {
            num_skipped,
            ..History::default()
        },
        ..report(1.0)
    };
    let reduce = |bench: &mut Bench, step: u64, num_skipped: u32| {
        let mut said = Vec::new();
        for block in 0..2 {
            let message = Message::Reduced {
                view: bench.current(),
                step: Step(step),
                block,
                report: after(num_skipped),
                testimonies: Vec::new(),
            };
            said.extend(bench.hear(shard(block), message));
        }
        said
    };
    reduce(&mut bench, 0, 2);
    assert_eq!(bench.coordinator.step(), Step(1));
    let said = reduce(&mut bench, 1, 3);
    assert_eq!(said, ["GaveUp { step: Step(1), num_skipped: 3 }"]);
    assert!(!bench.coordinator.is_leading());
    // Nothing of that step was decided, so the next leader comes to the same.
    bench.elect(2, 0, 1);
    bench.hello(shard(0), holding(&[(1, false), (1, false)]));
    bench.hello(shard(1), holding(&[(1, false), (1, false)]));
    assert_eq!(bench.coordinator.phase(), Phase::Training);
    let said = reduce(&mut bench, 1, 3);
    assert_eq!(said, ["GaveUp { step: Step(1), num_skipped: 3 }"]);
}
