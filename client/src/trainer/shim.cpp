// What libtorch can do and its Rust bindings do not reach: the fused AdamW step (a few kernels for
// all tensors of a model instead of a few for each), gradients that live where we say, and the
// memory of a GPU. shim.rs is the only caller.

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_fused_adamw.h>
#include <c10/core/CachingDeviceAllocator.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "guarded.h"

namespace {

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
// float32 scalar `skip` is 1, the kernels leave everything as it is. They first divide the gradients by the
// float32 scalar `divisor`.
int consort_adamw_step(at::Tensor* const* params, at::Tensor* const* grads, at::Tensor* const* exp_avgs,
                       at::Tensor* const* exp_avg_sqs, size_t count, const at::Tensor* step,
                       const at::Tensor* skip, const at::Tensor* divisor, double lr, double beta1, double beta2, double weight_decay,
                       double eps) {
  return guarded([&] {
    // The optimizer changes leaves that require gradients; none of this is recorded.
    at::NoGradGuard no_grad;
    at::_fused_adamw_(gather(params, count), gather(grads, count), gather(exp_avgs, count),
                      gather(exp_avg_sqs, count), /*max_exp_avg_sqs=*/{}, std::vector<at::Tensor>(count, *step),
                      lr, beta1, beta2, weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false,
                      /*grad_scale=*/*divisor, /*found_inf=*/*skip);
  });
}

// Makes `gradient` the place where backward passes add up the gradient of the leaf `parameter`.
int consort_set_gradient(at::Tensor* parameter, const at::Tensor* gradient) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    parameter->mutable_grad() = *gradient;
  });
}

// Stores a new tensor in `out`, which the caller owns.
int consort_pinned(const at::Tensor* tensor, at::Tensor** out) {
  return guarded([&] { *out = new at::Tensor(tensor->pin_memory()); });
}

int consort_release_cuda_cache() {
  return guarded([&] { at::getDeviceAllocator(at::kCUDA)->emptyCache(); });
}

// What torch.use_deterministic_algorithms(True) does, but for memory that it fills before use.
int consort_set_deterministic() {
  return guarded([&] {
    at::globalContext().setDeterministicFillUninitializedMemory(false);
    at::globalContext().setDeterministicAlgorithms(/*enabled=*/true, /*warn_only=*/false);
    at::globalContext().setDeterministicCuDNN(true);
    at::globalContext().setBenchmarkCuDNN(false);
  });
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

// The most memory of a CUDA device that tensors of this process ever held at once, in bytes.
int consort_cuda_peak_memory(int64_t device, uint64_t* bytes) {
  return guarded([&] {
    using c10::CachingAllocator::StatType;
    at::globalContext().lazyInitDevice(at::kCUDA);
    const auto stats = at::getDeviceAllocator(at::kCUDA)->getDeviceStats(static_cast<c10::DeviceIndex>(device));
    *bytes = stats.allocated_bytes[static_cast<size_t>(StatType::AGGREGATE)].peak;
  });
}

}  // extern "C"
