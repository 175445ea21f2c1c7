// A part of a model that keeps its input only, and is computed again in backward: what libtorch's C++ side can and its Rust binding cannot.

#include "torch.h"

#include <cstdint>
#include <cstdio>
#include <mutex>
#include <stdexcept>

namespace {

// Computes the outputs of the input, which it owns, and hands each to `everstep_output`; not 0 if it failed.
using Compute = int32_t (*)(void* closure, Tensor* input, void* outputs);
using Drop = void (*)(void* closure);

// Rust's closure, for as long as the graph lives.
struct Part : torch::CustomClassHolder {
  Part(void* closure, Compute compute, Drop drop) : closure(closure), compute(compute), drop(drop) {}
  ~Part() override { drop(closure); }

  variable_list operator()(const Tensor& input) const {
    variable_list outputs;
    if (compute(closure, new Tensor(input), &outputs) != 0) {
      throw std::runtime_error("a part of the model could not be computed");
    }
    return outputs;
  }

  void* closure;
  Compute compute;
  Drop drop;
};

Tensor random_state(const Tensor& x) {
  at::Generator generator = at::globalContext().defaultGenerator(x.device());
  std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get_state().clone();
}

void set_random_state(const Tensor& x, const Tensor& state) {
  at::Generator generator = at::globalContext().defaultGenerator(x.device());
  std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(state);
}

struct Recompute : Function<Recompute> {
  static variable_list forward(AutogradContext* context, const Variable& x, at::TensorList parameters,
                               c10::intrusive_ptr<Part> part, bool draws) {
    variable_list kept = {x};
    kept.insert(kept.end(), parameters.begin(), parameters.end());
    context->save_for_backward(kept);
    if (draws) {
      context->saved_data["random"] = random_state(x);
    }
    variable_list outputs = (*part)(x);
    context->saved_data["part"] = c10::IValue::make_capsule(std::move(part));
    return outputs;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    variable_list inputs = context->get_saved_variables();
    auto part = c10::static_intrusive_pointer_cast<Part>(context->saved_data["part"].toCapsule());
    inputs[0] = inputs[0].detach().set_requires_grad(true);
    variable_list outputs;
    {
      at::AutoGradMode with_gradients(true);
      auto random = context->saved_data.find("random");
      if (random == context->saved_data.end()) {
        outputs = (*part)(inputs[0]);
      } else {
        // Whoever draws next must not notice.
        Tensor now = random_state(inputs[0]);
        set_random_state(inputs[0], random->second.toTensor());
        outputs = (*part)(inputs[0]);
        set_random_state(inputs[0], now);
      }
    }
    variable_list used, used_gradients;
    for (size_t index = 0; index < outputs.size(); ++index) {
      if (gradients[index].defined() && outputs[index].requires_grad()) {
        used.push_back(outputs[index]);
        used_gradients.push_back(gradients[index]);
      }
    }
    variable_list found = torch::autograd::grad(used, inputs, used_gradients, false, false, true);
    // The part itself and whether it draws have none.
    found.resize(found.size() + 2);
    return found;
  }
};

}  // namespace

extern "C" void everstep_output(void* outputs, const Tensor* output) {
  static_cast<variable_list*>(outputs)->push_back(*output);
}

// Hands each output, for the receiver to own, to `receive`; not 0 after it said why there are none. Takes the closure in either case.
extern "C" int32_t everstep_recompute(const Tensor* x, const Tensor* const* parameters, int64_t num_parameters, int32_t draws,
                                      void* closure, Compute compute, Drop drop, void* receiver,
                                      void (*receive)(void* receiver, Tensor* output)) try {
  auto part = c10::make_intrusive<Part>(closure, compute, drop);
  variable_list leaves;
  for (int64_t index = 0; index < num_parameters; ++index) {
    leaves.push_back(*parameters[index]);
  }
  for (const Tensor& output : Recompute::apply(*x, at::TensorList(leaves), std::move(part), draws != 0)) {
    receive(receiver, new Tensor(output));
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
