//! Who holds which block: pure functions over placements.

use std::collections::BTreeMap;

use crate::ids::{BlockId, Member};
use crate::message::Placement;

/// Primaries and backups of all blocks spread evenly over `shards` (at least one); fewer backups than wanted while shards are few.
pub fn initial(num_blocks: u32, shards: &[Member], replication: u32) -> Vec<Placement> {
    let count = shards.len();
    let num_backups = (replication.max(1) as usize - 1).min(count.saturating_sub(1));
    (0..num_blocks as usize)
        .map(|block| {
            let primary = block % count;
            let round = block / count;
            let backups = (0..num_backups)
                .map(|backup| {
                    let distance = 1 + (round + backup) % (count - 1);
                    shards[(primary + distance) % count]
                })
                .collect();
            Placement {
                primary: shards[primary],
                backups,
                joining: Vec::new(),
            }
        })
        .collect()
}

/// How many blocks each member holds as primary.
fn primaries(placements: &[Placement]) -> BTreeMap<Member, usize> {
    let mut counts = BTreeMap::new();
    for placement in placements {
        *counts.entry(placement.primary).or_insert(0) += 1;
    }
    counts
}

/// How many blocks each member holds or joins.
fn replicas(placements: &[Placement]) -> BTreeMap<Member, usize> {
    let mut counts = BTreeMap::new();
    for placement in placements {
        for member in placement
            .replicas()
            .chain(placement.joining.iter().copied())
        {
            *counts.entry(member).or_insert(0) += 1;
        }
    }
    counts
}

fn count_of(counts: &BTreeMap<Member, usize>, member: Member) -> usize {
    counts.get(&member).copied().unwrap_or(0)
}

/// What the loss of a shard did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removal {
    /// Blocks by their new primaries.
    pub promoted: BTreeMap<Member, Vec<BlockId>>,
    /// Blocks that no full replica is left of.
    pub orphaned: Vec<BlockId>,
}

/// Takes a lost shard out. Its blocks go to the backup that leads fewest blocks; orphaned blocks keep their lost primary.
pub fn remove(placements: &mut [Placement], lost: Member) -> Removal {
    let mut removal = Removal::default();
    let mut counts = primaries(placements);
    for (block, placement) in (0..).zip(placements.iter_mut()) {
        placement.backups.retain(|member| *member != lost);
        placement.joining.retain(|member| *member != lost);
        if placement.primary != lost {
            continue;
        }
        let heir = placement
            .backups
            .iter()
            .copied()
            .min_by_key(|member| (count_of(&counts, *member), *member));
        match heir {
            Some(heir) => {
                placement.backups.retain(|member| *member != heir);
                placement.primary = heir;
                *counts.entry(heir).or_insert(0) += 1;
                removal.promoted.entry(heir).or_default().push(block);
            }
            None => removal.orphaned.push(block),
        }
    }
    removal
}

/// Lists joining replicas for blocks that have fewer than wanted, on the candidates that hold fewest. Returns whether any was listed.
pub fn add_joining(placements: &mut [Placement], candidates: &[Member], replication: u32) -> bool {
    let mut counts = replicas(placements);
    let mut added = false;
    for placement in placements.iter_mut() {
        loop {
            let have = 1 + placement.backups.len() + placement.joining.len();
            if have >= replication.max(1) as usize {
                break;
            }
            let pick = candidates
                .iter()
                .copied()
                .filter(|member| placement.role_of(*member).is_none())
                .min_by_key(|member| (count_of(&counts, *member), *member));
            let Some(pick) = pick else {
                break;
            };
            placement.joining.push(pick);
            *counts.entry(pick).or_insert(0) += 1;
            added = true;
        }
    }
    added
}

