//! A range of slots that a worker computes, then holds until its step is decided.

use std::collections::BTreeSet;

use crate::ids::{Member, SlotRange};
use crate::message::Numerics;
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
    pub(super) deliveries: Vec<Delivery>,
    /// Whether the leader was told.
    pub(super) delivered: bool,
}

impl<N: Numerics> Held<N> {
    pub(super) fn new(range: SlotRange, num_blocks: u32) -> Self {
        Self {
            range,
            trees: (0..num_blocks).map(|_| TreeSum::new(range)).collect(),
            sums: Vec::new(),
            deliveries: (0..num_blocks)
                .map(|_| Delivery {
                    acked: BTreeSet::new(),
                    sent: None,
                })
                .collect(),
            delivered: false,
        }
    }

    pub(super) fn is_complete(&self) -> bool {
        self.trees.is_empty()
    }

    /// Adds a slot's gradients; returns whether the range is complete now.
    pub(super) fn add(&mut self, numerics: &N, slot: u32, gradients: Vec<N::Gradient>) -> bool {
        if self.is_complete() {
            return false;
        }
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
