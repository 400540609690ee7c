// Starting a kernel on a stream, or on the emulator.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../attention.h"
#include "ptx.h"

namespace longpretrain::cuda {

// What every block may use without asking.
constexpr size_t kPlainSharedBytes = 48 << 10;
// Of a block with less it does not matter how much of its multiprocessor's memory is shared.
constexpr size_t kFewSharedBytes = 1 << 10;

inline std::string describe_launch(const char* name, dim3 grid, int threads, size_t shared_bytes) {
  return std::string("CUDA kernel ") + name + " (grid " + std::to_string(grid.x) + " x " +
         std::to_string(grid.y) + " x " + std::to_string(grid.z) + ", " + std::to_string(threads) +
         " threads, " + std::to_string(shared_bytes) + " bytes of shared memory)";
}

#ifdef __CUDACC__

// As many blocks as registers allow are to find room at once: the driver is told that the first
// cache may be small, of which it would otherwise keep what one block leaves.
template <class... Params>
cudaError_t ask_for_shared(void (*kernel)(Params...), size_t shared_bytes) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes >= kFewSharedBytes) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess && shared_bytes > kPlainSharedBytes) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  return error;
}

#endif

// `name` is the kernel's in the source, as profilers show it; `stream` is a cudaStream_t. A grid
// without blocks is no work. Throws std::runtime_error when the
// kernel cannot be started; what goes wrong while it runs shows at the stream's next
// synchronisation.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, int threads,
            size_t shared_bytes, void* stream, const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef __CUDACC__
  cudaError_t error = ask_for_shared(kernel, shared_bytes);
  if (error == cudaSuccess) {
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // told here, it is nobody else's
    throw std::runtime_error(describe_launch(name, grid, threads, shared_bytes) + ": " +
                             cudaGetErrorString(error));
  }
#else
  static_cast<void>(stream);
  emulation::launch(name, kernel, grid, dim3(threads), shared_bytes, args...);
#endif
}

// The head sizes that kernels are compiled for.
constexpr bool is_head_size(int64_t D) { return D == 32 || D == 64 || D == 128; }

template <class T, class Body>
void with_head_size(int64_t D, Body body) {
  if (D == 32) return body(T{}, std::integral_constant<int, 32>{});
  if (D == 64) return body(T{}, std::integral_constant<int, 64>{});
  if (D == 128) return body(T{}, std::integral_constant<int, 128>{});
  throw std::logic_error("CUDA kernels: the head size is none of 32, 64 and 128");
}

// Calls body(T{}, D): T is BFloat16, Float16 or Float32, D an std::integral_constant.
template <class Body>
void with_types(DType dtype, int64_t D, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return with_head_size<Float32>(D, body);
    case DType::kBFloat16:
      return with_head_size<BFloat16>(D, body);
    case DType::kFloat16:
      return with_head_size<Float16>(D, body);
  }
}

}  // namespace longpretrain::cuda
