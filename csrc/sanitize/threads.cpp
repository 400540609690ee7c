// Runs the CPU kernels without torch, for the sanitizers: `make sanitize`.
//
// Small cases that together reach every branch run twice at each level: on one thread, last task
// first, and on several threads. Both must leave the same bits, every number that is due, and
// nothing beside. Whether the numbers are right is for the tests in Python; here the sanitizers
// watch how they come about.
//
// Letters: see attention.h.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../cpu/plan.h"
#include "numbers.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(start, num_bytes)
#define ASAN_UNPOISON_MEMORY_REGION(start, num_bytes)
#endif

namespace longpretrain {
namespace {

constexpr int kThreads = 3;
constexpr int64_t kGuard = 64;  // bytes before and after a tensor's numbers
constexpr int64_t kGap = 40;    // numbers between the rows of a view

struct Case {
  const char* name;
  DType dtype = kFloat32;
  int64_t D = 32;
  int64_t window = 5;
  std::vector<int64_t> dilation_H = {1, 2, 7};
  int64_t B = 2, N = 70, M = 70, q_offset = 0;
  int64_t G = 0;
  bool own_projections = false;  // else the global ones are the ordinary ones
  bool causal = false, padding = false, documents = false;
  int32_t drop_below = 0;
  float scale = 0.25f;
  int exponent = 0;      // of the inputs: 4 makes scores of hundreds
  bool has_nan = false;  // one number each of q, k, v
  bool is_view = false;  // with gaps between rows, and heads before tokens
};

constexpr int64_t kEndless = INT32_MAX;

const Case kCases[] = {
    {.name = "one token", .D = 5, .B = 1, .N = 1, .M = 1},
    {.name = "no window", .window = 0},
    {.name = "all of it, bfloat16", .dtype = kBFloat16, .D = 64, .window = kEndless},
    {.name = "far apart", .D = 64, .dilation_H = {39, 41, kEndless}, .N = 40, .M = 40, .G = 3},
    {.name = "odd size", .D = 5, .G = 2, .padding = true},
    {.name = "odd size, bfloat16", .dtype = kBFloat16, .D = 5, .G = 2, .padding = true},
    {.name = "odd size, float16", .dtype = kFloat16, .D = 5, .G = 2, .padding = true},
    {.name = "little but padding", .window = 100, .N = 200, .M = 200, .G = 3, .padding = true},
    {.name = "masks", .D = 100, .causal = true, .padding = true, .documents = true},
    {.name = "masks, bfloat16", .dtype = kBFloat16, .D = 100, .padding = true, .documents = true},
    {.name = "causal, float16", .dtype = kFloat16, .D = 64, .causal = true},
    {.name = "one slot", .dtype = kFloat16, .D = 128, .G = 1},
    {.name = "two tiles of slots", .D = 128, .G = 20, .padding = true},
    // Enough memory for sums of slots to be asked for in large pages.
    {.name = "blocks of slots",
     .dtype = kBFloat16,
     .D = 128,
     .dilation_H = {1, 1, 2, 7},
     .B = 1,
     .N = 20,
     .M = 600,
     .q_offset = 100,
     .G = 600},
    {.name = "own", .G = 20, .own_projections = true, .causal = true, .padding = true},
    {.name = "own, bfloat16", .dtype = kBFloat16, .G = 20, .own_projections = true},
    {.name = "some queries", .D = 64, .N = 20, .q_offset = 13, .G = 4, .padding = true},
    {.name = "last query", .dtype = kBFloat16, .N = 1, .q_offset = 69, .G = 4, .causal = true},
    {.name = "dropout", .D = 64, .padding = true, .drop_below = 26},
    {.name = "most dropped, float16", .dtype = kFloat16, .G = 3, .drop_below = 255},
    {.name = "dropout, bfloat16", .dtype = kBFloat16, .D = 128, .G = 20, .drop_below = 128},
    {.name = "views", .D = 100, .G = 3, .own_projections = true, .is_view = true},
    {.name = "views of some", .D = 5, .N = 33, .q_offset = 20, .G = 3, .is_view = true},
    {.name = "views, bfloat16", .dtype = kBFloat16, .D = 5, .G = 3, .is_view = true},
    {.name = "views, float16", .dtype = kFloat16, .D = 100, .padding = true, .is_view = true},
    {.name = "loud", .G = 3, .padding = true, .exponent = 4},
    {.name = "loud, bfloat16", .dtype = kBFloat16, .G = 3, .causal = true, .exponent = 4},
    {.name = "loud, float16", .dtype = kFloat16, .documents = true, .exponent = 4},
    {.name = "loud, dropout", .D = 64, .G = 20, .drop_below = 26, .scale = -0.1f, .exponent = 4},
    {.name = "NaN", .D = 64, .G = 3, .drop_below = 26, .has_nan = true},
    {.name = "NaN, bfloat16", .dtype = kBFloat16, .G = 3, .causal = true, .has_nan = true},
    {.name = "NaN, float16", .dtype = kFloat16, .D = 5, .has_nan = true},
    // Three chunks, of which the last is shorter than the window.
    {.name = "chunks",
     .window = 20,
     .dilation_H = {1},
     .B = 1,
     .N = 2 * cpu::kChunk + 12,
     .M = 2 * cpu::kChunk + 12,
     .G = 3,
     .padding = true,
     .documents = true},
    {.name = "causal chunks, bfloat16",
     .dtype = kBFloat16,
     .D = 5,
     .window = 20,
     .dilation_H = {1},
     .B = 1,
     .N = cpu::kChunk + 12,
     .M = cpu::kChunk + 100,
     .q_offset = 50,
     .causal = true,
     .drop_below = 26},
};

// [B, N, H, D]. All bytes that are not of its numbers stay untouched, or else.
class Tensor {
 public:
  Tensor(const char* name, DType dtype, int64_t B, int64_t N, int64_t H, int64_t D, bool is_view)
      : name_(name), dtype_(dtype), D_(D), num_rows_(B * N * H), step_(D + (is_view ? kGap : 0)) {
    strides_ = {nullptr, N * H * step_, is_view ? step_ : H * step_, is_view ? N * step_ : step_};
    bytes_.resize(num_rows_ * step_ * size_of(dtype) + 2 * kGuard);
    leave_untouched(bytes_.data(), bytes_.size());
  }

