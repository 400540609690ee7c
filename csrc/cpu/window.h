// How a task goes through its keys, block by block.
//
// Letters: see attention.h; Dp is D filled up with zeros, Q the queries of a tile.
#pragma once

#include "tile.h"

namespace longpretrain::LONGPRETRAIN_LEVEL {
namespace {

// The keys of a window task, packed as its tiles advance: global ones first, then those of the
// class.
template <class Arithmetic, int Dp>
struct Window {
  const Plan& plan;
  const AttentionParams& p;
  const Task& task;
  Keys<Arithmetic, Dp> keys;
  KeyClass tokens{};
  int32_t num_columns;     // rows of global keys, filled up
  int32_t first_step = 0;  // of the class that is packed, a multiple of sixteen
  int32_t first_query = 0, end_query = 0;

  static int64_t capacity(const Plan& plan, const Task& task) {
    const AttentionParams& p = *plan.params;
    const int64_t longest = cpu::ceil_div(p.M, p.dilation_H[task.h]);
    const int64_t reach = int64_t{plan.longest_chunk} + 2 * int64_t{plan.window};
    return cpu::round_up(plan.slots_of(task.b), kRowMultiple) +
           (reach < longest ? reach : longest) + 4 * kSixteen;
  }

  Window(Arena& arena, const Plan& plan_, const Task& task_)
      : plan(plan_),
        p(*plan_.params),
        task(task_),
        keys(arena, capacity(plan_, task_), plan_.backward != nullptr),
        num_columns(static_cast<int32_t>(cpu::round_up(plan_.slots_of(task_.b), kRowMultiple))) {}

  void pack_columns() {
    keys.start();
    for (int32_t slot = plan.slot_begin_B[task.b]; slot < plan.slot_begin_B[task.b + 1]; ++slot) {
      const int32_t position = plan.slot_position[slot];
      keys.append(row_of(p.k, p.dtype, task.b, position, task.h),
                  row_of(p.v, p.dtype, task.b, position, task.h), p.dtype, static_cast<int>(p.D),
                  position);
    }
    keys.append_nothing(num_columns);
  }

  // False when none of the class's queries are the task's.
  bool start_class(int64_t residue) {
    tokens = key_class(p, p.k, p.v, task, residue);
    const int64_t dilation = p.dilation_H[task.h];
    const int64_t first = cpu::ceil_div(p.q_offset > residue ? p.q_offset - residue : 0, dilation);
    const int64_t end =
        p.q_offset + p.N > residue ? cpu::ceil_div(p.q_offset + p.N - residue, dilation) : 0;
    first_query = greater(static_cast<int32_t>(first), task.first_query);
    end_query = smaller(static_cast<int32_t>(end), task.end_query);
    is_first = first_query == first;
    is_last = end_query == end;
    first_step = greater(first_query - plan.window, 0) / kSixteen * kSixteen;
    keys.count = num_columns;
    return first_query < end_query;
  }
  bool is_first = false, is_last = false;  // whether the task has the class's first, last query

  int32_t row_of_step(int32_t step) const { return num_columns + step - first_step; }

  // Calls block(first row, rows, masked, bounds) for the global keys and for those of the class.
  template <int Q, class Block>
  void for_each_block(const Lanes<Q>& lanes, Survivors<Q>& survivors, Block block) {
    const int32_t multiple = survivors.drop_below != 0 ? kSixteen : kRowMultiple;
    for (int32_t row = 0; row < num_columns; row += kKeyBlock) {
      const int32_t size = smaller(kKeyBlock, num_columns - row);
      survivors.draw_positions(lanes, tokens.dilation, keys.number + row, size);
      block(row, size, true, lanes.columns);
    }
    const int32_t first = lanes.keys.first_needed / kSixteen * kSixteen;
    const int32_t end = static_cast<int32_t>(cpu::round_up(lanes.keys.last_needed + 1, multiple));
    const int32_t packed = keys.count - num_columns + first_step;
    keys.append_steps(plan, tokens, packed, end, cpu::kPadding | cpu::kGlobal, false);
    // Fetched ahead a few lanes at a time, since many at once would hold up the loads of a product.
    const int32_t at_once = (Q * kKeyBlock + end - first - 1) / (end - first);
    int32_t fetched = 0;
    for (int32_t step = first; step < end; step += kKeyBlock) {
      const int32_t size = smaller(kKeyBlock, end - step), row = row_of_step(step);
      for (int32_t i = 0; i < at_once && fetched < Q; ++i) {
        prefetch_lane(lanes.first, Q, end, fetched++);
      }
      if (keys.all_dead(row, size)) continue;
      const bool masked = step < lanes.keys.first_free || step + size - 1 > lanes.keys.last_free ||
                          keys.any_dead(row, size);
      survivors.draw_steps(lanes, tokens.residue, step, size);
      block(row, size, masked, lanes.keys);
    }
  }

