// Operations of the models with gradients of their own. What they have in common: the gradient of a weight is
// added straight to where the weight's gradient is to be (`grad` of the leaf, set by consort_set_gradient),
// which autograd would do by a tensor of the weight's size and a pass over three of them; and memory that
// autograd would keep is computed anew or never made. kernels.rs is the only caller.
//
// A weight may be of lower precision than its gradient: products are computed in the weight's precision, as
// torch.autocast does, and added up in the gradient's.

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include "guarded.h"

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// x [rows, in] times weight [out, in], transposed. On a CPU in fp32 by oneDNN: its kernels use AVX-512 whoever
// made the processor, MKL's only Intel's own. Per core of a Zen 4, in GFLOP/s: 105 and 95 for the shapes of small
// models, 95 and 60 for those of a vocabulary of 50,257.
at::Tensor product(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                               std::string_view, c10::List<std::optional<at::Scalar>>,
                               std::optional<std::string_view>);
  if (x.is_cpu() && x.scalar_type() == at::kFloat && at::globalContext().userEnabledMkldnn()) {
    static const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    if (found) return found->typed<Signature>().call(x, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
  }
  return at::linear(x, weight, bias);
}

// gradient += left x right, in the gradient's precision.
void add_product(at::Tensor& gradient, const at::Tensor& left, const at::Tensor& right) {
  if (gradient.scalar_type() == left.scalar_type()) {
    gradient.addmm_(left, right);
  } else if (gradient.is_cuda()) {
    at::addmm_out(gradient, gradient, left, right, gradient.scalar_type());
  } else {
    gradient.add_(at::mm(left, right));
  }
}

at::Tensor& gradient_of(const at::Tensor& leaf) {
  at::Tensor& gradient = leaf.mutable_grad();
  TORCH_CHECK(gradient.defined(), "a weight has no place for its gradient");
  return gradient;
}

at::Tensor rows_of(const at::Tensor& x) { return x.reshape({-1, x.size(-1)}); }

// x [..., in] to [..., out], by a weight [out, in], or [in, out] where it is stored input-first.
struct Linear : Function<Linear> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, bool input_first) {
    const at::Tensor input = x.to(weight.scalar_type());
    context->save_for_backward({input, weight, bias.value_or(at::Tensor())});
    context->saved_data["input_first"] = input_first;
    context->saved_data["kind"] = x.scalar_type();
    return product(input, input_first ? weight.t() : weight, bias);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const at::Tensor &input = saved[0], &weight = saved[1], &bias = saved[2];
    const bool input_first = context->saved_data["input_first"].toBool();
    const at::Tensor above = gradients[0].to(weight.scalar_type());
    const at::Tensor above_rows = rows_of(above), input_rows = rows_of(input);
    if (input_first) {
      add_product(gradient_of(weight), input_rows.t(), above_rows);
    } else {
      add_product(gradient_of(weight), above_rows.t(), input_rows);
    }
    if (bias.defined()) {
      at::Tensor& gradient = gradient_of(bias);
      gradient.add_(above_rows.sum(0, /*keepdim=*/false, gradient.scalar_type()));
    }
    at::Tensor below;
    if (context->needs_input_grad(0)) {
      below = product(above, input_first ? weight : weight.t(), std::nullopt)
                  .to(context->saved_data["kind"].toScalarType());
    }
    return {below, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

// Rows of weight [vocabulary, width] by int64 tokens [...].
struct Embedding : Function<Embedding> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& weight, const at::Tensor& tokens) {
    context->save_for_backward({weight, tokens});
    return at::embedding(weight, tokens);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    gradient_of(saved[0]).index_add_(0, saved[1].flatten(), rows_of(gradients[0]));
    return {at::Tensor(), at::Tensor()};
  }
};

// Room for `rows` rows of logits in 16 bits, which begin at multiples of 16 bytes: a GPU's tensor cores want that, and
// few vocabularies are multiples of 8.
at::Tensor logits_room(int64_t rows, const at::Tensor& weight) {
  const int64_t vocabulary = weight.size(0);
  return at::empty({rows, (vocabulary + 7) / 8 * 8}, weight.options()).narrow(1, 0, vocabulary);
}

