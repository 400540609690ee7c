// Calls the operator's host code, without a device: which kernels would it launch, and how?
//
// Standard input has a call per line:
//   backward dtype B N H D G one_sided_window dilation causal padding documents drop_below
// and standard output the launches of each (runtime.cpp), then `workspace BYTES` and `end`.
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "attention.h"

namespace {

using longpretrain::AttentionBackwardParams;
using longpretrain::TensorBNHD;

// Never read: nothing runs. Aligned as the operator asks for.
void* const kSomewhere = reinterpret_cast<void*>(uintptr_t{1} << 40);

TensorBNHD tensor(int64_t n, int64_t h, int64_t d) { return {kSomewhere, n * h * d, h * d, d}; }

template <class T>
T* pointer_if(bool wanted) {
  return wanted ? static_cast<T*>(kSomewhere) : nullptr;
}

AttentionBackwardParams read_call(const std::vector<int64_t>& x, std::vector<int64_t>& dilation_H) {
  AttentionBackwardParams p;
  p.dtype = static_cast<longpretrain::DType>(x[1]);
  p.B = x[2];
  p.N = p.M = x[3];
  p.H = x[4];
  p.D = x[5];
  p.G = x[6];
  p.one_sided_window = x[7];
  dilation_H.assign(p.H, x[8]);
  p.dilation_H = dilation_H.data();
  p.causal = x[9] != 0;
  p.scale = 0.125f;
  p.padding_BM = pointer_if<uint8_t>(x[10] != 0);
  p.document_BM = pointer_if<int64_t>(x[11] != 0);
  p.drop_below = static_cast<int32_t>(x[12]);
  p.dropout_seed_B = pointer_if<int64_t>(p.drop_below != 0);
  p.q = p.k = p.v = p.out = p.dout = p.dq = p.dk = p.dv = tensor(p.N, p.H, p.D);
  p.lse_BNH = pointer_if<float>(true);
  if (p.G > 0) {
    p.q_global = p.dq_global = tensor(p.G, p.H, p.D);
    p.k_global = p.v_global = p.dk_global = p.dv_global = p.k;
    p.global_index_BG = pointer_if<int64_t>(true);
  }
  return p;
}

}  // namespace

int main() {
  constexpr int kNumbers = 13;
  std::vector<int64_t> call(kNumbers), dilation_H;
  for (;;) {
    for (int64_t& number : call) {
      long long read = 0;
      if (std::scanf("%lld", &read) != 1) {
        // May ask about a kernel that is there for nothing else.
        static_cast<void>(longpretrain::cuda_why_not());
        return 0;
      }
      number = read;
    }
    const AttentionBackwardParams params = read_call(call, dilation_H);
    const bool backward = call[0] != 0;
    const size_t bytes = longpretrain::cuda_workspace_bytes(params, backward);
    if (backward) {
      longpretrain::attention_backward_cuda(params, kSomewhere, nullptr);
    } else {
      longpretrain::attention_forward_cuda(params, kSomewhere, nullptr);
    }
    std::printf("workspace %zu\nend\n", bytes);
  }
}
