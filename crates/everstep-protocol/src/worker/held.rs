//! Ranges of slots that a worker computes, delivers to every block's primary, and holds until their step is decided.

use std::collections::BTreeSet;

use super::Effect;
use super::machine::Worker;
use crate::ids::{BlockId, Member, SlotRange};
use crate::message::{Digest, Message, Numerics};
use crate::retry::Retry;
use crate::tree::{Insertion, TreeSum};

/// What one block's primary knows of the range.
#[derive(Debug)]
pub(super) struct Delivery {
    /// Members that hold it, in any view.
    pub(super) acked: BTreeSet<Member>,
    /// The primary it was sent to last.
    pub(super) sent: Option<(Member, Retry)>,
}

/// A maximal range of a lease.
#[derive(Debug)]
pub(super) struct Held<N: Numerics> {
    pub(super) range: SlotRange,
    /// The sums under construction, by block; empty once complete.
    trees: Vec<TreeSum<N::Gradient>>,
    /// The complete sums, by block; empty before.
    pub(super) sums: Vec<N::Gradient>,
    /// Digests of its audited slots.
    digests: Vec<(u32, Digest)>,
    pub(super) deliveries: Vec<Delivery>,
    /// Blocks whose current primary has not acknowledged it.
    pub(super) num_waiting: usize,
    /// Whether the leader was told.
    pub(super) delivered: bool,
}

impl<N: Numerics> Held<N> {
    pub(super) fn new(range: SlotRange, num_blocks: u32) -> Self {
        Self {
            range,
            trees: (0..num_blocks).map(|_| TreeSum::new(range)).collect(),
            sums: Vec::new(),
            digests: Vec::new(),
            deliveries: (0..num_blocks)
                .map(|_| Delivery {
                    acked: BTreeSet::new(),
                    sent: None,
                })
                .collect(),
            num_waiting: num_blocks as usize,
            delivered: false,
        }
    }

    pub(super) fn is_complete(&self) -> bool {
        self.trees.is_empty()
    }

    /// Primaries have nothing of it any more.
    pub(super) fn push_again(&mut self) {
        for delivery in &mut self.deliveries {
            delivery.acked.clear();
            delivery.sent = None;
        }
        self.delivered = false;
    }

    /// Adds a slot's gradients; returns whether the range is complete now.
    pub(super) fn add(
        &mut self,
        numerics: &N,
        slot: u32,
        gradients: Vec<N::Gradient>,
        digest: Option<Digest>,
    ) -> bool {
        if self.is_complete() {
            return false;
        }
        self.digests.extend(digest.map(|digest| (slot, digest)));
        let leaf = SlotRange::new(slot, slot + 1);
        for (tree, gradient) in self.trees.iter_mut().zip(gradients) {
            let inserted = tree.insert(leaf, gradient, |left, right| numerics.sum(left, right));
            debug_assert_ne!(
                inserted,
                Insertion::NotANode,
                "a slot of the range is a leaf"
            );
        }
        let sums: Vec<N::Gradient> = self
            .trees
            .iter()
            .filter_map(|tree| tree.complete().cloned())
            .collect();
        let complete = sums.len() == self.trees.len();
        if complete {
            self.sums = sums;
            self.trees.clear();
        }
        complete
    }
}

impl<N: Numerics> Worker<N> {
    /// Sends complete ranges to primaries that have neither acknowledged them nor been asked lately.
    pub(super) fn push(&mut self, now_ms: u64) {
        let (Some(step), Some(view)) = (self.step, &self.view) else {
            return;
        };
        for held in self.held.iter_mut().filter(|held| held.is_complete()) {
            held.num_waiting = 0;
            let blocks = held.deliveries.iter_mut().zip(&held.sums);
            for ((block, (delivery, sum)), placement) in (0..).zip(blocks).zip(&view.placements) {
                let primary = placement.primary;
                if delivery.acked.contains(&primary) {
                    continue;
                }
                held.num_waiting += 1;
                match &mut delivery.sent {
                    Some((to, retry)) if *to == primary => {
                        if !retry.fires(now_ms) {
                            continue;
                        }
                    }
                    sent => {
                        *sent = Some((primary, Retry::new(now_ms, self.config.resend_ms)));
                    }
                }
                self.out.push(Effect::Send {
                    to: primary,
                    message: Message::Partial {
                        lineage: self.lineage,
                        step,
                        range: held.range,
                        block,
                        gradient: sum.clone(),
                        digests: held.digests.clone(),
                    },
                });
            }
        }
        self.tell_delivered();
    }

    /// Tells the leader of ranges that every current primary has acknowledged.
    fn tell_delivered(&mut self) {
        let (Some(step), Some(view)) = (self.step, &self.view) else {
            return;
        };
        let view = view.id();
        let mut delivered = Vec::new();
        for held in &mut self.held {
            if held.num_waiting > 0 {
                held.delivered = false;
            } else if !held.delivered {
                held.delivered = true;
                delivered.push(held.range);
            }
        }
        for range in delivered {
            self.send_leader(Message::Delivered { view, step, range });
        }
    }

    pub(super) fn on_partial_ack(
        &mut self,
        now_ms: u64,
        from: Member,
        range: SlotRange,
        block: BlockId,
    ) {
        let index = block as usize;
        let primary = self
            .view
            .as_ref()
            .and_then(|view| view.placements.get(index))
            .map(|placement| placement.primary);
        for held in &mut self.held {
            let Some(delivery) = held.deliveries.get_mut(index) else {
                continue;
            };
            if held.range == range && held.trees.is_empty() {
                if delivery.acked.insert(from) && Some(from) == primary {
                    held.num_waiting = held.num_waiting.saturating_sub(1);
                }
            } else if let Some((to, retry)) = &mut delivery.sent
                && *to == from
            {
                retry.postpone(now_ms);
            }
        }
        self.tell_delivered();
    }
}
