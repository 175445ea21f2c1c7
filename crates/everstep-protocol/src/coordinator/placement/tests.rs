use proptest::prelude::*;

use super::*;
use crate::testing::shard;

fn shards(count: u32) -> Vec<Member> {
    (0..count).map(shard).collect()
}

fn spread(counts: &BTreeMap<Member, usize>, members: &[Member]) -> usize {
    let counts = members.iter().map(|member| count_of(counts, *member));
    counts.clone().max().unwrap_or(0) - counts.min().unwrap_or(0)
}

fn rules(replication: u32) -> Rules<'static> {
    Rules {
        replication,
        domains: &[],
        draining: BTreeSet::new(),
    }
}

fn domain(node: u32, process: u32) -> Domain {
    Domain { node, process }
}

/// Everything that joins is seeded, and what is surplus goes.
fn seed(rules: &Rules<'_>, placements: &mut [Placement], num_staying: usize) {
    for placement in placements.iter_mut() {
        let joining = std::mem::take(&mut placement.joining);
        placement.backups.extend(joining);
    }
    rules.trim(placements, Moment::BetweenSteps, num_staying);
    rules.balance(placements);
}

/// Replicas of a block are on different members.
fn are_distinct(placements: &[Placement]) -> bool {
    placements.iter().all(|placement| {
        let mut members: Vec<Member> = placement
            .replicas()
            .chain(placement.joining.iter().copied())
            .collect();
        let count = members.len();
        members.sort();
        members.dedup();
        members.len() == count
    })
}

proptest! {
    #[test]
    fn initial_placement_is_even(num_blocks in 1u32..40, num_shards in 1u32..7, replication in 1u32..5) {
        let members = shards(num_shards);
        let placements = rules(replication).initial(num_blocks, &members);
        prop_assert!(are_distinct(&placements));
        prop_assert!(spread(&primaries(&placements), &members) <= 1);
        let wanted = replication.min(num_shards) as usize;
        prop_assert!(placements.iter().all(|placement| placement.replicas().count() == wanted));
        prop_assert_eq!(rules(replication).degraded(&placements).is_some(), replication > num_shards);
    }

    #[test]
    fn losses_joins_and_balance_keep_replicas_apart(
        num_blocks in 1u32..20,
        num_shards in 2u32..6,
        replication in 1u32..4,
        events in prop::collection::vec((any::<bool>(), 0u32..6), 0..20),
    ) {
        let mut live = shards(num_shards);
        let mut placements = rules(replication).initial(num_blocks, &live);
        for (loses, index) in events {
            let member = shard(index % num_shards);
            if loses && live.contains(&member) && live.len() > 1 {
                live.retain(|other| *other != member);
                let removal = rules(replication).remove(&mut placements, member);
                if !removal.orphaned.is_empty() {
                    placements = rules(replication).initial(num_blocks, &live);
                }
            } else if !live.contains(&member) {
                live.push(member);
                rules(replication).fill(&mut placements, &[member]);
            } else {
                seed(&rules(replication), &mut placements, live.len());
            }
            prop_assert!(are_distinct(&placements));
            for placement in &placements {
                prop_assert!(placement.replicas().all(|member| live.contains(&member)));
                prop_assert!(placement.replicas().count() + placement.joining.len() <= replication as usize);
            }
        }
    }

    #[test]
    fn balance_leaves_no_exchange_that_would_help(picks in prop::collection::vec((0u32..4, 0u32..4), 1..20)) {
        let mut placements: Vec<Placement> = picks
            .iter()
            .map(|(primary, backup)| Placement {
                primary: shard(*primary),
                backups: (primary != backup).then_some(shard(*backup)).into_iter().collect(),
                joining: Vec::new(),
            })
            .collect();
        rules(2).balance(&mut placements);
        let counts = primaries(&placements);
        for placement in &placements {
            for backup in &placement.backups {
                prop_assert!(count_of(&counts, placement.primary) <= count_of(&counts, *backup) + 1);
            }
        }
    }
}

