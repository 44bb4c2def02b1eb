// What libtorch can do and its Rust bindings do not reach: the fused AdamW step and the
// clipping of gradients, each a few kernels for all tensors of a model instead of a few
// for each tensor. shim.rs is the only caller.
//
// Every function returns 0, or 1 after storing what went wrong for consort_last_error():
// no C++ exception may cross into Rust.

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <c10/util/Exception.h>

#include <exception>
#include <string>
#include <vector>

namespace {

thread_local std::string last_error;

template <typename Body>
int guarded(Body body) noexcept {
  try {
    // The optimizer changes leaves that require gradients; none of this is recorded.
    at::NoGradGuard no_grad;
    body();
    return 0;
  } catch (const c10::Error& error) {
    last_error = error.what_without_backtrace();
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "an exception of unknown type";
  }
  return 1;
}

// Copies handles, not data: the tensors returned share storage with those of the caller.
std::vector<at::Tensor> gather(at::Tensor* const* tensors, size_t count) {
  std::vector<at::Tensor> gathered;
  gathered.reserve(count);
  for (size_t index = 0; index < count; ++index) gathered.push_back(*tensors[index]);
  return gathered;
}

}  // namespace

extern "C" {

// Valid until the next failing call on the same thread.
const char* consort_last_error() { return last_error.c_str(); }

// One AdamW step (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, without amsgrad)
// on `count` parameters. `steps` holds a float32 scalar for each, which this increments.
int consort_adamw_step(at::Tensor* const* params, at::Tensor* const* grads, at::Tensor* const* exp_avgs,
                       at::Tensor* const* exp_avg_sqs, at::Tensor* const* steps, size_t count, double lr,
                       double beta1, double beta2, double weight_decay, double eps) {
  return guarded([&] {
    auto step_tensors = gather(steps, count);
    // The kernel reads the step count after this step, as bias correction needs it.
    at::_foreach_add_(step_tensors, 1);
    at::_fused_adamw_(gather(params, count), gather(grads, count), gather(exp_avgs, count),
                      gather(exp_avg_sqs, count), /*max_exp_avg_sqs=*/{}, step_tensors, lr, beta1, beta2,
                      weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false);
  });
}

// Scales `grads` in place so that their common L2 norm is at most `max_norm`, and stores a
// new tensor with the norm before that in `*out_norm`, for the caller to free. Nothing is
// read back from the device, so the host does not wait for it.
int consort_clip_grad_norm(at::Tensor* const* grads, size_t count, double max_norm, at::Tensor** out_norm) {
  return guarded([&] {
    auto tensors = gather(grads, count);
    const auto gradient_type = tensors.at(0).scalar_type();
    // Norms of half-precision gradients are accumulated and kept in float32.
    const auto norm_type = gradient_type == at::kDouble ? at::kDouble : at::kFloat;
    const auto norms = at::_foreach_norm(tensors, /*ord=*/2, norm_type);
    const auto norm = at::linalg_vector_norm(at::stack(norms), /*ord=*/2);
    // 1e-6 as in PyTorch's clip_grad_norm_: no division by zero, and equal results.
    const auto coefficient = norm.add(1e-6).reciprocal().mul(max_norm).clamp_max(1.0);
    at::_foreach_mul_(tensors, coefficient.to(gradient_type));
    *out_norm = new at::Tensor(norm);
  });
}

}  // extern "C"
