//! Who holds which block: pure functions over placements.
//!
//! Replicas of a block go to different nodes where there are enough, then to different processes, then to whoever holds least.
//! Two replicas in one process count as one: they die together, and the block is declared degraded.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{BlockId, Member};
use crate::message::Placement;

/// Where a shard runs; what fails together has equal numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Domain {
    /// Its machine.
    pub node: u32,
    /// Its process, unique among all machines.
    pub process: u32,
}

/// What placement goes by.
#[derive(Clone, Debug)]
pub struct Rules<'a> {
    /// Replicas wanted per block, the primary included.
    pub replication: u32,
    /// Where each shard runs, by its index; one that is not listed is alone on its node.
    pub domains: &'a [Domain],
    /// Shards that are about to leave: they get nothing new, and give what they have to others.
    pub draining: BTreeSet<Member>,
}

/// How many others share a member's process, and how many its node: the fewer the better, the process first.
type Crowding = (usize, usize);

/// What the loss of a shard did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removal {
    /// Blocks by their new primaries.
    pub promoted: BTreeMap<Member, Vec<BlockId>>,
    /// Blocks that no full replica is left of.
    pub orphaned: Vec<BlockId>,
}

/// When replicas may be taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// A step is open: primaries hold partial sums and stay.
    WithinStep,
    /// Every replica is as good as its primary, and nothing is in flight.
    BetweenSteps,
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
        for member in listed(placement) {
            *counts.entry(member).or_insert(0) += 1;
        }
    }
    counts
}

fn listed(placement: &Placement) -> impl Iterator<Item = Member> + '_ {
    placement
        .replicas()
        .chain(placement.joining.iter().copied())
}

fn count_of(counts: &BTreeMap<Member, usize>, member: Member) -> usize {
    counts.get(&member).copied().unwrap_or(0)
}

