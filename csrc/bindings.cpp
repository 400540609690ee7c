// The operators as PyTorch sees them. Only this file and its devices.h know torch, and only by its
// stable ABI: one build serves every torch from 2.13 on, with or without CUDA.
//
// What a user passes is checked in Python (longpretrain/attention/checks.py), where values can go
// unread (torch.compile) and backends can be called around it. So all that the kernels' memory
// safety rests on is checked here once more.
//
// Letters: B batch row, N query, M key, H head, D number of a head, G slot of a global token.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "attention.h"
#include "devices.h"

namespace longpretrain {
namespace {

using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kHeadsOfCounter = 1 << 16;  // dropout counts heads in 16 bits
constexpr int64_t kLargestStep = INT32_MAX;   // of a window or a dilation: their product is int64
// Blocks of a kernel's grid are counted in int32; none takes fewer tokens of a batch row.
constexpr int64_t kLargestCount = INT32_MAX, kTokensOfBlock = 64;

struct Call {
  Tensor q_BNHD, k_BMHD, v_BMHD;
  MaybeTensor q_global_BGHD, k_global_BMHD, v_global_BMHD;
  MaybeTensor padding_BM, document_BM, global_index_BG, dropout_seed_B;
  int64_t one_sided_window;
  std::vector<int64_t> dilation_of_heads;
  bool causal;
  int64_t drop_below;
  double scale;
  int64_t q_offset;
};

int32_t device_of(const Tensor& x) { return x.is_cuda() ? x.get_device_index() : -1; }

// What torch says of a step that is never taken may be anything.
TensorBNHD strided(const Tensor& x, void* data) {
  const auto stride = [&](int64_t i) { return x.size(i) == 1 ? 0 : x.stride(i); };
  return {data, stride(0), stride(1), stride(2)};
}

Tensor copied(const char* name, const Tensor& x, Tensor (*copy)(const Tensor&)) {
  return allocating(std::string("a copy of ") + name, x.numel() * x.element_size(),
                    [&] { return copy(x); });
}
Tensor contiguous(const Tensor& x) { return torch::stable::contiguous(x); }
Tensor clone(const Tensor& x) { return torch::stable::clone(x); }

// Checks the tensors of a call, and replaces those that the kernels cannot read as they are.
struct Reader {
  int32_t device;         // as of device_of
  int64_t row_alignment;  // bytes

  void check(const char* name, const Tensor& x, ScalarType dtype,
             std::initializer_list<int64_t> shape) const {
    const auto sizes = x.sizes();
    STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), name,
                    " has another shape than q asks for");
    STD_TORCH_CHECK(x.scalar_type() == dtype, name, " has another dtype than wanted");
    STD_TORCH_CHECK(device_of(x) == device, name, " is on another device than q");
  }

  // A tensor that is read as one piece.
  template <typename T>
  const T* values(const char* name, MaybeTensor& x, ScalarType dtype,
                  std::initializer_list<int64_t> shape) const {
    if (!x) return nullptr;
    check(name, *x, dtype, shape);
    if (!x->is_contiguous()) x = copied(name, *x, contiguous);
    return static_cast<const T*>(x->const_data_ptr());
  }

  // One whose heads' numbers must lie side by side. Any other strides are as good: views of one
  // fused projection and expanded batches are read in place.
  TensorBNHD rows(const char* name, Tensor& x, ScalarType dtype,
                  std::initializer_list<int64_t> shape) const {
    check(name, x, dtype, shape);
    if (x.stride(3) != 1 && x.size(3) != 1) x = copied(name, x, contiguous);
    if (!is_aligned(x)) x = copied(name, x, contiguous);
    if (!is_aligned(x)) x = copied(name, x, clone);  // contiguous, but begins at an odd place
    return strided(x, const_cast<void*>(x.const_data_ptr()));
  }

  bool is_aligned(const Tensor& x) const {
    const int64_t num_bytes = x.scalar_type() == ScalarType::Float ? 4 : 2;
    bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % row_alignment == 0;
    for (int64_t i = 0; i < 3; ++i) {
      aligned = aligned && (x.size(i) == 1 || x.stride(i) * num_bytes % row_alignment == 0);
    }
    return aligned;
  }
};

TensorBNHD written(const Tensor& x) { return strided(x, x.mutable_data_ptr()); }

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "q is neither float32 nor bfloat16 nor float16");
  }
}

