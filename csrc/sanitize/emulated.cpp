// Runs the CUDA kernels on the emulator without torch, for the sanitizers and valgrind.
//
// Small cases that together reach every kernel and branch run in several orders of threads and
// blocks. All must leave the same bits, every number that is due, and nothing beside. Whether the
// numbers are right is for the tests in Python. `emulated_kernels [number of orders [case]]`.
//
// Letters: see attention.h.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../attention.h"
#include "../emulation/runtime.h"
#include "numbers.h"

namespace longpretrain {
namespace {

constexpr int64_t kGap = 32;  // numbers between the rows of a view

struct Case {
  const char* name;
  DType dtype = kBFloat16;
  int64_t D = 32;
  int64_t window = 5;
  std::vector<int64_t> dilation_H = {1};
  int64_t B = 1, N = 150, M = 150, q_offset = 0;
  int64_t G = 0;
  bool causal = false, padding = false, documents = false;
  int32_t drop_below = 0;
  float scale = 0.25f;
  bool is_view = false;  // with gaps between rows, and heads before tokens
};

const Case kCases[] = {
    {.name = "one token", .N = 1, .M = 1, .G = 1},
    {.name = "band", .window = 70, .N = 200, .M = 200},
    {.name = "dilations", .dtype = kFloat16, .window = 20, .dilation_H = {2, 7, 200}, .G = 2},
    {.name = "masks",
     .dtype = kFloat32,
     .dilation_H = {1, 2},
     .B = 2,
     .G = 3,
     .causal = true,
     .padding = true,
     .documents = true},
    {.name = "dropout", .D = 64, .window = 40, .G = 20, .padding = true, .drop_below = 26},
    {.name = "some queries", .D = 128, .N = 40, .q_offset = 77, .G = 1, .drop_below = 26},
    {.name = "views", .dtype = kFloat16, .D = 64, .dilation_H = {1, 3}, .G = 2, .is_view = true},
    // On both sides of softmax.h's kLargestBase.
    {.name = "large scores", .window = 40, .N = 300, .M = 300, .G = 20, .scale = -2e4f},
    {.name = "wide rows", .dtype = kFloat32, .D = 128, .N = 70, .M = 70, .G = 1},
};

// [B, N, H, D] in memory of exactly its size.
class Tensor {
 public:
  Tensor(const Case& c, const char* name, DType dtype, int64_t N, int64_t D)
      : name_(name), dtype_(dtype), D_(D), num_rows_(c.B * N * heads(c)) {
    const int64_t H = heads(c), step = D + (c.is_view ? kGap : 0);
    view_ = {nullptr, N * H * step, c.is_view ? step : H * step, c.is_view ? N * step : step};
    num_bytes_ = (std::max<int64_t>(num_rows_, 1) * step - (step - D)) * size_of(dtype);
    bytes_.reset(static_cast<char*>(std::malloc(num_bytes_)));
    leave_untouched(bytes_.get(), num_bytes_);
    step_bytes_ = step * size_of(dtype);
    view_.data = bytes_.get();
  }
  static int64_t heads(const Case& c) { return static_cast<int64_t>(c.dilation_H.size()); }

  const TensorBNHD& view() const { return view_; }
  float* floats() { return reinterpret_cast<float*>(bytes_.get()); }
  bool operator==(const Tensor& other) const {
    return std::memcmp(bytes_.get(), other.bytes_.get(), num_bytes_) == 0;
  }

  void draw(std::mt19937& random) {
    for_each_number([&](char* x) { put_random(x, dtype_, random(), 0); });
  }

  // What is wrong with it as a result; null when nothing is.
  const char* flaw() {
    const char* found = nullptr;
    for_each_number([&](char* x) {
      if (is_nan(x, dtype_)) found = "has NaN";
      if (is_untouched(x, size_of(dtype_))) found = "is not written in full";
    });
    for (int64_t i = 0; i < num_rows_ - 1; ++i) {
      const char* gap = bytes_.get() + i * step_bytes_ + D_ * size_of(dtype_);
      const size_t gap_bytes = static_cast<size_t>(step_bytes_) - D_ * size_of(dtype_);
      if (!is_untouched(gap, gap_bytes)) found = "is written between its rows";
    }
    return found;
  }
  const char* name() const { return name_; }

 private:
  template <class Visit>
  void for_each_number(Visit visit) {
    for (int64_t row = 0; row < num_rows_; ++row) {
      for (int64_t d = 0; d < D_; ++d) {
        visit(bytes_.get() + row * step_bytes_ + d * size_of(dtype_));
      }
    }
  }

