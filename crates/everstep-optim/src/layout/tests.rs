use proptest::prelude::*;

use super::Update::{Balance, Decayed, Muon, Plain};
use super::*;

fn spec(name: &str, shape: &[usize], update: Update) -> ParameterSpec {
    ParameterSpec {
        name: name.into(),
        shape: shape.into(),
        init: Init::Zeros,
        update,
        group: 0,
    }
}

#[test]
fn blocks_are_near_equal_and_stay_in_their_group() {
    let layout = Layout::new(
        vec![
            spec("a", &[5, 4], Decayed),
            spec("b", &[3], Decayed),
            spec("c", &[7], Plain),
        ],
        10,
    )
    .unwrap();
    let blocks: Vec<_> = layout
        .blocks()
        .iter()
        .map(|block| (block.offset, block.len, block.update))
        .collect();
    assert_eq!(
        blocks,
        [
            (0, 8, Decayed),
            (8, 8, Decayed),
            (16, 7, Decayed),
            (23, 7, Plain)
        ]
    );
    assert_eq!((layout.num_elements(), layout.num_blocks()), (30, 4));
    assert_eq!(
        (layout.offset(0), layout.offset(1), layout.offset(2)),
        (0, 20, 23)
    );
    let segments: Vec<_> = layout.segments(2).collect();
    let expected = [
        Segment {
            parameter: 0,
            parameter_range: 16..20,
            block_range: 0..4,
        },
        Segment {
            parameter: 1,
            parameter_range: 0..3,
            block_range: 4..7,
        },
    ];
    assert_eq!(segments, expected);
}

#[test]
fn unusable_parameters_are_refused() {
    let error = |parameters, block_elements| Layout::new(parameters, block_elements).unwrap_err();
    assert_eq!(error(vec![], 1), LayoutError::NoParameters);
    assert_eq!(
        error(vec![spec("a", &[1], Decayed)], 0),
        LayoutError::EmptyBlocks
    );
    let order = vec![
        spec("a", &[1], Decayed),
        spec("b", &[1], Plain),
        spec("c", &[1], Decayed),
    ];
    assert_eq!(
        error(order, 1),
        LayoutError::GroupOrder { name: "c".into() }
    );
    let twice = vec![spec("a", &[1], Decayed), spec("a", &[1], Decayed)];
    assert_eq!(
        error(twice, 1),
        LayoutError::DuplicateName { name: "a".into() }
    );
    for shape in [vec![3, 0], vec![usize::MAX, 2], vec![usize::MAX / 8]] {
        let parameters = vec![spec("a", &[1], Decayed), spec("b", &shape, Decayed)];
        assert_eq!(
            error(parameters, 1),
            LayoutError::Shape {
                name: "b".into(),
                shape
            }
        );
    }
    let blocks = error(vec![spec("a", &[1 << 40], Decayed)], 2);
    assert_eq!(
        blocks,
        LayoutError::TooManyBlocks {
            num_blocks: 1 << 39
        }
    );
    for std in [f32::NAN, f32::INFINITY, -1.0] {
        let parameter = ParameterSpec {
            init: Init::Normal { std },
            ..spec("a", &[1], Decayed)
        };
        assert!(matches!(error(vec![parameter], 1), LayoutError::Std { .. }));
    }
}

#[test]
fn a_block_belongs_to_one_group() {
    let of = |group, spec| ParameterSpec { group, ..spec };
    let layout = |groups: [u8; 4]| {
        let parameters = vec![
            of(groups[0], spec("a", &[5], Decayed)),
            of(groups[1], spec("b", &[5], Decayed)),
            of(groups[2], spec("c", &[3], Plain)),
            of(groups[3], spec("d", &[3], Plain)),
        ];
        Layout::new(parameters, 8).unwrap()
    };
    let blocks = |layout: &Layout| -> Vec<(usize, u8)> {
        layout
            .blocks()
            .iter()
            .map(|block| (block.len, block.group))
            .collect()
    };
    let grouped = layout([0, 2, 1, 0]);
    assert_eq!(blocks(&grouped), [(5, 0), (5, 2), (3, 1), (3, 0)]);
    let plain = layout([0; 4]);
    assert_eq!(blocks(&plain), [(5, 0), (5, 0), (6, 0)]);
    assert_eq!(blocks(&layout([1; 4])), [(5, 1), (5, 1), (6, 1)]);
    assert_ne!(layout([1; 4]).digest(), plain.digest());
}