  TensorBNHD view() {
    TensorBNHD view = strides_;
    view.data = row(0);
    return view;
  }
  const char* name() const { return name_; }
  bool operator==(const Tensor& other) const { return bytes_ == other.bytes_; }

  template <class Visit>
  void for_each_number(Visit visit) {
    for (int64_t r = 0; r < num_rows_; ++r) {
      for (int64_t d = 0; d < D_; ++d) visit(row(r) + d * size_of(dtype_));
    }
  }

  void draw(std::mt19937& random, int exponent, bool has_nan) {
    for_each_number([&](char* x) { put_random(x, dtype_, random(), exponent); });
    if (has_nan) put_random(row(num_rows_ / 2), dtype_, 127, dtype_ == kFloat16 ? 19 : 131);
  }

  // To the address sanitizer nothing but the rows is ours, until the rest is opened again.
  void close_rest() {
    ASAN_POISON_MEMORY_REGION(bytes_.data(), bytes_.size());
    for (int64_t r = 0; r < num_rows_; ++r) {
      ASAN_UNPOISON_MEMORY_REGION(row(r), D_ * size_of(dtype_));
    }
  }
  void open_rest() { ASAN_UNPOISON_MEMORY_REGION(bytes_.data(), bytes_.size()); }

  // What is wrong with it as a result; null when nothing is.
  const char* flaw(bool may_be_nan) const {
    Tensor rest = *this;
    const char* found = nullptr;
    rest.for_each_number([&](char* x) {
      if (!may_be_nan && is_nan(x, dtype_)) found = "has NaN";
      if (is_untouched(x, size_of(dtype_))) found = "is not written in full";
      leave_untouched(x, size_of(dtype_));
    });
    const bool is_rest_untouched = is_untouched(rest.bytes_.data(), rest.bytes_.size());
    return is_rest_untouched ? found : "is written beside its numbers";
  }

