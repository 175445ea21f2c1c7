//! Who belongs to the run, and what they know of the current view.

use std::collections::BTreeMap;

use super::Note;
use super::leases::Pace;
use super::machine::{Coordinator, Phase};
use super::placement::{Moment, Rules};
use crate::ids::{BlockId, Member, Role, Step};
use crate::message::{Message, Numerics, Placement, Status, View, ViewId};
use crate::retry::Retry;

/// A member, as its leader sees it.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) member: Member,
    /// What it said it holds, while the leader gathers.
    pub(super) status: Option<Status>,
    /// The newest view that it is known to have.
    pub(super) view: Option<ViewId>,
    view_retry: Retry,
    /// Repeats the lease while tasks are outstanding.
    pub(super) lease_retry: Retry,
    /// How fast it is, if it is a worker.
    pub(super) pace: Pace,
}

/// Blocks that are moved at once when shards join or leave, so that the wire is not full of them.
const MOVES_MAX: usize = 8;

/// How much a status tells: of two from one life in one epoch, the one that tells more is the later one.
fn weight(status: &Status) -> u64 {
    match status {
        Status::Shard { blocks, .. } => blocks
            .iter()
            .map(|block| 2 * block.version.0 + 2 + u64::from(block.reduced.is_some()))
            .sum(),
        Status::Worker { step, held, .. } => step.0 + held.len() as u64,
    }
}

/// Whether this life is a member.
pub(super) fn is_live(peers: &BTreeMap<(Role, u32), Peer>, member: Member) -> bool {
    peers
        .get(&(member.role, member.index))
        .is_some_and(|peer| peer.member == member)
}

impl<N: Numerics> Coordinator<N> {
    pub(super) fn live(&self, role: Role) -> Vec<Member> {
        self.peers
            .values()
            .map(|peer| peer.member)
            .filter(|member| member.role == role)
            .collect()
    }

    /// Members of a role that are trusted and not about to leave.
    pub(super) fn staying(&self, role: Role) -> Vec<Member> {
        let mut members = self.live(role);
        members
            .retain(|member| !self.draining.contains_key(member) && !self.is_quarantined(*member));
        members
    }