// The output projection and the cross-entropy after it, `rows` rows at a time: logits of all rows never exist.
// The gradients follow in the same pass, as in Liger (arXiv 2410.10989, section 3.2): that of the weight is added
// at once, that of hidden is kept for the backward pass. So the loss must be propagated back as it is, once.
struct HeadLoss : Function<HeadLoss> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& hidden, const at::Tensor& weight,
                            const at::Tensor& targets, int64_t rows, double scale, bool with_gradients) {
    const at::Tensor all = rows_of(hidden.to(weight.scalar_type()));
    at::Tensor below, room;
    if (with_gradients) below = at::empty_like(all);
    if (all.is_cuda() && weight.scalar_type() != at::kFloat) {
      room = logits_room(std::min(rows, all.size(0)), weight);
    }
    at::Tensor loss = at::zeros({}, all.options().dtype(at::kFloat));
    for (int64_t start = 0; start < all.size(0); start += rows) {
      const int64_t count = std::min(rows, all.size(0) - start);
      const at::Tensor input = all.narrow(0, start, count);
      // -100 stands for a target that does not count, as everywhere.
      const at::Tensor target = targets.narrow(0, start, count).unsqueeze(1);
      const at::Tensor counts = target.ge(0).to(at::kFloat).mul_(scale);
      at::Tensor logits;
      if (room.defined()) {
        logits = room.narrow(0, 0, count);
        at::mm_out(logits, input, weight.t());
      } else {
        logits = product(input, weight, std::nullopt);
      }
      at::Tensor logs = at::log_softmax(logits, 1, at::kFloat);
      const at::Tensor index = target.clamp_min(0);
      const at::Tensor at_target = logs.gather(1, index);
      loss.sub_(at_target.mul(counts).sum());
      if (!with_gradients) continue;
      // d loss / d logits = softmax - one at the target, for rows that count; it takes the room of what is not needed
      // any more.
      at::Tensor slope = logits.scalar_type() == at::kFloat ? logs : logits;
      at::exp_out(slope, logs);
      slope.scatter_(1, index, at_target.exp().sub_(1.0).to(slope.scalar_type()));
      const at::Tensor factor = counts.to(weight.scalar_type());
      add_product(gradient_of(weight), slope.t(), input.mul(factor));
      below.narrow(0, start, count).copy_(product(slope, weight.t(), std::nullopt).mul_(factor));
    }
    if (with_gradients) context->save_for_backward({below.to(hidden.scalar_type()).view_as(hidden)});
    return loss;
  }

  static variable_list backward(AutogradContext* context, const variable_list&) {
    return {context->get_saved_variables()[0], at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor(),
            at::Tensor()};
  }
};

}  // namespace

extern "C" {

// Each stores a new tensor in `out`, which the caller owns.

int consort_linear(const at::Tensor* x, const at::Tensor* weight, const at::Tensor* bias, bool input_first,
                   at::Tensor** out) {
  return guarded([&] {
    const std::optional<at::Tensor> given = bias ? std::optional(*bias) : std::nullopt;
    *out = new at::Tensor(Linear::apply(*x, *weight, given, input_first));
  });
}

int consort_embedding(const at::Tensor* weight, const at::Tensor* tokens, at::Tensor** out) {
  return guarded([&] { *out = new at::Tensor(Embedding::apply(*weight, *tokens)); });
}

int consort_head_loss(const at::Tensor* hidden, const at::Tensor* weight, const at::Tensor* targets, int64_t rows,
                      double scale, at::Tensor** out) {
  return guarded([&] {
    const bool with_gradients = at::GradMode::is_enabled() && hidden->requires_grad();
    *out = new at::Tensor(HeadLoss::apply(*hidden, *weight, *targets, rows, scale, with_gradients));
  });
}

}  // extern "C"
