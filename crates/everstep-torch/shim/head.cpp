// The output's product and the cross-entropies of its logits in one node of autograd, which never holds more than some of the logits.

#include "torch.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>

namespace {

// Float32 logits that exist at once, twice at most while they are made of narrower ones.
constexpr int64_t LOGIT_BYTES_MAX = 128 << 20;

// Rows whose logits exist at once: a number of them that divides evenly among threads, the same for all shapes of a model.
int64_t rows_at_once(int64_t vocabulary) {
  return std::max<int64_t>(LOGIT_BYTES_MAX / (4 * vocabulary) / 16 * 16, 16);
}

struct Head : Function<Head> {
  static variable_list forward(AutogradContext* context, const Variable& x_nw, const Variable& weight_vw, const Tensor& targets_n,
                               int64_t ignored, double z_loss, bool with_gradients) {
    const int64_t tokens = x_nw.size(0), step = rows_at_once(weight_vw.size(0));
    const auto floats = x_nw.options().dtype(at::kFloat);
    Tensor losses_n = at::empty({tokens}, floats);
    Tensor objective = at::zeros({}, floats);
    Tensor of_x_nw, of_weight_vw;
    if (with_gradients) {
      of_x_nw = at::empty_like(x_nw);
    }
    for (int64_t first = 0; first < tokens; first += step) {
      const int64_t rows = std::min(step, tokens - first);
      Tensor x_rw = x_nw.narrow(0, first, rows), targets_r1 = targets_n.narrow(0, first, rows).unsqueeze(1);
      Tensor counts_r1 = targets_r1.ne(ignored).to(at::kFloat);
      // Those that are ignored have some target as well, which counts nothing.
      targets_r1 = targets_r1.clamp_min(0);
      Tensor logits_rv = at::linear(x_rw, weight_vw).to(at::kFloat);
      Tensor of_targets_r1 = logits_rv.gather(1, targets_r1), largest_r1 = logits_rv.amax({1}, true);
      Tensor powers_rv = logits_rv.sub_(largest_r1).exp_();
      Tensor totals_r1 = powers_rv.sum({1}, true), sums_r1 = totals_r1.log().add_(largest_r1);
      Tensor losses_r1 = sums_r1.sub(of_targets_r1).mul_(counts_r1);
      losses_n.narrow(0, first, rows).copy_(losses_r1.squeeze(1));
      objective.add_(losses_r1.sum());
      if (z_loss > 0) {
        objective.add_(sums_r1.square().mul_(counts_r1).sum(), z_loss);
      }
      if (!with_gradients) {
        continue;
      }
      // d loss / d logit is probability - 1 for the target, and d sum^2 / d logit is 2 * sum * probability.
      Tensor weights_r1 = z_loss > 0 ? counts_r1.mul(sums_r1.mul(2 * z_loss).add_(1)) : counts_r1;
      Tensor of_logits_rv = powers_rv.mul_(weights_r1.div(totals_r1));
      of_logits_rv.scatter_add_(1, targets_r1, counts_r1.neg());
      of_logits_rv = of_logits_rv.to(x_nw.scalar_type());
      of_x_nw.narrow(0, first, rows).copy_(of_logits_rv.mm(weight_vw));
      Tensor of_weight = of_logits_rv.t().mm(x_rw);
      if (first == 0) {
        // What is added to stays float32 until the end.
        of_weight_vw = rows < tokens ? of_weight.to(at::kFloat) : of_weight;
      } else {
        of_weight_vw.add_(of_weight);
      }
    }
    if (with_gradients) {
      context->saved_data["x"] = of_x_nw;
      context->saved_data["weight"] = of_weight_vw.to(weight_vw.scalar_type());
    }
    context->mark_non_differentiable({losses_n});
    return {objective, losses_n};
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const Tensor& of_objective = gradients[0];
    auto of = [&](const char* input) {
      const Tensor kept = context->saved_data[input].toTensor();
      return kept.mul(of_objective.to(kept.scalar_type()));
    };
    return {of("x"), of("weight"), Variable(), Variable(), Variable(), Variable()};
  }
};

}  // namespace

// Both results are new tensors for the caller to own; false, and none of them, after it said why.
extern "C" bool everstep_head(const Tensor* x_nw, const Tensor* weight_vw, const Tensor* targets_n, int64_t ignored, double z_loss,
                              Tensor** objective, Tensor** losses_n) try {
  const bool with_gradients = at::GradMode::is_enabled() && (x_nw->requires_grad() || weight_vw->requires_grad());
  variable_list made = Head::apply(*x_nw, *weight_vw, *targets_n, ignored, z_loss, with_gradients);
  *objective = new Tensor(made[0]);
  *losses_n = new Tensor(made[1]);
  return true;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return false;
}
