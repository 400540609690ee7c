// The forward pass of the real kernels: fp32, heads of 32 numbers, causal or not, with dropout.
#include "attention.h"
#include "cuda/kernels.h"
#include "program.h"

namespace longpretrain::cuda {

// operator.cu names the backward pass as well; its kernels would take long to compile.
void window_backward_keys(const Problem&, DType, void*) { std::abort(); }
void window_backward_queries(const Problem&, DType, void*) { std::abort(); }
void global_rows_backward(const Problem&, DType, void*) { std::abort(); }
void global_columns_backward(const Problem&, DType, void*) { std::abort(); }

}  // namespace longpretrain::cuda

// Numbers B, N, H, window, dilation, causal, drop_below; q, k and v in, out out. The seed of batch
// row b is b + 1.
LONGPRETRAIN_PART(forward) {
  longpretrain::AttentionParams p;
  p.B = arguments[0];
  p.N = p.M = arguments[1];
  p.H = arguments[2];
  p.D = 32;
  p.one_sided_window = arguments[3];
  const std::vector<int64_t> dilation_H(p.H, arguments[4]);
  p.dilation_H = dilation_H.data();
  p.causal = arguments[5] != 0;
  p.drop_below = static_cast<int32_t>(arguments[6]);
  p.scale = 0.25f;

  std::vector<float> numbers = read_input<float>();
  const int64_t size = p.B * p.N * p.H * p.D;
  std::vector<float> out(size, NAN), lse(p.B * p.N * p.H, NAN);
  const auto tensor = [&](float* data) {
    return longpretrain::TensorBNHD{data, p.N * p.H * p.D, p.H * p.D, p.D};
  };
  p.q = tensor(numbers.data());
  p.k = tensor(numbers.data() + size);
  p.v = tensor(numbers.data() + 2 * size);
  p.out = tensor(out.data());
  p.lse_BNH = lse.data();
  std::vector<int64_t> seeds;
  for (int64_t b = 0; b < p.B; ++b) seeds.push_back(b + 1);
  if (p.drop_below > 0) p.dropout_seed_B = seeds.data();

  const size_t num_bytes = longpretrain::cuda_workspace_bytes(p, false);
  void* workspace = std::aligned_alloc(256, num_bytes / 256 * 256 + 256);
  longpretrain::attention_forward_cuda(p, workspace, nullptr);
  std::free(workspace);
  write_output(out);
}