proptest! {
    #[test]
    fn a_shard_that_joins_gets_its_share(num_blocks in 1u32..40, num_shards in 1u32..6, replication in 1u32..4) {
        let rules = rules(replication);
        let mut placements = rules.initial(num_blocks, &shards(num_shards));
        let joined = shard(num_shards);
        let members = shards(num_shards + 1);
        rules.fill(&mut placements, &[joined]);
        seed(&rules, &mut placements, members.len());
        while rules.rebalance(&mut placements, &members, 3) {
            let moving = placements.iter().filter(|placement| !placement.joining.is_empty());
            prop_assert!(moving.count() <= 3, "movement is bounded");
            seed(&rules, &mut placements, members.len());
        }
        prop_assert!(are_distinct(&placements));
        let wanted = replication.min(num_shards + 1) as usize;
        prop_assert!(placements.iter().all(|placement| placement.replicas().count() == wanted));
        prop_assert!(spread(&replicas(&placements), &members) <= 1);
    }
}

#[test]
fn two_full_shards_share_the_lead() {
    let full = vec![shards(2); 5];
    let placements = rules(2).over(&full);
    assert!(spread(&primaries(&placements), &shards(2)) <= 1);
    assert!(
        placements
            .iter()
            .all(|placement| placement.backups.len() == 1)
    );
}

/// Nodes of a block's replicas.
fn nodes(rules: &Rules<'_>, placement: &Placement) -> BTreeSet<u32> {
    placement
        .replicas()
        .map(|member| rules.domain(member).node)
        .collect()
}

fn processes(rules: &Rules<'_>, placement: &Placement) -> BTreeSet<u32> {
    placement
        .replicas()
        .map(|member| rules.domain(member).process)
        .collect()
}

proptest! {
    #[test]
    fn replicas_are_as_far_apart_as_they_can_be(
        num_blocks in 1u32..24,
        places in prop::collection::vec((0u32..3, 0u32..2), 1..8),
        replication in 1u32..4,
    ) {
        let domains: Vec<Domain> = places.iter().map(|(node, process)| domain(*node, 2 * node + process)).collect();
        let rules = Rules { domains: &domains, ..rules(replication) };
        let members = shards(domains.len() as u32);
        let num_nodes = domains.iter().map(|domain| domain.node).collect::<BTreeSet<_>>().len();
        let num_processes = domains.iter().map(|domain| domain.process).collect::<BTreeSet<_>>().len();
        let wanted = (replication as usize).min(members.len());
        // From scratch, and from a placement that knew nothing of domains.
        let blind = Rules { domains: &[], ..rules.clone() }.initial(num_blocks, &members);
        let mut moved = blind;
        let mut rounds = 0;
        while rules.rebalance(&mut moved, &members, 2) {
            seed(&rules, &mut moved, members.len());
            rounds += 1;
            prop_assert!(rounds < 1000, "moves end");
        }
        for placements in [rules.initial(num_blocks, &members), moved] {
            prop_assert!(are_distinct(&placements));
            for placement in &placements {
                prop_assert_eq!(placement.replicas().count(), wanted);
                prop_assert_eq!(processes(&rules, placement).len(), wanted.min(num_processes));
                prop_assert!(nodes(&rules, placement).len() >= wanted.min(num_nodes).min(2));
            }
        }
    }

    #[test]
    fn draining_members_give_everything_away_and_nothing_is_lost(
        num_blocks in 1u32..20,
        num_shards in 2u32..7,
        num_draining in 1u32..4,
        replication in 1u32..4,
    ) {
        let members = shards(num_shards);
        let placements = rules(replication).initial(num_blocks, &members);
        let draining: BTreeSet<Member> = shards(num_draining.min(num_shards)).into_iter().collect();
        let staying = num_shards as usize - draining.len();
        let rules = Rules { draining: draining.clone(), ..rules(replication) };
        let mut moved = placements.clone();
        rules.fill(&mut moved, &members);
        prop_assert!(moved.iter().all(|placement| placement.joining.iter().all(|member| !draining.contains(member))));
        seed(&rules, &mut moved, staying);
        for placement in &moved {
            let full = placement.replicas().count();
            if staying == 0 {
                prop_assert_eq!(full, (replication as usize).min(num_shards as usize), "what cannot be moved stays");
                continue;
            }
            prop_assert!(placement.replicas().all(|member| !draining.contains(&member)));
            prop_assert_eq!(full, (replication as usize).min(staying));
        }
    }
}