    pub(super) fn rules(&self) -> Rules<'_> {
        Rules {
            replication: self.config.replication,
            domains: &self.config.shard_domains,
            draining: self.draining.keys().copied().collect(),
        }
    }

    pub(super) fn is_live(&self, member: Member) -> bool {
        is_live(&self.peers, member)
    }

    /// Whether a message may be taken from this life of its sender. Lives that were declared lost are told to end; those
    /// that the leader does not know yet are asked to say hello.
    pub(super) fn admit(&mut self, now_ms: u64, from: Member, message: &Message<N>) -> bool {
        let actor = (from.role, from.index);
        let epoch = self.epoch;
        let known = self.peers.get(&actor).map(|peer| peer.member);
        let is_lost = self
            .lost
            .get(&actor)
            .is_some_and(|lost| from.incarnation <= *lost);
        if is_lost || known.is_some_and(|known| known.incarnation > from.incarnation) {
            self.note(Note::Expelled { member: from });
            self.send(from, Message::Expelled { epoch });
            return false;
        }
        if let Some(known) = known
            && known.incarnation < from.incarnation
        {
            // A new life speaks, so the old one is over.
            self.lose(now_ms, known);
        }
        let is_greeting = matches!(message, Message::Hello { epoch, .. } if *epoch == self.epoch);
        if is_greeting {
            return true;
        }
        if matches!(message, Message::Hello { .. }) || !self.is_live(from) {
            // What it said was said before it followed this leader, so it may still follow another.
            self.send(from, Message::Announce { epoch });
            return false;
        }
        true
    }

    pub(super) fn on_hello(&mut self, now_ms: u64, from: Member, status: Status) {
        if let Status::Shard { quarantined, .. } = &status {
            self.learn_quarantined(now_ms, quarantined);
        }
        let is_new = !self.is_live(from);
        let resend_ms = self.config.resend_ms;
        let peer = self
            .peers
            .entry((from.role, from.index))
            .or_insert_with(|| Peer {
                member: from,
                status: None,
                view: None,
                view_retry: Retry::new(now_ms, resend_ms),
                lease_retry: Retry::new(now_ms, resend_ms),
                pace: Pace::default(),
            });
        if self.phase == Phase::Gathering {
            let tells_more = peer
                .status
                .as_ref()
                .is_none_or(|known| weight(known) <= weight(&status));
            if tells_more {
                peer.status = Some(status);
            }
            if is_new {
                self.note(Note::MemberJoined { member: from });
            }
            return self.try_gather(now_ms);
        }
        if !is_new {
            return self.send_view(now_ms, from);
        }
        self.note(Note::MemberJoined { member: from });
        match from.role {
            Role::Worker => {
                self.send_view(now_ms, from);
                if self.phase == Phase::Training {
                    self.adopt_held(now_ms, from, &status);
                    self.assign(now_ms);
                }
            }
            Role::Shard => self.join_shard(now_ms, from),
            Role::Coordinator => {}
        }
    }

    fn send_view(&mut self, now_ms: u64, to: Member) {
        let Some(view) = self.view.clone() else {
            return;
        };
        let resend_ms = self.config.resend_ms;
        if let Some(peer) = self.peers.get_mut(&(to.role, to.index)) {
            peer.view_retry = Retry::new(now_ms, resend_ms);
        }
        self.send(to, Message::View(view));
    }

    /// Says the view again to members that have not confirmed it.
    pub(super) fn repeat_views(&mut self, now_ms: u64) {
        let current = self.view_id();
        let due: Vec<Member> = self
            .peers
            .values_mut()
            .filter(|peer| peer.view != current)
            .filter_map(|peer| peer.view_retry.fires(now_ms).then_some(peer.member))
            .collect();
        for member in due {
            if let Some(view) = self.view.clone() {
                self.send(member, Message::View(view));
            }
        }
    }

    /// Makes a new view and tells everybody.
    pub(super) fn publish(&mut self, now_ms: u64, placements: Vec<Placement>, restored_from: Step) {
        self.view_number += 1;
        let same_primaries = self.view.as_ref().is_some_and(|old| {
            old.lineage == self.lineage
                && old.placements.len() == placements.len()
                && old
                    .placements
                    .iter()
                    .zip(&placements)
                    .all(|(old, new)| old.primary == new.primary)
        });
        let degraded = self.rules().degraded(&placements);
        self.view = Some(View {
            epoch: self.epoch,
            number: self.view_number,
            leader: self.me,
            lineage: self.lineage,
            restored_from,
            repair: self.repair,
            quarantined: self.quarantined.clone(),
            placements,
        });
        // Replicas are counted anew in every view.
        self.work.reduced.clear();
        self.work.audits.counted.clear();
        self.work.seeded.clear();
        let (blocks, replicas) = degraded.unwrap_or_default();
        if blocks != self.degraded {
            self.degraded = blocks.clone();
            if !blocks.is_empty() {
                self.note(Note::Degraded { blocks, replicas });
            }
        }
        for member in self
            .peers
            .values()
            .map(|peer| peer.member)
            .collect::<Vec<_>>()
        {
            self.send_view(now_ms, member);
        }
        if !same_primaries {
            self.primaries_since = self.view_number;
            self.doubt_deliveries(now_ms);
        }
    }

    /// Publishes changed placements on the same line.
    fn republish(&mut self, now_ms: u64, placements: Vec<Placement>) {
        let restored_from = self
            .view
            .as_ref()
            .map(|view| view.restored_from)
            .unwrap_or_default();
        self.publish(now_ms, placements, restored_from);
        self.reassign_snapshots();
    }

    fn placements(&self) -> Vec<Placement> {
        self.view
            .as_ref()
            .map(|view| view.placements.clone())
            .unwrap_or_default()
    }

    /// A member is gone for good; another life of it may come.
    pub(super) fn lose(&mut self, now_ms: u64, member: Member) {
        let actor = (member.role, member.index);
        let known = self.peers.get(&actor).map(|peer| peer.member);
        if known.is_some_and(|known| known.incarnation > member.incarnation) {
            return;
        }
        let lost = self.lost.entry(actor).or_default();
        *lost = (*lost).max(member.incarnation);
        let Some(known) = known else {
            return;
        };
        self.peers.remove(&actor);
        self.loaded.remove(&known);
        let released = self
            .draining
            .remove(&known)
            .is_some_and(|drain| drain.is_released());
        self.note(if released {
            Note::MemberLeft { member: known }
        } else {
            Note::MemberLost { member: known }
        });
        if !matches!(self.phase, Phase::Restoring | Phase::Training) {
            return;
        }
        match known.role {
            Role::Worker => self.release_worker(now_ms, known),
            Role::Shard => self.lose_shard(now_ms, known),
            Role::Coordinator => {}
        }
    }

    fn lose_shard(&mut self, now_ms: u64, lost: Member) {
        let mut placements = self.placements();
        if placements
            .iter()
            .all(|placement| placement.role_of(lost).is_none())
        {
            return;
        }
        let removal = self.rules().remove(&mut placements, lost);
        if !removal.orphaned.is_empty() {
            // Nobody has those blocks any more: back to the checkpoint, with whoever is there after a moment.
            return self.gather(now_ms, false);
        }
        for (member, blocks) in removal.promoted {
            self.note(Note::ShardPromoted { member, blocks });
        }
        self.republish(now_ms, placements);
        if self.phase == Phase::Restoring {
            self.try_start(now_ms);
        }
    }

    fn join_shard(&mut self, now_ms: u64, joined: Member) {
        let mut placements = self.placements();
        let rules = self.rules();
        let fills = rules.fill(&mut placements, &[joined]);
        let moves = rules.rebalance(&mut placements, &self.live(Role::Shard), MOVES_MAX);
        if fills || moves {
            self.republish(now_ms, placements);
        } else {
            self.send_view(now_ms, joined);
        }
    }

    /// Blocks that lack replicas for a while get them on shards that have others already; lost shards had their time to return.
    pub(super) fn repair_placement(&mut self, now_ms: u64) {
        let mut placements = self.placements();
        let rules = self.rules();
        if rules.degraded(&placements).is_none() {
            self.degraded_since_ms = None;
        } else {
            let since_ms = self.degraded_since_ms.unwrap_or(now_ms);
            if now_ms >= since_ms.saturating_add(self.config.gather_ms)
                && rules.fill(&mut placements, &self.live(Role::Shard))
            {
                return self.republish(now_ms, placements);
            }
            self.degraded_since_ms = Some(since_ms);
        }
        self.promote_seeded(now_ms);
    }

    /// Members that are about to leave have others take their place in every block, at once.
    pub(super) fn seed_elsewhere(&mut self, now_ms: u64) {
        let mut placements = self.placements();
        if self.rules().fill(&mut placements, &self.live(Role::Shard)) {
            self.republish(now_ms, placements);
        }
    }

    /// A joining replica follows the log. At the version of the open step it is as good as any other.
    pub(super) fn on_seeded(&mut self, now_ms: u64, from: Member, block: BlockId, version: Step) {
        if self.phase != Phase::Training || version != self.work.step {
            return;
        }
        let Some(view) = &self.view else {
            return;
        };
        let joins = |block: &BlockId| {
            view.placements
                .get(*block as usize)
                .is_some_and(|placement| placement.joining.contains(&from))
        };
        if !joins(&block) {
            return;
        }
        let joining: Vec<BlockId> = (0..self.config.num_blocks).filter(joins).collect();
        self.work.seeded.insert((from, block));
        // One view for all blocks of the shard rather than one for each; what is late gets its own at the next tick.
        if joining
            .iter()
            .all(|block| self.work.seeded.contains(&(from, *block)))
        {
            self.promote_seeded(now_ms);
        }
    }

    fn promote_seeded(&mut self, now_ms: u64) {
        let seeded = std::mem::take(&mut self.work.seeded);
        if seeded.is_empty() {
            return;
        }
        let mut placements = self.placements();
        let mut blocks_by_member: BTreeMap<Member, Vec<BlockId>> = BTreeMap::new();
        for (member, block) in seeded {
            let Some(placement) = placements.get_mut(block as usize) else {
                continue;
            };
            if placement.joining.contains(&member) && self.is_live(member) {
                placement.joining.retain(|joining| *joining != member);
                placement.backups.push(member);
                blocks_by_member.entry(member).or_default().push(block);
            }
        }
        for (member, blocks) in blocks_by_member {
            self.note(Note::BackupSeeded { member, blocks });
        }
        self.trim(&mut placements, Moment::WithinStep);
        self.rules()
            .rebalance(&mut placements, &self.live(Role::Shard), MOVES_MAX);
        self.republish(now_ms, placements);
    }

    fn trim(&mut self, placements: &mut [Placement], moment: Moment) {
        let num_staying = self.staying(Role::Shard).len();
        let moved = self.rules().trim(placements, moment, num_staying);
        for (member, count) in moved {
            if let Some(drain) = self.draining.get_mut(&member) {
                drain.num_moved += count;
            }
        }
    }

    /// Between two steps, when every backup is as good as its primary and nothing is in flight: takes surplus replicas out and spreads
    /// primaries evenly. (Within a step workers would have to say their partial sums again.)
    pub(super) fn settle_placement(&mut self, now_ms: u64) {
        let before = self.placements();
        let mut placements = before.clone();
        self.trim(&mut placements, Moment::BetweenSteps);
        self.rules().balance(&mut placements);
        if placements != before {
            self.republish(now_ms, placements);
        }
    }
}
