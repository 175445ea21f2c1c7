//! Mixture of experts without auxiliary loss (DeepSeek-V3 §2.1.2, equations 12 to 20).
//!
//! Who sees which token is decided in float32 by affinities plus a bias per expert. The bias is no weight that a gradient moves: a slot
//! reports instead by how much each expert's load was above the mean, which is summed over the step like a gradient, and the shards move the
//! bias against it.

use std::ops::Range;

use tch::{Kind, Tensor, no_grad};

use crate::layers::{FeedForward, product};
use crate::weights::Weights;
use everstep_spec::config::{ExpertsConfig, ModelConfig};
use everstep_spec::spec::Names;

/// What a forward pass says of the routing, beside the tokens' losses.
#[derive(Debug, Default)]
pub(crate) struct Routing {
    /// Balance losses of layers, as parts of the objective.
    pub(crate) losses: Vec<Tensor>,
    /// By layer: where the biases are in the flattened vector, and the loads above the mean, times the number of experts: whole numbers,
    /// so that no order of summation matters below 2^24.
    pub(crate) excess: Vec<(Range<usize>, Tensor)>,
}

/// The feed-forward part of a layer with experts. Suffixes: b rows, t tokens, e experts, k experts of a token, w width, f inner width.
#[derive(Debug)]
pub(crate) struct Experts {
    /// The experts' centroids, `[e, w]`.
    router: Tensor,
    bias_e: Tensor,
    bias_range: Range<usize>,
    /// Gate and up of each expert in turn, `[e * 2 * f, w]`.
    gate_up: Tensor,
    /// `[e * w, f]`.
    down: Tensor,
    shared: FeedForward,
    is_fp8: bool,
    config: ExpertsConfig,
}

impl Experts {
    pub(crate) fn new(
        weights: &mut Weights,
        config: &ModelConfig,
        moe: &ExpertsConfig,
        layer: usize,
    ) -> Self {
        let names = Names::of(config);
        let name = |suffix: &str| names.in_layer(layer, suffix);
        let expert = |id: usize, part: &str| name(&format!("mlp.experts.{id}.{part}.weight"));
        let gate_up: Vec<String> = (0..moe.experts)
            .flat_map(|id| [expert(id, "gate_proj"), expert(id, "up_proj")])
            .collect();
        let down: Vec<String> = (0..moe.experts).map(|id| expert(id, "down_proj")).collect();
        let (bias_range, bias_e) = weights.biases(&name("mlp.gate.e_score_correction_bias"));
        let shared = ["gate_proj", "up_proj", "down_proj"]
            .map(|part| name(&format!("mlp.shared_experts.{part}")));
        Self {
            router: weights.leaf(&[name("mlp.gate.weight")]),
            bias_e,
            bias_range,
            gate_up: weights.leaf(&gate_up),
            down: weights.leaf(&down),
            shared: FeedForward::new(weights, config, shared),
            is_fp8: weights.is_fp8,
            config: moe.clone(),
        }
    }

