// The entry points: one call of the operator is a row of kernels on one stream.
#include <string>

#include "kernels.h"
#include "launch.h"

namespace longpretrain {

size_t cuda_workspace_bytes(const AttentionParams& params, bool backward) {
  return cuda::lay_out(params, backward, nullptr).num_bytes;
}

void attention_forward_cuda(const AttentionParams& params, void* workspace, void* stream) {
  const cuda::Problem whole = cuda::make_problem(params, cuda::lay_out(params, false, workspace));
  cuda::prepare(whole, stream);
  cuda::for_each_launch(params, whole, [&](const cuda::Problem& problem) {
    cuda::window_forward(problem, params.dtype, stream);
    cuda::global_rows(problem, params.dtype, stream);
  });
}

void attention_backward_cuda(const AttentionBackwardParams& params, void* workspace, void* stream) {
  const cuda::Problem whole = cuda::make_problem(params, cuda::lay_out(params, true, workspace));
  cuda::prepare_backward(whole, params.dtype, stream);
  cuda::for_each_launch(params, whole, [&](const cuda::Problem& problem) {
    cuda::window_backward_keys(problem, params.dtype, stream);
    cuda::window_backward_queries(problem, params.dtype, stream);
    cuda::global_rows_backward(problem, params.dtype, stream);
    cuda::global_columns_backward(problem, params.dtype, stream);
  });
}

#ifdef __CUDACC__

namespace {

constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};  // 800 for sm_80

__global__ void nothing() {}

}  // namespace

std::string cuda_kernels() {
  std::string names;
  for (const int architecture : kArchitectures) {
    names += (names.empty() ? "sm_" : ", sm_") + std::to_string(architecture / 10);
  }
  return names;
}

std::string cuda_why_not() {
  // Fails where none of the compiled architectures runs, or the driver is older than the toolkit.
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, nothing);
  if (error == cudaSuccess) return "";
  static_cast<void>(cudaGetLastError());  // told here, it is nobody else's
  return "the CUDA kernels, compiled for " + cuda_kernels() +
         ", do not run on this GPU: " + cudaGetErrorString(error);
}

#else

std::string cuda_kernels() { return "emulated"; }
std::string cuda_why_not() { return ""; }

#endif

}  // namespace longpretrain