impl Rules<'_> {
    fn wanted(&self) -> usize {
        self.replication.max(1) as usize
    }

    fn domain(&self, member: Member) -> Domain {
        let alone = u32::MAX - member.index;
        self.domains
            .get(member.index as usize)
            .copied()
            .unwrap_or(Domain {
                node: alone,
                process: alone,
            })
    }

    fn crowding(&self, member: Member, others: impl Iterator<Item = Member>) -> Crowding {
        let mine = self.domain(member);
        others
            .filter(|other| *other != member)
            .map(|other| self.domain(other))
            .fold((0, 0), |(processes, nodes), theirs| {
                (
                    processes + usize::from(theirs.process == mine.process),
                    nodes + usize::from(theirs.node == mine.node),
                )
            })
    }

    fn is_staying(&self, member: Member) -> bool {
        !self.draining.contains(&member)
    }

    /// Those that may be given something.
    fn candidates(&self, shards: &[Member]) -> Vec<Member> {
        shards
            .iter()
            .copied()
            .filter(|member| self.is_staying(*member))
            .collect()
    }

    /// The best place for one more replica beside `members`.
    fn pick(
        &self,
        candidates: &[Member],
        members: &[Member],
        counts: &BTreeMap<Member, usize>,
    ) -> Option<Member> {
        candidates
            .iter()
            .copied()
            .filter(|member| !members.contains(member))
            .min_by_key(|member| {
                let crowding = self.crowding(*member, members.iter().copied());
                (crowding, count_of(counts, *member), *member)
            })
    }

    /// Primaries and backups of all blocks spread over `shards` (at least one); fewer backups than wanted while shards are few.
    /// Draining shards are used only if there are no others.
    pub fn initial(&self, num_blocks: u32, shards: &[Member]) -> Vec<Placement> {
        let staying = self.candidates(shards);
        let shards = if staying.is_empty() { shards } else { &staying };
        let mut placements: Vec<Placement> = (0..num_blocks as usize)
            .map(|block| Placement {
                primary: shards[block % shards.len()],
                backups: Vec::new(),
                joining: Vec::new(),
            })
            .collect();
        let mut counts = replicas(&placements);
        for placement in &mut placements {
            let mut members = vec![placement.primary];
            while members.len() < self.wanted() {
                let Some(pick) = self.pick(shards, &members, &counts) else {
                    break;
                };
                *counts.entry(pick).or_insert(0) += 1;
                members.push(pick);
            }
            placement.backups = members.split_off(1);
        }
        placements
    }

    /// Takes a lost shard out. Its blocks go to the backup that leads fewest blocks; orphaned blocks keep their lost primary.
    pub fn remove(&self, placements: &mut [Placement], lost: Member) -> Removal {
        let mut removal = Removal::default();
        let mut counts = primaries(placements);
        for (block, placement) in (0..).zip(placements.iter_mut()) {
            placement.backups.retain(|member| *member != lost);
            placement.joining.retain(|member| *member != lost);
            if placement.primary != lost {
                continue;
            }
            if self.hand_over(placement, &mut counts) {
                let heir = placement.primary;
                removal.promoted.entry(heir).or_default().push(block);
            } else {
                removal.orphaned.push(block);
            }
        }
        removal
    }

    /// Makes a backup primary in the place of the old one, which is in the placement no more. Returns whether there was one.
    fn hand_over(&self, placement: &mut Placement, counts: &mut BTreeMap<Member, usize>) -> bool {
        let heir = placement.backups.iter().copied().min_by_key(|member| {
            (
                !self.is_staying(*member),
                count_of(counts, *member),
                *member,
            )
        });
        let Some(heir) = heir else {
            return false;
        };
        *counts.entry(placement.primary).or_insert(1) -= 1;
        *counts.entry(heir).or_insert(0) += 1;
        placement.backups.retain(|member| *member != heir);
        placement.primary = heir;
        true
    }

    /// Lists joining replicas for blocks that have fewer than wanted, not counting what is about to leave. Returns whether any was listed.
    pub fn fill(&self, placements: &mut [Placement], shards: &[Member]) -> bool {
        let candidates = self.candidates(shards);
        let mut counts = replicas(placements);
        let mut added = false;
        for placement in placements.iter_mut() {
            loop {
                let members: Vec<Member> = listed(placement).collect();
                let have = members
                    .iter()
                    .filter(|member| self.is_staying(**member))
                    .count();
                // What leaves need not be kept apart from what stays.
                if have >= self.wanted() {
                    break;
                }
                let Some(pick) = self.pick(&candidates, &members, &counts) else {
                    break;
                };
                placement.joining.push(pick);
                *counts.entry(pick).or_insert(0) += 1;
                added = true;
            }
        }
        added
    }

    /// Lists joining replicas where they would keep a block's replicas further apart, or take load from a member that holds more than its
    /// share, while no more than `moves_max` blocks are being seeded. When one is seeded, [`trim`](Self::trim) takes the surplus replica
    /// out. Every move makes things better, so a sequence of them ends. Returns whether any was listed.
    pub fn rebalance(
        &self,
        placements: &mut [Placement],
        shards: &[Member],
        moves_max: usize,
    ) -> bool {
        let mut candidates = self.candidates(shards);
        let mut counts = replicas(placements);
        let mut moving = placements
            .iter()
            .filter(|placement| !placement.joining.is_empty())
            .count();
        let mut added = false;
        while moving < moves_max {
            // Those that a move would relieve another one most by come first.
            candidates.sort_by_key(|member| (count_of(&counts, *member), Reverse(*member)));
            let best = (0..placements.len())
                .filter_map(|block| {
                    let gain = self.best_move(&placements[block], &candidates, &counts)?;
                    Some((gain, Reverse(block)))
                })
                .max();
            let Some((gain, Reverse(block))) = best else {
                break;
            };
            placements[block].joining.push(gain.to);
            *counts.entry(gain.to).or_insert(0) += 1;
            *counts.entry(gain.from).or_insert(1) -= 1;
            moving += 1;
            added = true;
        }
        added
    }

    /// The move of one of the block's replicas that helps most, if one helps. `candidates` are in the order of their counts.
    fn best_move(
        &self,
        placement: &Placement,
        candidates: &[Member],
        counts: &BTreeMap<Member, usize>,
    ) -> Option<Move> {
        let full: Vec<Member> = placement.replicas().collect();
        let settled = placement.joining.is_empty()
            && full.len() == self.wanted()
            && full.iter().all(|member| self.is_staying(*member));
        if !settled {
            return None;
        }
        let best_from = |from: &Member| {
            let others = || full.iter().copied().filter(|other| other != from);
            let before = self.crowding(*from, others());
            let load = count_of(counts, *from);
            let mut moves = candidates
                .iter()
                .filter(|to| !full.contains(*to))
                .map(|to| {
                    let after = self.crowding(*to, others());
                    let relief = load.saturating_sub(count_of(counts, *to) + 1);
                    let found = Move {
                        apart: (
                            before.0.saturating_sub(after.0),
                            before.1.saturating_sub(after.1),
                        ),
                        relief,
                        from: *from,
                        to: *to,
                    };
                    (after, found)
                });
            if before == (0, 0) {
                // It cannot be further apart, so the first one that is as far and relieves it is best.
                return moves
                    .take_while(|(_, found)| found.relief > 0)
                    .find(|(after, _)| *after == before)
                    .map(|(_, found)| found);
            }
            let helps = |after: Crowding, found: &Move| {
                after < before || (after == before && found.relief > 0)
            };
            moves
                .by_ref()
                .filter_map(|(after, found)| helps(after, &found).then_some(found))
                .max()
        };
        full.iter().filter_map(best_from).max()
    }

    /// Takes surplus replicas out, those first that are about to leave, then those that are least apart from the others, then those of
    /// the members that hold most. Draining ones go as soon as what stays is enough, given `num_staying` shards that stay. Between two
    /// steps primaries may go too. Returns how many replicas each draining member gave away.
    pub fn trim(
        &self,
        placements: &mut [Placement],
        moment: Moment,
        num_staying: usize,
    ) -> BTreeMap<Member, u32> {
        let mut counts = replicas(placements);
        let mut leads = primaries(placements);
        let mut moved = BTreeMap::new();
        let enough = self.wanted().min(num_staying).max(1);
        for placement in placements.iter_mut() {
            let is_settled = placement.backups.len() < self.wanted()
                && placement.replicas().all(|member| self.is_staying(member));
            if is_settled {
                continue;
            }
            loop {
                let full: Vec<Member> = placement.replicas().collect();
                let staying = full
                    .iter()
                    .filter(|member| self.is_staying(**member))
                    .count();
                let may_leave = staying >= enough;
                let worst = full.iter().copied().max_by_key(|member| {
                    let crowding = self.crowding(*member, full.iter().copied());
                    let leaves = !self.is_staying(*member);
                    (leaves, crowding, count_of(&counts, *member), *member)
                });
                let Some(worst) = worst else {
                    break;
                };
                let leaves = !self.is_staying(worst);
                if full.len() <= self.wanted() && !(leaves && may_leave) {
                    break;
                }
                if placement.primary == worst {
                    if moment == Moment::WithinStep || !self.hand_over(placement, &mut leads) {
                        break;
                    }
                } else {
                    placement.backups.retain(|member| *member != worst);
                }
                *counts.entry(worst).or_insert(1) -= 1;
                if leaves {
                    *moved.entry(worst).or_insert(0) += 1;
                }
            }
        }
        moved
    }

    /// Moves primaries to backups until the counts of any two members that could exchange one differ by at most one; draining members
    /// give all they can. Returns whether any moved.
    pub fn balance(&self, placements: &mut [Placement]) -> bool {
        let mut moved = false;
        loop {
            let counts = primaries(placements);
            let step = placements
                .iter()
                .enumerate()
                .find_map(|(block, placement)| {
                    let mine = if self.is_staying(placement.primary) {
                        count_of(&counts, placement.primary)
                    } else {
                        usize::MAX
                    };
                    placement
                        .backups
                        .iter()
                        .copied()
                        .filter(|backup| self.is_staying(*backup))
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
    pub fn over(&self, full: &[Vec<Member>]) -> Vec<Placement> {
        let mut counts: BTreeMap<Member, usize> = BTreeMap::new();
        let mut placements: Vec<Placement> = Vec::with_capacity(full.len());
        for members in full {
            let primary = members.iter().copied().min_by_key(|member| {
                (
                    !self.is_staying(*member),
                    count_of(&counts, *member),
                    *member,
                )
            });
            let Some(primary) = primary else {
                continue;
            };
            let mut kept = vec![primary];
            while kept.len() < self.wanted() {
                // Members that stay first, as far apart as they are.
                let staying = self.candidates(members);
                let pick = self
                    .pick(&staying, &kept, &counts)
                    .or_else(|| self.pick(members, &kept, &counts));
                let Some(pick) = pick else {
                    break;
                };
                kept.push(pick);
            }
            *counts.entry(primary).or_insert(0) += 1;
            placements.push(Placement {
                primary,
                backups: kept.split_off(1),
                joining: Vec::new(),
            });
        }
        self.balance(&mut placements);
        placements
    }

    /// Blocks with fewer replicas than wanted, and the replicas of the one that has fewest. Replicas in one process count once.
    pub fn degraded(&self, placements: &[Placement]) -> Option<(Vec<BlockId>, u32)> {
        let short: Vec<(BlockId, u32)> = (0..)
            .zip(placements)
            .map(|(block, placement)| {
                let processes: BTreeSet<u32> = placement
                    .replicas()
                    .map(|member| self.domain(member).process)
                    .collect();
                (block, processes.len() as u32)
            })
            .filter(|(_, count)| *count < self.replication)
            .collect();
        let fewest = short.iter().map(|(_, count)| *count).min()?;
        Some((short.iter().map(|(block, _)| *block).collect(), fewest))
    }
}

/// A replica that would be better off elsewhere; the greater the better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Move {
    /// By how much the block's replicas would share fewer processes, then nodes.
    apart: Crowding,
    /// By how much the load would be more even.
    relief: usize,
    from: Member,
    to: Member,
}

#[cfg(test)]
mod tests;