#[test]
fn two_replicas_in_one_process_are_degraded() {
    let domains = [domain(0, 0), domain(0, 0)];
    let rules = Rules {
        domains: &domains,
        ..rules(2)
    };
    let placements = rules.initial(2, &shards(2));
    assert_eq!(rules.degraded(&placements), Some((vec![0, 1], 1)));
    // One that joins in another process makes it whole.
    let domains = [domain(0, 0), domain(0, 0), domain(0, 1)];
    let rules = Rules {
        domains: &domains,
        ..rules
    };
    let mut placements = placements;
    assert!(rules.rebalance(&mut placements, &shards(3), 8));
    seed(&rules, &mut placements, 3);
    assert_eq!(rules.degraded(&placements), None);
}

#[test]
fn primaries_stay_while_a_step_is_open() {
    let rules = Rules {
        draining: BTreeSet::from([shard(0)]),
        ..rules(2)
    };
    let mut placements = vec![Placement {
        primary: shard(0),
        backups: vec![shard(1), shard(2)],
        joining: Vec::new(),
    }];
    assert_eq!(
        rules.trim(&mut placements, Moment::WithinStep, 2),
        BTreeMap::new()
    );
    assert_eq!(placements[0].primary, shard(0));
    assert_eq!(
        rules.trim(&mut placements, Moment::BetweenSteps, 2),
        BTreeMap::from([(shard(0), 1)])
    );
    assert_eq!(placements[0].primary, shard(1));
    assert_eq!(placements[0].backups, [shard(2)]);
}

/// The move that helps most, found by looking at all.
fn best_of_all_moves(
    rules: &Rules<'_>,
    placements: &[Placement],
    shards: &[Member],
) -> Option<(BlockId, Member)> {
    let counts = replicas(placements);
    let mut moves = Vec::new();
    for (block, placement) in (0..).zip(placements) {
        let full: Vec<Member> = placement.replicas().collect();
        let is_settled = placement.joining.is_empty() && full.len() == rules.wanted();
        if !is_settled || full.iter().any(|member| !rules.is_staying(*member)) {
            continue;
        }
        for from in &full {
            let others = || full.iter().copied().filter(|other| other != from);
            let before = rules.crowding(*from, others());
            for to in rules.candidates(shards) {
                let after = rules.crowding(to, others());
                let relief = counts[from].saturating_sub(count_of(&counts, to) + 1);
                if !full.contains(&to) && (after < before || (after == before && relief > 0)) {
                    let apart = (
                        before.0.saturating_sub(after.0),
                        before.1.saturating_sub(after.1),
                    );
                    moves.push((apart, relief, *from, to, Reverse(block)));
                }
            }
        }
    }
    // Of a block the best move, then of the blocks the first.
    moves
        .into_iter()
        .max()
        .map(|(.., to, Reverse(block))| (block, to))
}

proptest! {
    #[test]
    fn the_best_move_is_found(
        picks in prop::collection::vec((0u32..6, 0u32..6, 0u32..6), 1..12),
        places in prop::collection::vec((0u32..3, 0u32..2), 6),
        draining in prop::option::weighted(0.2, 0u32..6),
    ) {
        let members = shards(6);
        let domains: Vec<Domain> = places
            .into_iter()
            .map(|(node, process)| domain(node, 2 * node + process))
            .collect();
        let rules = Rules {
            replication: 2,
            domains: &domains,
            draining: draining.into_iter().map(shard).collect(),
        };
        let mut placements: Vec<Placement> = picks
            .into_iter()
            .map(|(primary, backup, joining)| Placement {
                primary: shard(primary),
                backups: (backup != primary).then(|| shard(backup)).into_iter().collect(),
                joining: (joining == 0 && primary > 0 && backup > 0)
                    .then(|| shard(0))
                    .into_iter()
                    .collect(),
            })
            .collect();
        let before = placements.clone();
        let moving = before.iter().filter(|placement| !placement.joining.is_empty()).count();
        let best = best_of_all_moves(&rules, &placements, &members);
        let found = rules.rebalance(&mut placements, &members, moving + 1);
        prop_assert_eq!(found, best.is_some());
        if let Some((block, to)) = best {
            let block = block as usize;
            prop_assert_eq!(&placements[block].joining, &[to]);
            placements[block].joining.clear();
        }
        prop_assert_eq!(placements, before);
    }
}
