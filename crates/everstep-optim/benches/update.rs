//! One step's arithmetic on a block of the Shakespeare example's size (0.8 million parameters).

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use everstep_optim::{
    BlockState, ComputeDtype, Gradient, Init, Layout, OptimizerConfig, ParameterSpec, Parameters,
    StateDigest, TrainingNumerics, Update,
};
use everstep_protocol::{Numerics, Step};

const NUM_ELEMENTS: usize = 800_000;
/// Matrices of a block that Muon moves, and their sides.
const MATRICES: usize = 32;
const SIDES: [usize; 2] = [64, 128];

/// Muon on a block of small matrices, such as experts have.
fn muon(criterion: &mut Criterion) {
    let parameters = (0..MATRICES)
        .map(|index| ParameterSpec {
            name: format!("weight-{index}"),
            shape: SIDES.to_vec(),
            init: Init::Normal { std: 0.02 },
            update: Update::Muon,
            group: 0,
        })
        .collect();
    let layout = Arc::new(Layout::new(parameters, usize::MAX).expect("they are a layout"));
    let config = OptimizerConfig::new(1e-3, 1000);
    let numerics = TrainingNumerics::new(Arc::clone(&layout), config, ComputeDtype::Float32)
        .expect("defaults are allowed");
    let gradient = Gradient::new(layout.initial_values(2, 0), 1.0, 100);
    let decision = numerics.decide(Step(0), &[numerics.report(0, &gradient)]);
    let mut state = numerics.initial_state(1, 0);
    let mut group = criterion.benchmark_group("muon");
    // Of the products: five iterations of three each.
    let [rows, columns] = SIDES.map(|side| side as u64);
    let additions = rows * rows * (2 * columns + rows) * 5;
    group.throughput(Throughput::Elements(2 * additions * MATRICES as u64));
    group.bench_function("apply", |bencher| {
        bencher.iter(|| numerics.apply(0, Step(1), &decision, &gradient, &mut state));
    });
    group.finish();
}

fn update(criterion: &mut Criterion) {
    let parameter = ParameterSpec {
        name: "weight".into(),
        shape: vec![NUM_ELEMENTS],
        init: Init::Normal { std: 0.02 },
        update: Update::Decayed,
        group: 0,
    };
    let layout =
        Arc::new(Layout::new(vec![parameter], NUM_ELEMENTS).expect("one parameter is a layout"));
    let config = OptimizerConfig::new(1e-3, 1000);
    let numerics = TrainingNumerics::new(Arc::clone(&layout), config, ComputeDtype::Float32)
        .expect("defaults are allowed");
    let state = numerics.initial_state(1, 0);
    let gradient = |seed| Gradient::new(layout.initial_values(seed, 0), 1.0, 100);
    let (left, right) = (gradient(2), gradient(3));
    let decision = numerics.decide(Step(0), &[numerics.report(0, &left)]);

    let mut group = criterion.benchmark_group("update");
    group
        .throughput(Throughput::Elements(NUM_ELEMENTS as u64))
        .sample_size(50);
    group.bench_function("sum", |bencher| {
        bencher.iter_batched_ref(
            || Some(Gradient::new(left.values.as_slice().to_vec(), 1.0, 100)),
            |left| numerics.sum(left.take().expect("made for this call"), right.clone()),
            BatchSize::NumIterations(8),
        );
    });
    group.bench_function("sum into new memory", |bencher| {
        bencher.iter(|| numerics.sum(left.clone(), right.clone()));
    });
    group.bench_function("report", |bencher| {
        bencher.iter(|| numerics.report(0, black_box(&left)))
    });
    group.bench_function("apply", |bencher| {
        let mut state: BlockState = numerics.initial_state(1, 0);
        let mut step = 0;
        bencher.iter(|| {
            numerics.apply(0, Step(step), &decision, &left, &mut state);
            step += 1;
        });
    });
    group.bench_function("parameters in bfloat16", |bencher| {
        bencher
            .iter(|| Parameters::from_master(black_box(&state.parameters), ComputeDtype::Bfloat16));
    });
    group.bench_function("digest", |bencher| {
        bencher.iter(|| StateDigest::of(black_box(&state)))
    });
    group
        .sample_size(10)
        .bench_function("initial values", |bencher| {
            bencher.iter(|| layout.initial_values(black_box(1), 0));
        });
    group.finish();
}

criterion_group!(benches, update, muon);
criterion_main!(benches);