// The kernels would leave out a position that is out of range or named before: no silent surprise.
void check_index(const AttentionParams& params) {
  std::vector<int64_t> ordered_G(params.G);
  for (int64_t row = 0; row < params.B; ++row) {
    const int64_t* index_G = params.global_index_BG + row * params.G;
    std::copy(index_G, index_G + params.G, ordered_G.begin());
    std::sort(ordered_G.begin(), ordered_G.end());
    STD_TORCH_CHECK(ordered_G.front() >= -1 && ordered_G.back() < params.M,
                    "global_index_BG names a position out of range");
    const auto first_used = std::lower_bound(ordered_G.begin(), ordered_G.end(), 0);
    STD_TORCH_CHECK(std::adjacent_find(first_used, ordered_G.end()) == ordered_G.end(),
                    "global_index_BG names a position twice");
  }
}

void check_documents(const AttentionParams& params) {
  for (int64_t row = 0; row < params.B; ++row) {
    const int64_t* document_M = params.document_BM + row * params.M;
    STD_TORCH_CHECK(std::is_sorted(document_M, document_M + params.M),
                    "document_BM falls along a row");
  }
}

// Numbers and shapes of q and k; the other tensors are held against them.
void check_sizes(const Call& call) {
  STD_TORCH_CHECK(call.q_BNHD.dim() == 4 && call.k_BMHD.dim() == 4, "q or k is not [B, N, H, D]");
  const int64_t B = call.q_BNHD.size(0), N = call.q_BNHD.size(1), H = call.q_BNHD.size(2),
                D = call.q_BNHD.size(3), M = call.k_BMHD.size(1);
  STD_TORCH_CHECK(N >= 1 && M >= 1 && M <= kLargestSequence, "no or too many tokens");
  STD_TORCH_CHECK(B <= kLargestCount / (M / kTokensOfBlock + 1), "too many rows in the batch: got ",
                  B, ", wanted at most ", kLargestCount / (M / kTokensOfBlock + 1), " with ", M,
                  " keys each");
  STD_TORCH_CHECK(H >= 1 && H < kHeadsOfCounter, "no or too many heads");
  STD_TORCH_CHECK(D >= 1 && D <= kLargestHeadSize, "the head size is 0 or too large");
  STD_TORCH_CHECK(call.q_offset >= 0 && call.q_offset <= M - N, "a query sits beyond the keys");
  STD_TORCH_CHECK(call.one_sided_window >= 0 && call.one_sided_window <= kLargestStep,
                  "one_sided_window is out of range");
  const auto& dilations = call.dilation_of_heads;
  STD_TORCH_CHECK(static_cast<int64_t>(dilations.size()) == H, "not one dilation for each head");
  for (const int64_t dilation : dilations) {
    STD_TORCH_CHECK(dilation >= 1 && dilation <= kLargestStep, "a dilation is out of range");
  }
  STD_TORCH_CHECK(call.drop_below >= 0 && call.drop_below <= 255, "drop_below is out of range");
  STD_TORCH_CHECK(call.drop_below == 0 || call.dropout_seed_B, "dropout without seeds");
  const int own = int{call.q_global_BGHD.has_value()} + int{call.k_global_BMHD.has_value()} +
                  int{call.v_global_BMHD.has_value()};
  STD_TORCH_CHECK(own == (call.global_index_BG ? 3 : 0), "global tokens need all four tensors");
  STD_TORCH_CHECK(!call.global_index_BG ||
                      (call.global_index_BG->dim() == 2 && call.global_index_BG->size(1) >= 1),
                  "global_index_BG is not [B, G], or has no slots");
  STD_TORCH_CHECK(!call.global_index_BG || call.global_index_BG->size(1) <= kLargestSequence,
                  "too many slots of global tokens: got ", call.global_index_BG->size(1),
                  ", wanted at most ", kLargestSequence);
}

