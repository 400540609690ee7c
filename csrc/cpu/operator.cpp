// The entry points: picks the compiled instruction set and runs the tasks of a call.
#include <cstdlib>
#include <cstring>

#include "plan_storage.h"

namespace longpretrain {
namespace {

using RunTask = void (*)(const cpu::Plan& plan, const cpu::Task& task);

struct Level {
  const char* name;
  RunTask forward, backward;  // null: not compiled
};

// In the order of CpuLevel.
constexpr Level kLevels[] = {
    {"plain", plain::forward_task, plain::backward_task},
#ifdef LONGPRETRAIN_HAS_AVX2
    {"avx2", avx2::forward_task, avx2::backward_task},
#else
    {"avx2", nullptr, nullptr},
#endif
#ifdef LONGPRETRAIN_HAS_AVX512
    {"avx512", avx512::forward_task, avx512::backward_task},
#else
    {"avx512", nullptr, nullptr},
#endif
#ifdef LONGPRETRAIN_HAS_AVX512_BF16
    {"avx512_bf16", avx512_bf16::forward_task, avx512_bf16::backward_task},
#else
    {"avx512_bf16", nullptr, nullptr},
#endif
};

bool processor_has(CpuLevel level) {
  if (level == CpuLevel::kPlain) return true;
#ifdef LONGPRETRAIN_X86
  __builtin_cpu_init();
  bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (level >= CpuLevel::kAvx512) {
    has = has && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (level >= CpuLevel::kAvx512Bf16) has = has && __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

CpuLevel choose_level() {
  const char* wanted = std::getenv("LONGPRETRAIN_CPU_LEVEL");
  CpuLevel best = CpuLevel::kPlain;
  for (int32_t i = 0; i < 4; ++i) {
    const CpuLevel level = static_cast<CpuLevel>(i);
    if (kLevels[i].forward != nullptr && processor_has(level)) best = level;
    if (wanted != nullptr && std::strcmp(wanted, kLevels[i].name) == 0) break;
  }
  return best;
}

struct Run {
  RunTask run;
  const cpu::Plan& plan;
  const cpu::Task* tasks;
};

void run_one(void* context, int64_t number) {
  const Run& run = *static_cast<const Run*>(context);
  run.run(run.plan, run.tasks[number]);
}

void run_all(const cpu::PlanStorage& storage, RunTask run, ParallelFor parallel_for) {
  for (const std::vector<cpu::Task>& tasks : storage.phases()) {
    Run context{run, storage.plan(), tasks.data()};
    if (!tasks.empty()) parallel_for(static_cast<int64_t>(tasks.size()), run_one, &context);
  }
}

}  // namespace

CpuLevel cpu_level() {
  static const CpuLevel level = choose_level();
  return level;
}

bool cpu_level_compiled(CpuLevel level) {
  return kLevels[static_cast<int32_t>(level)].forward != nullptr;
}

bool cpu_level_runs(CpuLevel level) { return processor_has(level); }

const char* cpu_level_name(CpuLevel level) { return kLevels[static_cast<int32_t>(level)].name; }

void attention_forward_cpu(const AttentionParams& params, ParallelFor parallel_for) {
  const cpu::PlanStorage storage(params);
  run_all(storage, kLevels[static_cast<int32_t>(cpu_level())].forward, parallel_for);
}

void attention_backward_cpu(const AttentionBackwardParams& params, ParallelFor parallel_for) {
  const cpu::PlanStorage storage(params, &params);
  run_all(storage, kLevels[static_cast<int32_t>(cpu_level())].backward, parallel_for);
}

namespace cpu {

char* thread_scratch(size_t num_bytes) {
  thread_local Owned<char> memory;
  thread_local size_t size = 0;
  // What an unusually wide window took is given back by the next usual call.
  constexpr size_t kKept = size_t{32} << 20;
  if (size < num_bytes || (size > kKept && num_bytes < size / 2)) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<char*>(new_memory(static_cast<int64_t>(num_bytes))));
    size = num_bytes;
  }
  return memory.get();
}

}  // namespace cpu
}  // namespace longpretrain
