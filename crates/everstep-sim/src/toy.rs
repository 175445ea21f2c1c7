//! A toy objective with a known result. Gradients and states are hashes, and the sum is neither commutative nor associative,
//! so a slot that is missing, doubled or out of order changes every bit after it.

use everstep_protocol::policy::{History, LossPolicy, Verdict};
use everstep_protocol::random::mix;
use everstep_protocol::{BlockId, Decision, Digest, GradientReport, Numerics, SlotRange, Step};

/// The toy's arithmetic.
#[derive(Clone, Copy, Debug)]
pub struct Toy;

/// A hash of a slot range's gradient in one block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gradient {
    hash: u64,
    /// Slots in the sum.
    num_slots: u64,
    loss_sum: f64,
}

/// One block's state.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct State {
    hash: u64,
    history: History,
}

/// Losses of the toy are noise, so a low threshold makes a few steps of a run a spike.
const POLICY: LossPolicy = LossPolicy {
    spike_sd: 1.2,
    window: 3,
};

fn chain(parts: &[u64]) -> u64 {
    parts.iter().fold(0x1234_5678, |hash, part| {
        mix(hash ^ part).wrapping_mul(3).wrapping_add(*part)
    })
}

impl Numerics for Toy {
    type Gradient = Gradient;
    type Parameters = u64;
    type State = State;

    fn sum(&self, left: Gradient, right: Gradient) -> Gradient {
        Gradient {
            hash: chain(&[left.hash, right.hash, 7]),
            num_slots: left.num_slots + right.num_slots,
            loss_sum: left.loss_sum + right.loss_sum,
        }
    }

    fn report(&self, _block: BlockId, gradient: &Gradient) -> GradientReport {
        GradientReport {
            squared_norm: (gradient.hash >> 12) as f64,
            finite: !gradient.hash.is_multiple_of(23),
            loss_sum: gradient.loss_sum,
            tokens: gradient.num_slots,
            load_excess: 0.0,
            history: History::default(),
        }
    }

    fn decide(&self, step: Step, reports: &[GradientReport]) -> Decision {
        let hash = reports.iter().fold(step.0, |hash, report| {
            chain(&[hash, report.squared_norm.to_bits()])
        });
        let (loss_sum, tokens) = reports
            .first()
            .map(|report| (report.loss_sum, report.tokens))
            .unwrap_or_default();
        let before = reports
            .first()
            .map(|report| report.history)
            .unwrap_or_default();
        let loss = loss_sum / tokens.max(1) as f64;
        let is_finite = reports.iter().all(|report| report.finite);
        let (verdict, history) = POLICY.judge(&before, loss, is_finite);
        Decision {
            apply: verdict == Verdict::Apply,
            is_spike: verdict == Verdict::Spike,
            history,
            scale: (hash >> 40) as f32,
            gradient_norm: (hash >> 12) as f64,
            loss,
            tokens,
            load_excess: 0.0,
        }
    }

    fn history(&self, state: &State) -> History {
        state.history
    }

    fn remember(&self, decision: &Decision, state: &mut State) {
        state.history = decision.history;
    }

    fn apply(
        &self,
        block: BlockId,
        step: Step,
        decision: &Decision,
        gradient: &Gradient,
        state: &mut State,
    ) {
        state.hash = chain(&[
            state.hash,
            u64::from(block),
            step.0,
            u64::from(decision.scale.to_bits()),
            gradient.hash,
        ]);
    }

    fn parameters(&self, block: BlockId, state: &State) -> u64 {
        chain(&[state.hash, u64::from(block), 99])
    }

    fn digest(&self, gradients: &[Gradient]) -> Digest {
        let parts: Vec<u64> = gradients
            .iter()
            .flat_map(|block| [block.hash, block.num_slots, block.loss_sum.to_bits()])
            .collect();
        Digest([chain(&parts), chain(&[chain(&parts), 11])])
    }
}

/// Initial weights of a block.
pub fn initial_state(seed: u64, block: BlockId) -> State {
    State {
        hash: chain(&[seed, u64::from(block)]),
        history: History::default(),
    }
}

