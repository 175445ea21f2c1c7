//! The canonical binary tree over slots, and sums along it.
//!
//! The node over `start..end` splits at `start` plus the largest power of two below its length, down to single slots. The
//! value of a node is the value of its left child plus that of its right child, in this order, so it is a pure function of the
//! step and the range. Whatever set of nodes covers the root, in whatever order they arrive, the root gets the same bits.

use std::collections::BTreeMap;

use crate::ids::SlotRange;

impl SlotRange {
    /// The range `start..end`.
    pub fn new(start: u32, end: u32) -> Self {
        Self { start, end }
    }

    /// Number of slots.
    pub fn num_slots(&self) -> u32 {
        self.end.saturating_sub(self.start)
    }

    /// Whether `slot` is inside.
    pub fn contains(&self, slot: u32) -> bool {
        (self.start..self.end).contains(&slot)
    }

    /// Whether all of `other` is inside.
    pub fn covers(&self, other: &SlotRange) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// The children of a tree node; `None` for a single slot.
    pub fn children(&self) -> Option<(SlotRange, SlotRange)> {
        let length = self.num_slots();
        if length < 2 {
            return None;
        }
        let half = 1 << (31 - (length - 1).leading_zeros());
        let middle = self.start + half;
        Some((
            SlotRange::new(self.start, middle),
            SlotRange::new(middle, self.end),
        ))
    }
}

/// The path from `root` down to `range`, both included; `None` if `range` is not a node of the tree.
fn path(root: SlotRange, range: SlotRange) -> Option<Vec<SlotRange>> {
    if range.num_slots() == 0 || !root.covers(&range) {
        return None;
    }
    let mut nodes = vec![root];
    let mut node = root;
    while node != range {
        let (left, right) = node.children()?;
        node = if left.covers(&range) {
            left
        } else if right.covers(&range) {
            right
        } else {
            return None;
        };
        nodes.push(node);
    }
    Some(nodes)
}

/// The fewest nodes of the tree under `root` that cover exactly `slots`, in slot order. `slots` must be sorted and unique;
/// those outside of `root` are left out.
pub fn maximal_ranges(root: SlotRange, slots: &[u32]) -> Vec<SlotRange> {
    fn descend(node: SlotRange, slots: &[u32], found: &mut Vec<SlotRange>) {
        if slots.is_empty() {
            return;
        }
        if slots.len() as u64 == u64::from(node.num_slots()) {
            found.push(node);
            return;
        }
        if let Some((left, right)) = node.children() {
            let (low, high) = slots.split_at(slots.partition_point(|&slot| slot < right.start));
            descend(left, low, found);
            descend(right, high, found);
        }
    }
    let low = slots.partition_point(|&slot| slot < root.start);
    let high = slots.partition_point(|&slot| slot < root.end);
    let mut found = Vec::new();
    descend(root, &slots[low..high], &mut found);
    found
}

/// What became of a range that was offered to a [`TreeSum`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Insertion {
    /// It is part of the sum now.
    Added,
    /// It was part of the sum already.
    Known,
    /// It is no node of the tree; nothing changed.
    NotANode,
}

/// A sum under construction: disjoint nodes of the tree with their values.
#[derive(Clone, Debug)]
pub struct TreeSum<G> {
    root: SlotRange,
    /// Known nodes by first slot, with their ends.
    nodes: BTreeMap<u32, (u32, G)>,
}

impl<G> TreeSum<G> {
    /// An empty sum over the tree under `root`, which is `0..V` or a node of its tree.
    pub fn new(root: SlotRange) -> Self {
        Self {
            root,
            nodes: BTreeMap::new(),
        }
    }

    /// Adds the value of a node. What a known ancestor covers is ignored, known descendants are replaced, and complete
    /// siblings are summed at once, left before right.
    pub fn insert(
        &mut self,
        range: SlotRange,
        gradient: G,
        mut sum: impl FnMut(G, G) -> G,
    ) -> Insertion {
        let Some(path) = path(self.root, range) else {
            return Insertion::NotANode;
        };
        if path.iter().any(|node| self.has(*node)) {
            return Insertion::Known;
        }
        let descendants: Vec<u32> = self
            .nodes
            .range(range.start..range.end)
            .map(|(&start, _)| start)
            .collect();
        for start in descendants {
            self.nodes.remove(&start);
        }
        let mut value = gradient;
        let mut node = range;
        for parent in path.iter().rev().skip(1) {
            let Some((left, right)) = parent.children() else {
                break;
            };
            let sibling = if node == left { right } else { left };
            if !self.has(sibling) {
                break;
            }
            let Some((_, other)) = self.nodes.remove(&sibling.start) else {
                break;
            };
            value = if node == left {
                sum(value, other)
            } else {
                sum(other, value)
            };
            node = *parent;
        }
        self.nodes.insert(node.start, (node.end, value));
        Insertion::Added
    }

    fn has(&self, node: SlotRange) -> bool {
        self.nodes
            .get(&node.start)
            .is_some_and(|(end, _)| *end == node.end)
    }

    /// The value of the root, once everything is here.
    pub fn complete(&self) -> Option<&G> {
        self.nodes
            .get(&self.root.start)
            .filter(|(end, _)| *end == self.root.end)
            .map(|(_, value)| value)
    }

    /// The fewest nodes that are not covered yet, in slot order.
    pub fn missing(&self) -> Vec<SlotRange> {
        let mut slots = Vec::new();
        let mut next = self.root.start;
        for (&start, (end, _)) in &self.nodes {
            slots.extend(next..start);
            next = *end;
        }
        slots.extend(next..self.root.end);
        maximal_ranges(self.root, &slots)
    }

    /// The known nodes, in slot order.
    pub fn known(&self) -> impl Iterator<Item = SlotRange> + '_ {
        self.nodes
            .iter()
            .map(|(&start, (end, _))| SlotRange::new(start, *end))
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.nodes.clear();
    }
}

#[cfg(test)]
mod tests;
