use proptest::prelude::*;

use super::*;

/// Strings show order and association at once.
fn sum(left: String, right: String) -> String {
    format!("({left}{right})")
}

fn leaf(slot: u32) -> String {
    format!("{slot} ")
}

fn value(node: SlotRange) -> String {
    match node.children() {
        None => leaf(node.start),
        Some((left, right)) => sum(value(left), value(right)),
    }
}

fn nodes(root: SlotRange) -> Vec<SlotRange> {
    let mut found = vec![root];
    if let Some((left, right)) = root.children() {
        found.extend(nodes(left));
        found.extend(nodes(right));
    }
    found
}

#[test]
fn shape_is_pinned() {
    assert_eq!(value(SlotRange::new(0, 1)), "0 ");
    assert_eq!(value(SlotRange::new(0, 3)), "((0 1 )2 )");
    assert_eq!(value(SlotRange::new(0, 6)), "(((0 1 )(2 3 ))(4 5 ))");
    assert_eq!(value(SlotRange::new(0, 7)), "(((0 1 )(2 3 ))((4 5 )6 ))");
}

#[test]
fn maximal_ranges_are_nodes() {
    let root = SlotRange::new(0, 7);
    let ranges = |slots: &[u32]| maximal_ranges(root, slots);
    assert_eq!(
        ranges(&[1, 2, 3, 4]),
        vec![
            SlotRange::new(1, 2),
            SlotRange::new(2, 4),
            SlotRange::new(4, 5)
        ]
    );
    assert_eq!(ranges(&[4, 5, 6]), vec![SlotRange::new(4, 7)]);
    assert_eq!(ranges(&[0, 1, 2, 3, 4, 5, 6, 9]), vec![root]);
    assert_eq!(ranges(&[]), vec![]);
}

#[test]
fn ancestors_replace_descendants_and_hide_them() {
    let mut tree = TreeSum::new(SlotRange::new(0, 4));
    assert_eq!(
        tree.insert(SlotRange::new(1, 2), leaf(1), sum),
        Insertion::Added
    );
    assert_eq!(
        tree.missing(),
        vec![SlotRange::new(0, 1), SlotRange::new(2, 4)]
    );
    assert_eq!(
        tree.insert(SlotRange::new(0, 2), value(SlotRange::new(0, 2)), sum),
        Insertion::Added
    );
    assert_eq!(
        tree.insert(SlotRange::new(0, 1), leaf(0), sum),
        Insertion::Known
    );
    assert_eq!(tree.known().collect::<Vec<_>>(), vec![SlotRange::new(0, 2)]);
    assert!(tree.complete().is_none());
    tree.insert(SlotRange::new(2, 4), value(SlotRange::new(2, 4)), sum);
    assert_eq!(tree.complete(), Some(&value(SlotRange::new(0, 4))));
    tree.clear();
    assert_eq!(tree.missing(), vec![SlotRange::new(0, 4)]);
}

#[test]
fn what_is_no_node_is_refused() {
    let mut tree = TreeSum::new(SlotRange::new(0, 6));
    for (start, end) in [(1, 3), (2, 2), (3, 2), (4, 8), (0, 5), (7, 9)] {
        let range = SlotRange::new(start, end);
        assert_eq!(tree.insert(range, String::new(), sum), Insertion::NotANode);
    }
    assert_eq!(tree.missing(), vec![SlotRange::new(0, 6)]);
}

proptest! {
    #[test]
    fn any_cover_in_any_order_has_the_same_value(num_slots in 1u32..40, picks in prop::collection::vec(any::<prop::sample::Index>(), 0..60)) {
        let root = SlotRange::new(0, num_slots);
        let all = nodes(root);
        let mut tree = TreeSum::new(root);
        for pick in &picks {
            let node = *pick.get(&all);
            tree.insert(node, value(node), sum);
            // Known nodes never overlap, and with the missing ones they cover the root.
            let mut cover: Vec<SlotRange> = tree.known().chain(tree.missing()).collect();
            cover.sort();
            prop_assert_eq!(cover[0].start, 0);
            prop_assert_eq!(cover[cover.len() - 1].end, num_slots);
            prop_assert!(cover.windows(2).all(|pair| pair[0].end == pair[1].start));
        }
        for node in tree.missing() {
            tree.insert(node, value(node), sum);
        }
        prop_assert_eq!(tree.complete(), Some(&value(root)));
    }

    #[test]
    fn maximal_ranges_cover_exactly_and_cannot_be_merged(num_slots in 1u32..70, mask in any::<u128>()) {
        let root = SlotRange::new(0, num_slots);
        let slots: Vec<u32> = (0..num_slots).filter(|slot| mask >> slot & 1 == 1).collect();
        let ranges = maximal_ranges(root, &slots);
        let covered: Vec<u32> = ranges.iter().flat_map(|range| range.start..range.end).collect();
        prop_assert_eq!(&covered, &slots);
        let all = nodes(root);
        for range in &ranges {
            prop_assert!(all.contains(range));
            let larger = all.iter().filter(|node| *node != range && node.covers(range));
            for node in larger {
                prop_assert!((node.start..node.end).any(|slot| !slots.contains(&slot)));
            }
        }
    }
}