    /// `[tokens, width]` to the same; `columns` tokens are a sequence.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        columns: i64,
        routing: Option<&mut Routing>,
    ) -> Tensor {
        let affinity_te = x
            .to_kind(Kind::Float)
            .linear(&self.router.to_kind(Kind::Float), None::<&Tensor>)
            .sigmoid();
        let chosen_tk = no_grad(|| self.choose(&affinity_te));
        let load_e = chosen_tk
            .flatten(0, 1)
            .bincount(None::<&Tensor>, self.config.experts as i64);
        if let Some(routing) = routing {
            let excess = &load_e * self.config.experts as i64 - chosen_tk.numel() as i64;
            let excess = excess.to_kind(Kind::Float);
            routing.excess.push((self.bias_range.clone(), excess));
            if self.config.balance_loss > 0.0 {
                routing
                    .losses
                    .push(self.balance_loss(&affinity_te, columns));
            }
        }
        self.shared.forward(x)
            + self.routed(
                x,
                &self.gates(&affinity_te, &chosen_tk),
                &chosen_tk,
                &load_e,
            )
    }

    /// The experts of each token, `[t, k]`: the best by affinity plus bias, out of the best groups.
    fn choose(&self, affinity_te: &Tensor) -> Tensor {
        let config = &self.config;
        let mut score_te = affinity_te + &self.bias_e;
        if config.groups > 1 {
            let groups = config.groups as i64;
            let score_tge = score_te.view([-1, groups, config.experts as i64 / groups]);
            let (best_two, _) = score_tge.topk(2, 2, true, false);
            let score_tg = best_two.sum_dim_intlist([2].as_slice(), false, Kind::Float);
            let (_, kept) = score_tg.topk(config.groups_per_token as i64, 1, true, false);
            let others_tg = score_tg
                .ones_like()
                .scatter_value(1, &kept, 0.0)
                .to_kind(Kind::Bool);
            score_te = score_tge
                .masked_fill(&others_tg.unsqueeze(2), f64::NEG_INFINITY)
                .view_as(&score_te);
        }
        score_te
            .topk(config.experts_per_token as i64, 1, true, false)
            .1
    }

    /// The weights of a token's experts, `[t, k]`: the bias is no part of them.
    fn gates(&self, affinity_te: &Tensor, chosen_tk: &Tensor) -> Tensor {
        let gates_tk = affinity_te.gather(1, chosen_tk, false);
        let gates_tk = if self.config.normalize {
            let sum_t1 = gates_tk.sum_dim_intlist([1].as_slice(), true, Kind::Float);
            gates_tk / (sum_t1 + 1e-20)
        } else {
            gates_tk
        };
        gates_tk * self.config.routed_scale
    }

    /// What the chosen experts make of each token, `[t, w]`. Tokens are sorted by expert, so that each expert's are one matrix.
    fn routed(&self, x: &Tensor, gates_tk: &Tensor, chosen_tk: &Tensor, load_e: &Tensor) -> Tensor {
        let [tokens, per_token] = chosen_tk.size()[..] else {
            unreachable!("experts are chosen by token")
        };
        let order = chosen_tk.flatten(0, 1).argsort_stable(true, 0, false);
        let places = order.argsort(0, false);
        let ends_e = load_e.cumsum(0, Kind::Int64).to_kind(Kind::Int);
        let experts = self.config.experts as i64;
        let product = |x: &Tensor, matrices: &Tensor| {
            let matrices = matrices.view([experts, -1, x.size()[1]]);
            // Some expert has an odd number of tokens.
            product(self.is_fp8, false, x, &matrices, |x, matrices| {
                x.internal_grouped_mm(&matrices.transpose(1, 2), Some(&ends_e), None, None)
            })
        };
        let sorted = rows(x, &order.floor_divide_scalar(per_token));
        let halves = product(&sorted, &self.gate_up).chunk(2, 1);
        let made = product(&(halves[0].silu() * &halves[1]), &self.down);
        let made_tkw = rows(&made, &places).view([tokens, per_token, -1]);
        let weighted = made_tkw * gates_tk.unsqueeze(2);
        weighted
            .sum_dim_intlist([1].as_slice(), false, Kind::Float)
            .to_kind(x.kind())
    }

    /// α Σ f_i P_i of each sequence (equations 17 to 20), times its length: the objective is a sum over tokens.
    fn balance_loss(&self, affinity_te: &Tensor, columns: i64) -> Tensor {
        let [experts, per_token] =
            [self.config.experts, self.config.experts_per_token].map(|it| it as i64);
        let share_te = affinity_te / affinity_te.sum_dim_intlist([1].as_slice(), true, Kind::Float);
        let share_be = share_te.view([-1, columns, experts]).sum_dim_intlist(
            [1].as_slice(),
            false,
            Kind::Float,
        ) / columns as f64;
        let count_be = no_grad(|| {
            let (_, best_tk) = affinity_te.topk(per_token, 1, true, false);
            let best = best_tk.view([-1, columns * per_token]);
            let ones = best.ones_like().to_kind(Kind::Float);
            share_be.zeros_like().scatter_add(1, &best, &ones)
        });
        // f_i = E / (K T) times how often; T cancels against the length.
        let factor = self.config.balance_loss * experts as f64 / per_token as f64;
        (count_be * share_be).sum(Kind::Float) * factor
    }
}

/// The rows of `x` at `indices`. Unlike `index_select`, its gradient is summed row by row in the order of `indices` by one thread each.
fn rows(x: &Tensor, indices: &Tensor) -> Tensor {
    let size = [indices.size()[0], x.size()[1]];
    x.gather(0, &indices.unsqueeze(1).expand(size, false), false)
}
