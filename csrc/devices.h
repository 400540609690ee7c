// Where a call of the operators runs, and what that asks of its tensors. A part of bindings.cpp.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "memory.h"

namespace longpretrain {
namespace {

constexpr const char* kCudaHeadSizes = "32, 64, 128";

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

// Runs `make`, which allocates. Torch's C interface leaves nothing of an error but its words: here
// they learn what the memory was for. longpretrain/attention/memory.py reads this.
template <class Make>
Tensor allocating(const std::string& what, int64_t num_bytes, Make make) {
  try {
    return make();
  } catch (const std::exception& error) {
    throw std::runtime_error("allocating " + what + " (" + std::to_string(num_bytes) +
                             " bytes): " + error.what());
  }
}

Tensor new_tensor(const std::string& what, const Tensor& like, Shape shape, ScalarType dtype) {
  int64_t num_bytes = dtype == ScalarType::Float ? 4 : dtype == ScalarType::Byte ? 1 : 2;
  for (const int64_t size : shape) num_bytes *= size;
  return allocating(what, num_bytes, [&] { return torch::stable::new_empty(like, shape, dtype); });
}

// Tasks differ in length (blocks at an edge, global rows), so threads take one after the other
// instead of a share each. An exception must not pass torch's C interface: the first one is kept,
// the tasks not yet begun are skipped, and the caller's thread throws it.
struct Tasks {
  int64_t num_tasks;
  void (*body)(void* context, int64_t task);
  void* context;
  std::atomic<int64_t> next{0};
  std::atomic_flag has_error{};
  std::exception_ptr error{};

  void drain() noexcept {
    int64_t task;
    while ((task = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks) {
      try {
        body(context, task);
      } catch (...) {
        if (!has_error.test_and_set()) error = std::current_exception();
        next.store(num_tasks, std::memory_order_relaxed);
      }
    }
  }
};

// On the threads of torch.set_num_threads; on this one alone when it is one of them.
void parallel_for(int64_t num_tasks, void (*body)(void* context, int64_t task), void* context) {
  Tasks tasks{num_tasks, body, context};
  const int64_t threads = std::min<int64_t>(num_tasks, torch::stable::get_num_threads());
  if (threads <= 1) {
    tasks.drain();
  } else {
    torch::stable::parallel_for(0, threads, 1, [&tasks](int64_t, int64_t) { tasks.drain(); });
  }
  if (tasks.error) std::rethrow_exception(tasks.error);
}

// The CPU kernels, on torch's threads.
struct OnCpu {
  static constexpr bool kReadsValues = true;
  static constexpr int64_t kRowAlignment = 1;  // bytes

  explicit OnCpu(const Tensor&) {}
  static void check_head_size(int64_t) {}

  static Tensor allocate(const char* what, const Tensor& like, Shape shape, ScalarType dtype) {
    Tensor made = new_tensor(what, like, shape, dtype);
    advise_huge_pages(made.mutable_data_ptr(), made.numel() * (dtype == ScalarType::Float ? 4 : 2));
    return made;
  }
  static void run(const AttentionParams& params) {
    with_scratch([&] { attention_forward_cpu(params, parallel_for); });
  }
  static void run(const AttentionBackwardParams& params) {
    with_scratch([&] { attention_backward_cpu(params, parallel_for); });
  }

 private:
  template <class Body>
  static void with_scratch(Body body) {
    try {
      body();
    } catch (const std::bad_alloc&) {
      throw std::runtime_error("allocating scratch memory: out of memory");
    }
  }
};

#ifdef LONGPRETRAIN_EMULATED

struct DeviceAndStream {
  explicit DeviceAndStream(int32_t) {}
  void* stream() const { return nullptr; }
};

#else

// Makes a device the current one as long as it lives.
struct DeviceAndStream {
  torch::stable::accelerator::DeviceGuard guard;
  int32_t device;

  explicit DeviceAndStream(int32_t number) : guard(number), device(number) {}
  void* stream() const {
    return torch::stable::accelerator::getCurrentStream(device).nativeHandle();
  }
};

#endif

#if defined(WITH_CUDA) || defined(LONGPRETRAIN_EMULATED)

// The CUDA kernels, on the current stream of q's device. The host waits for nothing, so no tensor's
// values are looked at: whatever they are, the kernels touch nothing but the tensors.
class OnCuda {
 public:
  static constexpr bool kReadsValues = false;
  static constexpr int64_t kRowAlignment = 16;

  explicit OnCuda(const Tensor& q) : q_(q), device_(q.get_device_index()) {}

  static void check_head_size(int64_t head_size) {
    STD_TORCH_CHECK(head_size == 32 || head_size == 64 || head_size == 128, "the head size ",
                    head_size, " is none of ", kCudaHeadSizes);
  }

  static Tensor allocate(const char* what, const Tensor& like, Shape shape, ScalarType dtype) {
    return new_tensor(what, like, shape, dtype);
  }
  void run(const AttentionParams& params) const {
    const Tensor workspace = new_workspace(cuda_workspace_bytes(params, false));
    attention_forward_cuda(params, workspace.mutable_data_ptr(), device_.stream());
  }
  void run(const AttentionBackwardParams& params) const {
    const Tensor workspace = new_workspace(cuda_workspace_bytes(params, true));
    attention_backward_cuda(params, workspace.mutable_data_ptr(), device_.stream());
  }

  // In words; empty when the kernels can run there.
  static std::string why_not(int64_t device) {
    const DeviceAndStream current(static_cast<int32_t>(device));
    return cuda_why_not();
  }

 private:
  // The kernels may still run when it goes back to torch, which hands it out in the stream's order.
  Tensor new_workspace(size_t num_bytes) const {
    return new_tensor("scratch memory", q_, {static_cast<int64_t>(num_bytes)}, ScalarType::Byte);
  }

  const Tensor& q_;
  DeviceAndStream device_;
};

#else

// A build without CUDA kernels.
struct OnCuda {
  static std::string why_not(int64_t) {
    return "the compiled library has no CUDA kernels: with the CUDA toolkit (nvcc 12 or newer) "
           "installed, install longpretrain once more with LONGPRETRAIN_CUDA=1";
  }
};
std::string cuda_kernels() { return "none"; }

#endif

}  // namespace
}  // namespace longpretrain