// Checks all of the call and points at its tensors, which must outlive `params`.
template <class Where>
void fill(AttentionParams& params, Call& call, const Reader& reader) {
  check_sizes(call);
  Where::check_head_size(call.q_BNHD.size(3));
  const ScalarType dtype = call.q_BNHD.scalar_type();
  params.dtype = dtype_of(call.q_BNHD);
  const int64_t B = params.B = call.q_BNHD.size(0);
  const int64_t N = params.N = call.q_BNHD.size(1);
  const int64_t M = params.M = call.k_BMHD.size(1);
  const int64_t H = params.H = call.q_BNHD.size(2);
  const int64_t D = params.D = call.q_BNHD.size(3);
  const int64_t G = params.G = call.global_index_BG ? call.global_index_BG->size(1) : 0;
  params.q_offset = call.q_offset;
  params.one_sided_window = call.one_sided_window;
  params.dilation_H = call.dilation_of_heads.data();
  params.causal = call.causal;
  params.scale = static_cast<float>(call.scale);
  params.drop_below = static_cast<int32_t>(call.drop_below);

  params.q = reader.rows("q", call.q_BNHD, dtype, {B, N, H, D});
  params.k = reader.rows("k", call.k_BMHD, dtype, {B, M, H, D});
  params.v = reader.rows("v", call.v_BMHD, dtype, {B, M, H, D});
  if (call.global_index_BG) {
    params.q_global = reader.rows("q_global", *call.q_global_BGHD, dtype, {B, G, H, D});
    params.k_global = reader.rows("k_global", *call.k_global_BMHD, dtype, {B, M, H, D});
    params.v_global = reader.rows("v_global", *call.v_global_BMHD, dtype, {B, M, H, D});
  }
  params.padding_BM =
      reader.values<uint8_t>("padding_BM", call.padding_BM, ScalarType::Bool, {B, M});
  params.document_BM =
      reader.values<int64_t>("document_BM", call.document_BM, ScalarType::Long, {B, M});
  params.global_index_BG =
      reader.values<int64_t>("global_index_BG", call.global_index_BG, ScalarType::Long, {B, G});
  params.dropout_seed_B =
      reader.values<int64_t>("dropout_seed_B", call.dropout_seed_B, ScalarType::Long, {B});
  if constexpr (Where::kReadsValues) {
    if (params.G > 0) check_index(params);
    if (params.document_BM != nullptr) check_documents(params);
  }
}

template <class Where>
std::tuple<Tensor, Tensor> forward(Tensor q_BNHD, Tensor k_BMHD, Tensor v_BMHD,
                                   MaybeTensor q_global_BGHD, MaybeTensor k_global_BMHD,
                                   MaybeTensor v_global_BMHD, MaybeTensor padding_BM,
                                   MaybeTensor document_BM, MaybeTensor global_index_BG,
                                   MaybeTensor dropout_seed_B, int64_t one_sided_window,
                                   std::vector<int64_t> dilation_of_heads, bool causal,
                                   int64_t drop_below, double scale, int64_t q_offset) {
  Call call{
      q_BNHD,     k_BMHD,      v_BMHD,          q_global_BGHD,  k_global_BMHD,    v_global_BMHD,
      padding_BM, document_BM, global_index_BG, dropout_seed_B, one_sided_window, dilation_of_heads,
      causal,     drop_below,  scale,           q_offset};
  const Where where(q_BNHD);
  AttentionParams params;
  fill<Where>(params, call, {device_of(q_BNHD), Where::kRowAlignment});
  const int64_t B = params.B, N = params.N, H = params.H;
  Tensor out_BNHD = Where::allocate("the output", q_BNHD, q_BNHD.sizes(), q_BNHD.scalar_type());
  Tensor lse_BNH = Where::allocate("the log-sum-exp", q_BNHD, {B, N, H}, ScalarType::Float);
  if (B > 0) {
    params.out = written(out_BNHD);
    params.lse_BNH = static_cast<float*>(lse_BNH.mutable_data_ptr());
    where.run(params);
  }
  return {out_BNHD, lse_BNH};
}

