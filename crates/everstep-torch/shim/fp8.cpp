// Rounding to scaled 8-bit floats, with a part in backward: what libtorch's C++ side can and its Rust binding cannot.

#include "torch.h"

#include <cstdint>
#include <cstdio>

namespace {

constexpr double E4M3_MAX = 448.0;
constexpr int64_t MANTISSA = 0x007fffff;
constexpr int64_t SIGN_AND_EXPONENT = ~MANTISSA;

// The least powers of two that are not below, exactly: by bits, since logarithms round differently in vectors and outside of them.
Tensor power_of_two_above(const Tensor& x) {
  return x.view(at::kInt).add(MANTISSA).bitwise_and(SIGN_AND_EXPONENT).view(at::kFloat);
}

// The values that E4M3 keeps of the last two dimensions, with one scale for each tile of `rows` by `columns`.
Tensor rounded(const Tensor& x, int64_t rows, int64_t columns) {
  const int64_t height = x.size(-2), width = x.size(-1);
  const int64_t below = (rows - height % rows) % rows, right = (columns - width % columns) % columns;
  Tensor padded = at::constant_pad_nd(x.to(at::kFloat), {0, right, 0, below});
  Tensor tiles = padded.reshape({-1, (height + below) / rows, rows, (width + right) / columns, columns});
  // A tile of zeros has some scale, too.
  Tensor largest = tiles.abs().amax({2, 4}, true).clamp_min(1e-30);
  Tensor scale = power_of_two_above(largest.div(E4M3_MAX));
  Tensor kept = tiles.div(scale).to(at::kFloat8_e4m3fn).to(at::kFloat).mul(scale);
  Tensor whole = kept.reshape(padded.sizes());
  return whole.narrow(-2, 0, height).narrow(-1, 0, width).to(x.scalar_type()).contiguous();
}

// Rounds in forward; the gradient passes as it is.
struct Round : Function<Round> {
  static Variable forward(AutogradContext*, const Variable& x, int64_t rows, int64_t columns) {
    return rounded(x, rows, columns);
  }
  static variable_list backward(AutogradContext*, variable_list gradients) {
    return {gradients[0], Variable(), Variable()};
  }
};

// Passes in forward; the gradient is rounded.
struct RoundGradient : Function<RoundGradient> {
  static Variable forward(AutogradContext* context, const Variable& x, int64_t rows, int64_t columns) {
    context->saved_data["rows"] = rows;
    context->saved_data["columns"] = columns;
    return x.view_as(x);
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const int64_t rows = context->saved_data["rows"].toInt(), columns = context->saved_data["columns"].toInt();
    return {rounded(gradients[0], rows, columns), Variable(), Variable()};
  }
};

}  // namespace

// Both return a new tensor for the caller to own, or null after they said why.
extern "C" Tensor* everstep_round(const Tensor* x, int64_t rows, int64_t columns) try {
  return new Tensor(Round::apply(*x, rows, columns));
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return nullptr;
}

extern "C" Tensor* everstep_round_gradient(const Tensor* x, int64_t rows, int64_t columns) try {
  return new Tensor(RoundGradient::apply(*x, rows, columns));
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return nullptr;
}
