// What libtorch can do and its Rust bindings do not reach: the fused AdamW step (a few kernels for
// all tensors of a model instead of a few for each), gradients that live where we say, and the
// memory of a GPU. shim.rs is the only caller.
//
// Every function returns 0, or 1 after storing what went wrong for consort_last_error():
// no C++ exception may cross into Rust.

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_fused_adamw.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <exception>
#include <optional>
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

// One AdamW step (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, without amsgrad) on
// `count` parameters. `step` is the number of this step, from 1, as a float32 scalar. Where the
// float32 scalar `skip` is 1, the kernels leave everything as it is.
int consort_adamw_step(at::Tensor* const* params, at::Tensor* const* grads, at::Tensor* const* exp_avgs,
                       at::Tensor* const* exp_avg_sqs, size_t count, const at::Tensor* step,
                       const at::Tensor* skip, double lr, double beta1, double beta2, double weight_decay,
                       double eps) {
  return guarded([&] {
    at::_fused_adamw_(gather(params, count), gather(grads, count), gather(exp_avgs, count),
                      gather(exp_avg_sqs, count), /*max_exp_avg_sqs=*/{}, std::vector<at::Tensor>(count, *step),
                      lr, beta1, beta2, weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false,
                      /*grad_scale=*/std::nullopt, /*found_inf=*/*skip);
  });
}

// Makes `gradient` the place where backward passes add up the gradient of the leaf `parameter`.
int consort_set_gradient(at::Tensor* parameter, const at::Tensor* gradient) {
  return guarded([&] { parameter->mutable_grad() = *gradient; });
}

// Free and total memory of a CUDA device, in bytes.
int consort_cuda_memory(int64_t device, uint64_t* free_bytes, uint64_t* total_bytes) {
  return guarded([&] {
    at::globalContext().lazyInitDevice(at::kCUDA);
    const auto [free, total] = at::getDeviceAllocator(at::kCUDA)->getMemoryInfo(static_cast<c10::DeviceIndex>(device));
    *free_bytes = free;
    *total_bytes = total;
  });
}

}  // extern "C"