template <class Where>
std::vector<Tensor> backward(Tensor dout_BNHD, Tensor out_BNHD, Tensor lse_BNH, Tensor q_BNHD,
                             Tensor k_BMHD, Tensor v_BMHD, MaybeTensor q_global_BGHD,
                             MaybeTensor k_global_BMHD, MaybeTensor v_global_BMHD,
                             MaybeTensor padding_BM, MaybeTensor document_BM,
                             MaybeTensor global_index_BG, MaybeTensor dropout_seed_B,
                             int64_t one_sided_window, std::vector<int64_t> dilation_of_heads,
                             bool causal, int64_t drop_below, double scale, int64_t q_offset) {
  Call call{
      q_BNHD,     k_BMHD,      v_BMHD,          q_global_BGHD,  k_global_BMHD,    v_global_BMHD,
      padding_BM, document_BM, global_index_BG, dropout_seed_B, one_sided_window, dilation_of_heads,
      causal,     drop_below,  scale,           q_offset};
  const Where where(q_BNHD);
  const Reader reader{device_of(q_BNHD), Where::kRowAlignment};
  AttentionBackwardParams params;
  fill<Where>(params, call, reader);
  const ScalarType dtype = q_BNHD.scalar_type();
  const int64_t B = params.B, N = params.N, H = params.H, D = params.D;
  params.dout = reader.rows("dout", dout_BNHD, dtype, {B, N, H, D});
  params.out = reader.rows("out", out_BNHD, dtype, {B, N, H, D});
  MaybeTensor lse = lse_BNH;
  params.lse_BNH =
      const_cast<float*>(reader.values<float>("lse", lse, ScalarType::Float, {B, N, H}));

  std::vector<Tensor> gradients;
  const auto gradient_of = [&](const char* what, const Tensor& x) {
    gradients.push_back(Where::allocate(what, x, x.sizes(), dtype));
    return written(gradients.back());
  };
  params.dq = gradient_of("the gradient of q", q_BNHD);
  params.dk = gradient_of("the gradient of k", k_BMHD);
  params.dv = gradient_of("the gradient of v", v_BMHD);
  if (params.G > 0) {
    params.dq_global = gradient_of("the gradient of q_global", *q_global_BGHD);
    params.dk_global = gradient_of("the gradient of k_global", *k_global_BMHD);
    params.dv_global = gradient_of("the gradient of v_global", *v_global_BMHD);
  }
  if (B > 0) where.run(params);
  return gradients;
}

#ifdef __clang__
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "g++ " __VERSION__;
#endif

std::string level_names(bool (*holds)(CpuLevel)) {
  std::string names;
  for (const CpuLevel level :
       {CpuLevel::kPlain, CpuLevel::kAvx2, CpuLevel::kAvx512, CpuLevel::kAvx512Bf16}) {
    if (holds(level)) names += (names.empty() ? "" : ", ") + std::string(cpu_level_name(level));
  }
  return names;
}

// Lines of "name: value", read by fused.py.
std::string kernel_facts() {
  return "compiler: " + std::string(kCompiler) + "\ntorch: " + TORCH_VERSION +
         "\nbuilt: " + level_names(cpu_level_compiled) +
         "\nmachine: " + level_names(cpu_level_runs) + "\nused: " + cpu_level_name(cpu_level()) +
         "\nlargest head size: " + std::to_string(kLargestHeadSize) + "\ncuda: " + cuda_kernels() +
         "\ncuda head sizes: " + kCudaHeadSizes;
}

// The same arguments in the same order as the portable operator: fused.py holds them together.
#define LONGPRETRAIN_ARGUMENTS                                                                  \
  "Tensor q_BNHD, Tensor k_BMHD, Tensor v_BMHD, Tensor? q_global_BGHD, Tensor? k_global_BMHD, " \
  "Tensor? v_global_BMHD, Tensor? padding_BM, Tensor? document_BM, Tensor? global_index_BG, "   \
  "Tensor? dropout_seed_B, SymInt one_sided_window, SymInt[] dilation_of_heads, bool causal, "  \
  "SymInt drop_below, float scale, SymInt q_offset"

STABLE_TORCH_LIBRARY_FRAGMENT(longpretrain, library) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  library.def("sliding_attention_fused(" LONGPRETRAIN_ARGUMENTS ") -> (Tensor, Tensor)", tags);
  library.def(
      "sliding_attention_fused_backward(Tensor dout_BNHD, Tensor out_BNHD, Tensor "
      "lse_BNH, " LONGPRETRAIN_ARGUMENTS ") -> Tensor[]",
      tags);
  library.def("kernel_facts() -> str");
  library.def("cuda_why_not(int device) -> str");
}

#ifdef LONGPRETRAIN_EMULATED
using OnHost = OnCuda;  // for tests: every use of the operator runs what a GPU would
#else
using OnHost = OnCpu;
#endif

STABLE_TORCH_LIBRARY_IMPL(longpretrain, CPU, library) {
  library.impl("sliding_attention_fused", TORCH_BOX(&forward<OnHost>));
  library.impl("sliding_attention_fused_backward", TORCH_BOX(&backward<OnHost>));
}

#ifdef WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(longpretrain, CUDA, library) {
  library.impl("sliding_attention_fused", TORCH_BOX(&forward<OnCuda>));
  library.impl("sliding_attention_fused_backward", TORCH_BOX(&backward<OnCuda>));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(longpretrain, CompositeExplicitAutograd, library) {
  library.impl("kernel_facts", TORCH_BOX(&kernel_facts));
  library.impl("cuda_why_not", TORCH_BOX(&OnCuda::why_not));
}

}  // namespace
}  // namespace longpretrain