#[test]
fn scalars_have_one_element() {
    let layout = Layout::new(vec![spec("a", &[], Plain)], 8).unwrap();
    assert_eq!(
        layout.blocks(),
        [Block {
            offset: 0,
            len: 1,
            update: Plain,
            group: 0,
        }]
    );
}

#[test]
fn digest_tells_layouts_apart() {
    let base = vec![spec("a", &[2, 6], Decayed), spec("b", &[3], Plain)];
    let digest = |parameters: &[ParameterSpec], block_elements| {
        Layout::new(parameters.to_vec(), block_elements)
            .unwrap()
            .digest()
    };
    let mut variants = vec![digest(&base, 100), digest(&base, 2)];
    let mut vary = |change: fn(&mut Vec<ParameterSpec>)| {
        let mut parameters = base.clone();
        change(&mut parameters);
        variants.push(digest(&parameters, 100));
    };
    vary(|parameters| parameters[0].name = "c".into());
    vary(|parameters| parameters[0].shape = vec![6, 2]);
    vary(|parameters| parameters[1].init = Init::Ones);
    vary(|parameters| parameters[1].init = Init::Normal { std: 0.5 });
    vary(|parameters| parameters[1].init = Init::Normal { std: 0.25 });
    vary(|parameters| parameters[1].update = Decayed);
    vary(|parameters| parameters[1].update = Muon);
    vary(|parameters| parameters[1].update = Balance { rate: 1e-3 });
    vary(|parameters| parameters[1].update = Balance { rate: 1e-2 });
    for (index, variant) in variants.iter().enumerate() {
        assert!(!variants[..index].contains(variant), "variant {index}");
    }
    assert_eq!(digest(&base, 100), digest(&base, 1000), "the same blocks");
    assert_eq!(variants[0].to_hex().as_str(), PINNED);
}
const PINNED: &str = "f77dffe1c8459c3d4b8380533abc0ead50b7fe23c9040b1d4c7c2a5d6efcb1ec";

const GROUPS: [Update; 4] = [Decayed, Muon, Plain, Balance { rate: 1e-3 }];

proptest! {
    #[test]
    fn everything_is_covered_exactly_once(
        shapes in prop::collection::vec((prop::collection::vec(1usize..6, 0..4), prop::sample::select(&GROUPS)), 1..12),
        block_elements in 1usize..80,
    ) {
        let mut parameters: Vec<ParameterSpec> = shapes
            .iter()
            .enumerate()
            .map(|(index, (shape, update))| spec(&index.to_string(), shape, *update))
            .collect();
        parameters.sort_by_key(|parameter| parameter.update.rank());
        let layout = Layout::new(parameters, block_elements).unwrap();
        let mut next = 0;
        let mut next_in_parameter = vec![0; layout.parameters().len()];
        for (index, block) in layout.blocks().iter().enumerate() {
            prop_assert_eq!(block.offset, next);
            prop_assert!((1..=block_elements).contains(&block.len) || block.update == Muon);
            next += block.len;
            let mut next_in_block = 0;
            for segment in layout.segments(index as u32) {
                prop_assert_eq!(segment.block_range.start, next_in_block);
                prop_assert_eq!(segment.block_range.len(), segment.parameter_range.len());
                next_in_block = segment.block_range.end;
                let parameter = &layout.parameters()[segment.parameter];
                prop_assert_eq!(parameter.update, block.update);
                prop_assert_eq!(segment.parameter_range.start, next_in_parameter[segment.parameter]);
                next_in_parameter[segment.parameter] = segment.parameter_range.end;
                let offset = layout.offset(segment.parameter) + segment.parameter_range.start;
                prop_assert_eq!(offset, block.offset + segment.block_range.start);
            }
            prop_assert_eq!(next_in_block, block.len);
        }
        prop_assert_eq!(next, layout.num_elements());
        for (parameter, covered) in layout.parameters().iter().zip(next_in_parameter) {
            prop_assert_eq!(parameter.num_elements(), covered);
        }
        for run in layout.blocks().chunk_by(|a, b| a.update == b.update) {
            let lens = || run.iter().map(|block| block.len);
            let differ = lens().max().unwrap_or(0) - lens().min().unwrap_or(0);
            prop_assert!(differ <= 1 || run[0].update == Muon);
        }
    }
}