  // What a lane of the tile that starts at `first` writes, and what the same lane of the next tile
  // reads, whose keys begin at `next_key`.
  void prefetch_lane(int32_t first, int32_t num_queries, int32_t next_key, int32_t lane) const {
    if (next_key + lane < end_query + plan.window) {
      prefetch_keys(p, tokens, next_key + lane, next_key + lane + 1);
    }
    const AttentionBackwardParams* backward = plan.backward;
    if (first + lane < end_query) {
      const int64_t n = tokens.position(first + lane) - p.q_offset;
      claim_row(backward == nullptr ? p.out : backward->dq, p, task.b, n, task.h);
    }
    if (first + num_queries + lane < end_query) {
      const int64_t n = tokens.position(first + num_queries + lane) - p.q_offset;
      prefetch_row(p.q, p, task.b, n, task.h);
      if (backward == nullptr) return;
      prefetch_row(p.out, p, task.b, n, task.h);
      prefetch_row(backward->dout, p, task.b, n, task.h);
    }
  }
};

// Calls block(class, first step, size) for keys at the positions first_needed to last_needed and
// some beside, packed at row 0: class by class, so that sixteen share a call of the random
// generator.
template <class Arithmetic, int Dp, class Block>
void for_each_global_block(const Plan& plan, const Task& task, Keys<Arithmetic, Dp>& keys,
                           int32_t first_needed, int32_t last_needed, Block block) {
  const AttentionParams& p = *plan.params;
  const int64_t dilation = p.dilation_H[task.h];
  for (int64_t residue = 0; residue < dilation && residue <= last_needed; ++residue) {
    const KeyClass tokens = key_class(p, p.k_global, p.v_global, task, residue);
    const int32_t before = greater(first_needed - tokens.residue, 0);
    const int32_t first = before / tokens.dilation / kSixteen * kSixteen;
    const int32_t count = (last_needed - tokens.residue) / tokens.dilation + 1;
    const int32_t end = static_cast<int32_t>(cpu::round_up(count, kSixteen));
    for (int32_t step = first; step < end; step += kKeyBlock) {
      const int32_t size = smaller(kKeyBlock, end - step);
      prefetch_keys(p, tokens, step + kKeyBlock, step + 2 * kKeyBlock);
      keys.start();
      keys.append_steps(plan, tokens, step, step + size, cpu::kPadding, true);
      block(tokens, step, size);
    }
  }
}

// Whether some query of the tile does not reach some key of such a block.
template <class Arithmetic, int Dp, int Q>
bool needs_mask(const Keys<Arithmetic, Dp>& keys, const Bounds<Q>& bounds, const KeyClass& tokens,
                int32_t step, int32_t size) {
  return keys.any_dead(0, size) || tokens.position(step) < bounds.first_free ||
         tokens.position(step + size - 1) > bounds.last_free;
}

// Makes a Job in the thread's scratch and runs it.
template <class Job>
void run_in_scratch(const Plan& plan, const Task& task) {
  Arena counting(nullptr);
  Job counted(counting, plan, task);
  Arena arena(cpu::thread_scratch(counting.num_bytes()));
  Job job(arena, plan, task);
  job.run();
}

// Calls run with the arithmetic and padded head size of a call as types: run(Arithmetic{}, size).
template <int kSize>
struct HeadSize {
  static constexpr int value = kSize;
};

template <class Arithmetic, class Run>
void with_head_size(const Plan& plan, Run run) {
  switch (plan.padded_head_size) {
    case 32:
      return run(Arithmetic{}, HeadSize<32>{});
    case 64:
      return run(Arithmetic{}, HeadSize<64>{});
    default:
      return run(Arithmetic{}, HeadSize<128>{});
  }
}

template <class Run>
void with_arithmetic(const Plan& plan, Run run) {
#if defined(__AVX512BF16__)
  if (plan.params->dtype == DType::kBFloat16) return with_head_size<BFloat16>(plan, run);
#endif
  with_head_size<Float32>(plan, run);
}

}  // namespace
}  // namespace longpretrain::LONGPRETRAIN_LEVEL