  struct Free {
    void operator()(char* bytes) const { std::free(bytes); }
  };
  const char* name_;
  DType dtype_;
  int64_t D_, num_rows_, step_bytes_;
  size_t num_bytes_;
  TensorBNHD view_;
  std::unique_ptr<char, Free> bytes_;
};

template <class T>
std::unique_ptr<T[]> exactly(const std::vector<T>& numbers) {
  std::unique_ptr<T[]> memory(new T[numbers.size()]);
  std::copy(numbers.begin(), numbers.end(), memory.get());
  return memory;
}

struct Inputs {
  std::vector<Tensor> tensors;  // q, k, v, those of the global tokens, dout
  std::unique_ptr<uint8_t[]> padding_BM;
  std::unique_ptr<int64_t[]> document_BM, global_index_BG, dropout_seed_B;
};

Inputs make_inputs(const Case& c) {
  Inputs made;
  std::mt19937 random(2020);
  for (const auto& [name, rows] : {std::pair{"q", c.N},
                                   {"k", c.M},
                                   {"v", c.M},
                                   {"q_global", c.G},
                                   {"k_global", c.M},
                                   {"v_global", c.M},
                                   {"dout", c.N}}) {
    made.tensors.emplace_back(c, name, c.dtype, rows, c.D);
    made.tensors.back().draw(random);
  }
  std::vector<uint8_t> padding;
  std::vector<int64_t> documents, index, seeds;
  for (int64_t b = 0; b < c.B; ++b) {
    seeds.push_back(-1234567890123 - b);
    for (int64_t m = 0; m < c.M; ++m) {
      padding.push_back(m % 11 == 5 || (b == 1 && m >= 60));
      documents.push_back(m / 13);
    }
    // Backwards; some slots unused, named before or out of range.
    for (int64_t g = 0; g < c.G; ++g) {
      index.push_back(g % 5 == 1 ? -1 : g % 5 == 2 ? c.M : (c.G - 1 - g) / 2 * 2 * c.M / c.G);
    }
  }
  made.padding_BM = exactly(padding);
  made.document_BM = exactly(documents);
  made.global_index_BG = exactly(index);
  made.dropout_seed_B = exactly(seeds);
  return made;
}

void fill(AttentionParams& p, const Case& c, const Inputs& inputs) {
  p.dtype = c.dtype;
  p.B = c.B, p.N = c.N, p.M = c.M, p.H = Tensor::heads(c), p.D = c.D, p.G = c.G;
  p.q_offset = c.q_offset;
  p.one_sided_window = c.window;
  p.dilation_H = c.dilation_H.data();
  p.causal = c.causal;
  p.scale = c.scale;
  p.drop_below = c.drop_below;
  p.q = inputs.tensors[0].view();
  p.k = inputs.tensors[1].view();
  p.v = inputs.tensors[2].view();
  if (c.G > 0) {
    p.q_global = inputs.tensors[3].view();
    p.k_global = inputs.tensors[4].view();
    p.v_global = inputs.tensors[5].view();
    p.global_index_BG = inputs.global_index_BG.get();
  }
  if (c.padding) p.padding_BM = inputs.padding_BM.get();
  if (c.documents) p.document_BM = inputs.document_BM.get();
  if (c.drop_below > 0) p.dropout_seed_B = inputs.dropout_seed_B.get();
}

// Scratch memory, aligned as promised and full of NaN.
class Workspace {
 public:
  explicit Workspace(size_t num_bytes) {
    if (posix_memalign(&memory_, 256, std::max<size_t>(num_bytes, 1)) != 0) std::abort();
    std::memset(memory_, 0xff, num_bytes);
  }
  ~Workspace() { std::free(memory_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* get() const { return memory_; }

 private:
  void* memory_ = nullptr;
};

// Forward and backward; all that they write.
std::vector<Tensor> run(const Case& c, const Inputs& inputs) {
  AttentionBackwardParams p;
  fill(p, c, inputs);
  std::vector<Tensor> made;
  made.emplace_back(c, "lse", kFloat32, c.N, 1);
  const auto make = [&](const char* name, int64_t rows) {
    made.emplace_back(c, name, c.dtype, rows, c.D);
    return made.back().view();
  };
  Case contiguous = c;
  contiguous.is_view = false;
  made[0] = Tensor(contiguous, "lse", kFloat32, c.N, 1);
  p.lse_BNH = made[0].floats();
  p.out = make("out", c.N);
  p.dq = make("dq", c.N);
  p.dk = make("dk", c.M);
  p.dv = make("dv", c.M);
  if (c.G > 0) {
    p.dq_global = make("dq_global", c.G);
    p.dk_global = make("dk_global", c.M);
    p.dv_global = make("dv_global", c.M);
  }
  p.dout = inputs.tensors.back().view();
  {
    const Workspace workspace(cuda_workspace_bytes(p, false));
    attention_forward_cuda(p, workspace.get(), nullptr);
  }
  const Workspace workspace(cuda_workspace_bytes(p, true));
  attention_backward_cuda(p, workspace.get(), nullptr);
  return made;
}

bool passes(const Case& c, int num_orders) {
  const Inputs inputs = make_inputs(c), given = make_inputs(c);
  emulation::set_seed(0);
  std::vector<Tensor> right = run(c, inputs);
  bool good = true;
  const auto complain = [&](const Tensor& x, const std::string& what) {
    std::fprintf(stderr, "emulated: case '%s': %s %s\n", c.name, x.name(), what.c_str());
    good = false;
  };
  for (Tensor& x : right) {
    if (const char* what = x.flaw()) complain(x, what);
  }
  for (int seed = 1; seed < num_orders; ++seed) {
    emulation::set_seed(seed);
    const std::vector<Tensor> found = run(c, inputs);
    for (size_t i = 0; i < right.size(); ++i) {
      if (!(found[i] == right[i]))
        complain(found[i], "is another in order " + std::to_string(seed));
    }
  }
  for (size_t i = 0; i < given.tensors.size(); ++i) {
    if (!(inputs.tensors[i] == given.tensors[i]))
      complain(given.tensors[i], "is an input, changed");
  }
  return good;
}

}  // namespace
}  // namespace longpretrain

int main(int count, char** words) {
  const int num_orders = count > 1 ? std::atoi(words[1]) : 3;
  int num_cases = 0;
  bool good = true;
  for (const auto& c : longpretrain::kCases) {
    if (count > 2 && std::string(words[2]) != c.name) continue;
    ++num_cases;
    good = longpretrain::passes(c, num_orders) && good;
  }
  good = good && num_cases > 0;
  std::printf("emulated: %d cases, %d orders: %s\n", num_cases, num_orders, good ? "ok" : "FAILED");
  return good ? 0 : 1;
}