/// Lists `joined` as joining replica of blocks of those members that hold most, until it would hold its fair share. When it is seeded,
/// [`trim`] takes the surplus replica out. Returns whether any was listed.
pub fn take_share(placements: &mut [Placement], joined: Member, num_shards: usize) -> bool {
    let mut counts = replicas(placements);
    let total: usize = counts.values().sum();
    let share = total / num_shards.max(1);
    let mut added = false;
    while count_of(&counts, joined) < share {
        let heaviest = |placement: &Placement| {
            placement
                .replicas()
                .map(|member| (count_of(&counts, member), member))
                .max()
        };
        let pick = (0..placements.len())
            .filter(|block| {
                let placement = &placements[*block];
                placement.role_of(joined).is_none() && placement.joining.is_empty()
            })
            .filter_map(|block| Some((heaviest(&placements[block])?, block)))
            .max_by_key(|((count, member), block)| (*count, *member, std::cmp::Reverse(*block)));
        let Some(((count, heavy), block)) = pick else {
            break;
        };
        if count <= count_of(&counts, joined) + 1 {
            break;
        }
        placements[block].joining.push(joined);
        *counts.entry(joined).or_insert(0) += 1;
        // It will be the one that goes.
        *counts.entry(heavy).or_insert(1) -= 1;
        added = true;
    }
    added
}

/// Takes surplus replicas out, from the members that hold most, but never `fresh`. All replicas must be full.
pub fn trim(placements: &mut [Placement], fresh: Member, replication: u32) {
    let mut counts = replicas(placements);
    for placement in placements.iter_mut() {
        while placement.backups.len() + 1 > replication.max(1) as usize {
            let surplus = placement
                .replicas()
                .filter(|member| *member != fresh)
                .max_by_key(|member| (count_of(&counts, *member), *member));
            let Some(surplus) = surplus else {
                break;
            };
            *counts.entry(surplus).or_insert(1) -= 1;
            if placement.primary == surplus {
                placement.primary = placement.backups.pop().unwrap_or(fresh);
            } else {
                placement.backups.retain(|member| *member != surplus);
            }
        }
    }
}

/// Moves primaries to backups until the counts of any two members that could exchange one differ by at most one. Returns whether any moved.
pub fn balance(placements: &mut [Placement]) -> bool {
    let mut moved = false;
    loop {
        let counts = primaries(placements);
        let step = placements
            .iter()
            .enumerate()
            .find_map(|(block, placement)| {
                let mine = count_of(&counts, placement.primary);
                placement
                    .backups
                    .iter()
                    .copied()
                    .find(|backup| count_of(&counts, *backup) + 1 < mine)
                    .map(|backup| (block, backup))
            });
        let Some((block, heir)) = step else {
            return moved;
        };
        let placement = &mut placements[block];
        let old = placement.primary;
        placement.primary = heir;
        for backup in &mut placement.backups {
            if *backup == heir {
                *backup = old;
            }
        }
        moved = true;
    }
}

/// Placements over replicas that are full already, by block (each list not empty); primaries spread evenly.
pub fn over(full: &[Vec<Member>], replication: u32) -> Vec<Placement> {
    let mut counts: BTreeMap<Member, usize> = BTreeMap::new();
    let mut placements: Vec<Placement> = Vec::with_capacity(full.len());
    for members in full {
        let primary = members
            .iter()
            .copied()
            .min_by_key(|member| (count_of(&counts, *member), *member));
        let Some(primary) = primary else {
            continue;
        };
        *counts.entry(primary).or_insert(0) += 1;
        placements.push(Placement {
            primary,
            backups: members
                .iter()
                .copied()
                .filter(|member| *member != primary)
                .take(replication.max(1) as usize - 1)
                .collect(),
            joining: Vec::new(),
        });
    }
    balance(&mut placements);
    placements
}

/// Blocks with fewer replicas than wanted, and the replicas of the one that has fewest.
pub fn degraded(placements: &[Placement], replication: u32) -> Option<(Vec<BlockId>, u32)> {
    let short: Vec<(BlockId, u32)> = (0..)
        .zip(placements)
        .map(|(block, placement)| (block, 1 + placement.backups.len() as u32))
        .filter(|(_, count)| *count < replication)
        .collect();
    let fewest = short.iter().map(|(_, count)| *count).min()?;
    Some((short.iter().map(|(block, _)| *block).collect(), fewest))
}

#[cfg(test)]
mod tests;
