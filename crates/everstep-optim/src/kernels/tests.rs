use proptest::prelude::*;

use super::*;

/// The order that [`squared_norm`] promises, one value at a time.
fn squared_norm_in_order(values: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 16];
    for (index, &value) in values.iter().enumerate() {
        lanes[index % 16] += f64::from(value) * f64::from(value);
    }
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = lanes;
    (((a + i) + (e + m)) + ((c + k) + (g + o))) + (((b + j) + (f + n)) + ((d + l) + (h + p)))
}

/// One element at a time, in single precision.
fn adamw_in_order(state: (f32, f32, f32), gradient: f32, step: &AdamStep) -> (f32, f32, f32) {
    let (parameter, first, second) = state;
    let gradient = gradient * step.scale;
    let first = first + step.first_weight * (gradient - first);
    let second = second * step.second_keep + (step.second_weight * gradient) * gradient;
    let denominator = second.sqrt() * step.root_factor + step.eps;
    (
        parameter * step.keep - step.step_size * (first / denominator),
        first,
        second,
    )
}

proptest! {
    #[test]
    fn vectorised_loops_have_the_bits_of_scalar_ones(
        values in prop::collection::vec((-10f32..10.0, -1f32..1.0, 0f32..1.0, -5f32..5.0), 0..200),
        offset in 0usize..4,
    ) {
        let values = &values[offset.min(values.len())..];
        let step = AdamStep {
            scale: 0.37,
            keep: 0.999,
            first_weight: 0.1,
            second_keep: 0.95,
            second_weight: 0.05,
            root_factor: 1.7,
            eps: 1e-8,
            step_size: 3e-4,
        };
        let mut parameters: Vec<f32> = values.iter().map(|value| value.0).collect();
        let mut first: Vec<f32> = values.iter().map(|value| value.1).collect();
        let mut second: Vec<f32> = values.iter().map(|value| value.2).collect();
        let gradient: Vec<f32> = values.iter().map(|value| value.3).collect();

        prop_assert_eq!(squared_norm(&gradient).to_bits(), squared_norm_in_order(&gradient).to_bits());
        let sum = add(&parameters, &gradient);
        let mut in_place = parameters.clone();
        add_assign(&mut in_place, &gradient);
        prop_assert_eq!(&sum, &in_place);
        for (index, value) in values.iter().enumerate() {
            prop_assert_eq!(sum[index].to_bits(), (value.0 + value.3).to_bits());
        }

        adamw(&mut parameters, &mut first, &mut second, &gradient, &step);
        for (index, value) in values.iter().enumerate() {
            let expected = adamw_in_order((value.0, value.1, value.2), value.3, &step);
            prop_assert_eq!(parameters[index].to_bits(), expected.0.to_bits());
            prop_assert_eq!(first[index].to_bits(), expected.1.to_bits());
            prop_assert_eq!(second[index].to_bits(), expected.2.to_bits());
        }
    }
}

#[test]
fn the_norm_is_finite_exactly_if_all_values_are() {
    assert!(squared_norm(&[f32::MAX; 100]).is_finite());
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for position in [0, 15, 16, 98, 99] {
            let mut values = [1.0; 100];
            values[position] = bad;
            assert!(!squared_norm(&values).is_finite());
        }
    }
}
