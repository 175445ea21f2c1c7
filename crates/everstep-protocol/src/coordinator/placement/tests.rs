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
        let placements = initial(num_blocks, &members, replication);
        prop_assert!(are_distinct(&placements));
        prop_assert!(spread(&primaries(&placements), &members) <= 1);
        let wanted = replication.min(num_shards) as usize;
        prop_assert!(placements.iter().all(|placement| placement.replicas().count() == wanted));
        prop_assert_eq!(degraded(&placements, replication).is_some(), replication > num_shards);
    }

    #[test]
    fn losses_joins_and_balance_keep_replicas_apart(
        num_blocks in 1u32..20,
        num_shards in 2u32..6,
        replication in 1u32..4,
        events in prop::collection::vec((any::<bool>(), 0u32..6), 0..20),
    ) {
        let mut live = shards(num_shards);
        let mut placements = initial(num_blocks, &live, replication);
        for (loses, index) in events {
            let member = shard(index % num_shards);
            if loses && live.contains(&member) && live.len() > 1 {
                live.retain(|other| *other != member);
                let removal = remove(&mut placements, member);
                if !removal.orphaned.is_empty() {
                    placements = initial(num_blocks, &live, replication);
                }
            } else if !live.contains(&member) {
                live.push(member);
                add_joining(&mut placements, &[member], replication);
            } else {
                // Everything that joins is seeded.
                for placement in &mut placements {
                    let joining = std::mem::take(&mut placement.joining);
                    placement.backups.extend(joining);
                }
                balance(&mut placements);
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
        balance(&mut placements);
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
        let mut placements = initial(num_blocks, &shards(num_shards), replication);
        let joined = shard(num_shards);
        let members = shards(num_shards + 1);
        add_joining(&mut placements, &[joined], replication);
        take_share(&mut placements, joined, members.len());
        for placement in &mut placements {
            let joining = std::mem::take(&mut placement.joining);
            placement.backups.extend(joining);
        }
        trim(&mut placements, joined, replication);
        balance(&mut placements);
        prop_assert!(are_distinct(&placements));
        let wanted = replication.min(num_shards + 1) as usize;
        prop_assert!(placements.iter().all(|placement| placement.replicas().count() == wanted));
        prop_assert!(spread(&replicas(&placements), &members) <= 2);
    }
}

#[test]
fn two_full_shards_share_the_lead() {
    let full = vec![shards(2); 5];
    let placements = over(&full, 2);
    assert!(spread(&primaries(&placements), &shards(2)) <= 1);
    assert!(
        placements
            .iter()
            .all(|placement| placement.backups.len() == 1)
    );
}