/// The gradient of a slot in every block, from the parameters of every block.
pub fn slot_gradient(parameters: &[u64], step: Step, slot: u32) -> Vec<Gradient> {
    let digest = chain(parameters);
    (0..parameters.len() as u64)
        .map(|block| {
            let hash = chain(&[digest, step.0, u64::from(slot), block]);
            Gradient {
                hash,
                num_slots: 1,
                loss_sum: (chain(&[digest, step.0, u64::from(slot)]) >> 44) as f64 / 1000.0,
            }
        })
        .collect()
}

/// What a lying device makes of a gradient. Real ones flip one bit of very many; here any of 2^63 lies, so that the same one does not
/// come twice: a worker that is alone is only found out if it does not repeat itself.
pub(crate) fn lie(gradients: &mut [Gradient], draw: u64) {
    let block = (draw >> 32) as usize % gradients.len();
    gradients[block].hash ^= draw | 1;
}

/// Loss sum and tokens of a validation chunk.
pub fn evaluate(parameters: &[u64], version: Step, chunk: u32) -> (f64, u64) {
    let hash = chain(&[chain(parameters), version.0, u64::from(chunk), 5]);
    ((hash >> 44) as f64 / 1000.0, 1 + hash % 10)
}

/// What an undisturbed run computes, from the definition: no shard, worker or coordinator is involved.
#[derive(Clone, Debug)]
pub struct Expected {
    /// State by version and block.
    pub states: Vec<Vec<State>>,
    /// Report of the reduced gradient by step and block.
    pub reports: Vec<Vec<GradientReport>>,
    /// Decision by step.
    pub decisions: Vec<Decision>,
    /// Mean loss and tokens of the evaluation by version.
    pub evaluations: Vec<(f64, u64)>,
}

impl Expected {
    /// Computes a whole run.
    pub fn compute(
        seed: u64,
        num_steps: u64,
        num_blocks: u32,
        num_slots: u32,
        num_chunks: u32,
    ) -> Self {
        let mut states = vec![
            (0..num_blocks)
                .map(|block| initial_state(seed, block))
                .collect::<Vec<State>>(),
        ];
        let mut expected = Self {
            states: Vec::new(),
            reports: Vec::new(),
            decisions: Vec::new(),
            evaluations: Vec::new(),
        };
        for step in (0..=num_steps).map(Step) {
            let mut state = states[step.0 as usize].clone();
            let parameters: Vec<u64> = (0..)
                .zip(&state)
                .map(|(block, state)| Toy.parameters(block, state))
                .collect();
            let (loss_sum, tokens) = (0..num_chunks).fold((0.0, 0), |(sum, count), chunk| {
                let (loss, tokens) = evaluate(&parameters, step, chunk);
                (sum + loss, count + tokens)
            });
            expected
                .evaluations
                .push((loss_sum / tokens.max(1) as f64, tokens));
            if step.0 == num_steps {
                break;
            }
            let slots: Vec<Vec<Gradient>> = (0..num_slots)
                .map(|slot| slot_gradient(&parameters, step, slot))
                .collect();
            let sums: Vec<Gradient> = (0..num_blocks as usize)
                .map(|block| {
                    fold(SlotRange::new(0, num_slots), &|slot| {
                        slots[slot as usize][block]
                    })
                })
                .collect();
            let report = |(block, (sum, state)): (BlockId, (&Gradient, &State))| GradientReport {
                history: state.history,
                ..Toy.report(block, sum)
            };
            let reports: Vec<GradientReport> =
                (0..).zip(sums.iter().zip(&state)).map(report).collect();
            let decision = Toy.decide(step, &reports);
            if decision.apply {
                for (block, (state, sum)) in (0..).zip(state.iter_mut().zip(&sums)) {
                    Toy.apply(block, step, &decision, sum, state);
                }
            }
            for state in &mut state {
                Toy.remember(&decision, state);
            }
            expected.reports.push(reports);
            expected.decisions.push(decision);
            states.push(state);
        }
        expected.states = states;
        expected
    }
}

/// The sum of a tree node, straight from its definition.
fn fold(node: SlotRange, leaf: &dyn Fn(u32) -> Gradient) -> Gradient {
    match node.children() {
        None => leaf(node.start),
        Some((left, right)) => Toy.sum(fold(left, leaf), fold(right, leaf)),
    }
}