 private:
  char* row(int64_t r) { return bytes_.data() + kGuard + r * step_ * size_of(dtype_); }

  const char* name_;
  DType dtype_;
  int64_t D_, num_rows_, step_;
  TensorBNHD strides_;
  std::vector<char> bytes_;
};

struct Inputs {
  std::vector<Tensor> tensors;  // q, k, v, those of the global tokens, dout
  std::unique_ptr<uint8_t[]> padding_BM;
  std::vector<int64_t> document_BM, global_index_BG, dropout_seed_B;
};

Inputs make_inputs(const Case& c) {
  Inputs made;
  std::mt19937 random(2020);
  const int64_t H = static_cast<int64_t>(c.dilation_H.size());
  const auto add = [&](const char* name, int64_t rows, int exponent, bool has_nan) {
    made.tensors.emplace_back(name, c.dtype, c.B, rows, H, c.D, c.is_view);
    made.tensors.back().draw(random, exponent, has_nan);
  };
  add("q", c.N, c.exponent, c.has_nan);
  add("k", c.M, c.exponent, c.has_nan);
  add("v", c.M, 0, c.has_nan);
  add("q_global", c.G, c.exponent, false);
  add("k_global", c.M, c.exponent, false);
  add("v_global", c.M, 0, false);
  add("dout", c.N, 0, false);

  made.padding_BM = std::make_unique<uint8_t[]>(c.B * c.M);
  for (int64_t b = 0; b < c.B; ++b) {
    made.dropout_seed_B.push_back(-1234567890123 - b);
    for (int64_t m = 0; m < c.M; ++m) {
      // Some tokens, and at the end of batch row 1 more than a block of keys.
      made.padding_BM[b * c.M + m] = m % 11 == 5 || (b == 1 && m >= 4);
      made.document_BM.push_back(m / 13);
    }
    // Backwards, some slots unused: in batch row 1 all of them when there is only one.
    for (int64_t g = 0; g < c.G; ++g) {
      made.global_index_BG.push_back(b == 1 && g % 3 == 0 ? -1 : (c.G - 1 - g) * c.M / c.G);
    }
  }
  return made;
}

void fill(AttentionParams& p, const Case& c, Inputs& inputs) {
  p.dtype = c.dtype;
  p.B = c.B, p.N = c.N, p.M = c.M, p.D = c.D, p.G = c.G;
  p.H = static_cast<int64_t>(c.dilation_H.size());
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
    p.k_global = c.own_projections ? inputs.tensors[4].view() : p.k;
    p.v_global = c.own_projections ? inputs.tensors[5].view() : p.v;
    p.global_index_BG = inputs.global_index_BG.data();
  }
  if (c.padding) p.padding_BM = inputs.padding_BM.get();
  if (c.documents) p.document_BM = inputs.document_BM.data();
  if (c.drop_below > 0) p.dropout_seed_B = inputs.dropout_seed_B.data();
}

// Forward and backward; all that they write.
std::vector<Tensor> run(const Case& c, Inputs& inputs, ParallelFor parallel_for) {
  AttentionBackwardParams p;
  fill(p, c, inputs);
  std::vector<Tensor> made;
  for (const auto& [name, rows] : {std::pair{"out", c.N},
                                   {"dq", c.N},
                                   {"dk", c.M},
                                   {"dv", c.M},
                                   {"dq_global", c.G},
                                   {"dk_global", c.M},
                                   {"dv_global", c.M}}) {
    if (c.G > 0 || std::strchr(name, '_') == nullptr)
      made.emplace_back(name, c.dtype, c.B, rows, p.H, c.D, c.is_view);
  }
  made.emplace_back("lse", kFloat32, c.B, c.N, p.H, 1, false);
  p.dout = inputs.tensors.back().view();
  p.out = made[0].view();
  p.dq = made[1].view();
  p.dk = made[2].view();
  p.dv = made[3].view();
  if (c.G > 0) {
    p.dq_global = made[4].view();
    p.dk_global = made[5].view();
    p.dv_global = made[6].view();
  }
  p.lse_BNH = static_cast<float*>(made.back().view().data);
  for (auto* tensors : {&made, &inputs.tensors})
    for (Tensor& x : *tensors) x.close_rest();
  attention_forward_cpu(p, parallel_for);
  attention_backward_cpu(p, parallel_for);
  for (auto* tensors : {&made, &inputs.tensors})
    for (Tensor& x : *tensors) x.open_rest();
  return made;
}

void backwards(int64_t num_tasks, void (*body)(void* context, int64_t task), void* context) {
  for (int64_t task = num_tasks; task-- > 0;) body(context, task);
}

// Which thread runs a task is not left to chance: neighbours never share one, so that the thread
// sanitizer can see any race between them.
void on_threads(int64_t num_tasks, void (*body)(void* context, int64_t task), void* context) {
  std::vector<std::thread> threads;
  for (int64_t first = 0; first < kThreads; ++first) {
    threads.emplace_back([=] {
      for (int64_t task = first; task < num_tasks; task += kThreads) body(context, task);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

bool passes(const Case& c) {
  Inputs inputs = make_inputs(c);
  const std::vector<Tensor> given = inputs.tensors;
  const std::vector<Tensor> right = run(c, inputs, backwards);
  const std::vector<Tensor> threaded = run(c, inputs, on_threads);
  bool good = true;
  const auto complain = [&](const Tensor& x, const char* what) {
    std::fprintf(stderr, "sanitize: %s, case '%s': %s %s\n", cpu_level_name(cpu_level()), c.name,
                 x.name(), what);
    good = false;
  };
  for (size_t i = 0; i < given.size(); ++i) {
    if (!(inputs.tensors[i] == given[i])) complain(given[i], "is an input and was changed");
  }
  for (size_t i = 0; i < right.size(); ++i) {
    if (const char* what = right[i].flaw(c.has_nan)) complain(right[i], what);
    if (!(threaded[i] == right[i])) complain(right[i], "depends on threads or the order of tasks");
  }
  return good;
}

bool all_pass() {
  bool good = true;
  for (const Case& c : kCases) good = passes(c) && good;
  return good;
}

// In a process of its own, since a process chooses its level once.
pid_t start(CpuLevel level) {
  const pid_t child = fork();
  if (child != 0) return child;
  setenv("LONGPRETRAIN_CPU_LEVEL", cpu_level_name(level), 1);
  std::exit(all_pass() ? 0 : 1);
}

// A sanitizer that found something ends its process with another status than 0.
bool succeeded(pid_t child) {
  int status = -1;
  return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

}  // namespace
}  // namespace longpretrain

int main() {
  using longpretrain::CpuLevel;
  std::string levels;
  std::vector<pid_t> children;
  for (const CpuLevel level :
       {CpuLevel::kPlain, CpuLevel::kAvx2, CpuLevel::kAvx512, CpuLevel::kAvx512Bf16}) {
    if (!longpretrain::cpu_level_compiled(level) || !longpretrain::cpu_level_runs(level)) continue;
    levels += (levels.empty() ? "" : ", ") + std::string(longpretrain::cpu_level_name(level));
    children.push_back(longpretrain::start(level));
  }
  bool good = true;
  for (const pid_t child : children) good = longpretrain::succeeded(child) && good;
  std::printf("sanitize: %zu cases, %d threads, levels %s: %s\n", std::size(longpretrain::kCases),
              longpretrain::kThreads, levels.c_str(), good ? "ok" : "FAILED");
  return good ? 0 : 1;
}
