// The backward pass of one task: weights are computed again from the saved log-sum-exp.
//
// A task goes through tiles of queries once and makes all three gradients: dq of the tile, and dk
// and dv added up over tiles in the task's copy of its keys. What two tasks find for the same key
// meets in a fixed order: see Plan.
//
// Letters: see attention.h and queries.h.
#include <new>

#include "window.h"

namespace longpretrain::LONGPRETRAIN_LEVEL {
namespace {

template <class Arithmetic, int Dp, int Q>
struct BackwardTile {
  using Unit = typename Arithmetic::Unit;
  static constexpr int kPerUnit = Arithmetic::kPerUnit, kUnits = Dp / kPerUnit;
  static constexpr int kCols = Q / kLanes < kVectors ? Q / kLanes : kVectors;

  const Plan& plan;
  const AttentionBackwardParams& p;
  float factor;  // from a product of q and k to a score in powers of two
  QueryRows<Arithmetic, Dp, Q> q, dout;
  Lanes<Q> lanes;
  float* weights;                    // [key][Q]
  Unit* kept_rows;                   // [key][Q / P]: weights that dropout keeps
  Unit *dscore_rows, *dscore_pairs;  // [key][Q / P], [key / P][Q]: gradients of scores
  float* dq;                         // [Q][Dp], to be multiplied by scale
  float log_total[Q];                // in powers of two
  float delta[Q];                    // sum of out * dout: of weight times its gradient

  BackwardTile(Arena& arena, const Plan& plan_)
      : plan(plan_), p(*plan_.backward), factor(p.scale * kLog2E), q(arena), dout(arena) {
    weights = arena.take<float>(kKeyBlock * Q);
    dscore_pairs = arena.take<Unit>(kKeyBlock * Q / kPerUnit);
    if constexpr (kPerUnit == 1) {
      kept_rows = weights;
      dscore_rows = dscore_pairs;
    } else {
      kept_rows = arena.take<Unit>(kKeyBlock * Q / kPerUnit);
      dscore_rows = arena.take<Unit>(kKeyBlock * Q / kPerUnit);
    }
    dq = arena.take<float>(Q * Dp);
  }

  // `queries` are those of lane i at q_row(i); outputs and their gradients are at the lanes' rows.
  template <class QueryRow>
  void start(const TensorBNHD& queries, int64_t b, int64_t h, QueryRow q_row) {
    std::memset(dq, 0, sizeof(float) * Q * Dp);
    const auto row = [&](int i) { return lanes.live(i) ? lanes.position[i] - p.q_offset : -1; };
    q.read(p, queries, b, h, true, q_row);
    dout.read(p, p.dout, b, h, true, row);
    for (int i = 0; i < Q; ++i) {
      log_total[i] = delta[i] = 0.0f;
      const int64_t n = row(i);
      if (n < 0) continue;
      float out_row[Dp], converted[Dp];
      const float* dout_row = converted;
      read_row(out_row, row_of(p.out, p.dtype, b, n, h), p.dtype, static_cast<int>(p.D), Dp);
      if constexpr (kPerUnit == 1) {
        dout_row = dout.rows + i * Dp;
      } else {
        read_row(converted, row_of(p.dout, p.dtype, b, n, h), p.dtype, static_cast<int>(p.D), Dp);
      }
      delta[i] = dot(out_row, dout_row, Dp);
      log_total[i] = p.lse_BNH[(b * p.N + n) * p.H + h] * kLog2E;
    }
  }

  // The keys of a block, `size` rows from `row` on; adds to their dk and dv, and to dq.
  void add(const Keys<Arithmetic, Dp>& keys, int32_t row, int size, const Bounds<Q>* bounds,
           const StoredMask* survivors) {
    weigh(keys, row, size, bounds, survivors);
    differentiate(keys, row, size, survivors);
    constexpr int kSteps = Q / kPerUnit;
    add_matrix_product<Arithmetic, Dp, kSteps, 1>(size, kSteps, kept_rows, dout.pairs,
                                                  keys.dv + int64_t{row} * Dp);
    add_matrix_product<Arithmetic, Dp, kSteps, 1>(size, kSteps, dscore_rows, q.pairs,
                                                  keys.dk + int64_t{row} * Dp);
    add_matrix_product<Arithmetic, Dp, 1, Q>(Q, size / kPerUnit, dscore_pairs,
                                             keys.k_pairs + int64_t{row} / kPerUnit * Dp, dq);
  }

  __attribute__((noinline)) void weigh(const Keys<Arithmetic, Dp>& keys, int32_t row, int size,
                                       const Bounds<Q>* bounds, const StoredMask* survivors) {
    const Floats times = all(factor);
    for (int column = 0; column < Q / kLanes; column += kCols) {
      Floats minus_log_total[kCols];
      for (int n = 0; n < kCols; ++n) {
        minus_log_total[n] = all(0.0f) - load(log_total + (column + n) * kLanes);
      }
      for (int key = 0; key < size; key += kRows) {
        Floats x[kRows][kCols];
        products<Arithmetic, kCols, kUnits, Q>(keys.k_rows + int64_t{row + key} * kUnits,
                                               q.transposed + column * kLanes, x);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
          for (int n = 0; n < kCols; ++n)
            // At most 1, also where the log-sum-exp of large scores was rounded down.
            x[m][n] = exp2(lesser(all(0.0f), multiply_add(x[m][n], times, minus_log_total[n])));
        }
        if (bounds != nullptr) mask_tile<Q>(keys.number + row + key, *bounds, column, x);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
          for (int n = 0; n < kCols; ++n)
            store(weights + (key + m) * Q + (column + n) * kLanes, x[m][n]);
        }
        if constexpr (kPerUnit == 2) {
          if (survivors != nullptr) drop_tile<Q>(survivors + key * (Q / kLanes) + column, x);
          store_rows<Arithmetic, Q, kCols>(kept_rows + key * (Q / 2) + column * (kLanes / 2), x);
        }
      }
    }
  }

  // Gradients of the scores; for floats, weights then are those that dropout keeps.
  __attribute__((noinline)) void differentiate(const Keys<Arithmetic, Dp>& keys, int32_t row,
                                               int size, const StoredMask* survivors) {
    const Floats kept_scale = all(plan.kept_scale);
    for (int column = 0; column < Q / kLanes; column += kCols) {
      Floats minus_delta[kCols];
      for (int n = 0; n < kCols; ++n) {
        minus_delta[n] = all(0.0f) - load(delta + (column + n) * kLanes);
      }
      for (int key = 0; key < size; key += kRows) {
        Floats x[kRows][kCols];
        products<Arithmetic, kCols, kUnits, Q>(keys.v_rows + int64_t{row + key} * kUnits,
                                               dout.transposed + column * kLanes, x);
        float* weight = weights + key * Q + column * kLanes;
        if (survivors != nullptr) drop_tile<Q>(survivors + key * (Q / kLanes) + column, x);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
          for (int n = 0; n < kCols; ++n) {
            const Floats before = load(weight + m * Q + n * kLanes);
            x[m][n] = before * multiply_add(x[m][n], kept_scale, minus_delta[n]);
            if (kPerUnit == 1 && survivors != nullptr) {
              const StoredMask* kept = survivors + (key + m) * (Q / kLanes) + column + n;
              store(weight + m * Q + n * kLanes, keep_where(get(kept), before));
            }
          }
        }
        store_pairs<Arithmetic, Q, kCols>(dscore_pairs + key / kPerUnit * Q + column * kLanes, x);
        if constexpr (kPerUnit == 2) {
          store_rows<Arithmetic, Q, kCols>(dscore_rows + key * (Q / 2) + column * (kLanes / 2), x);
        }
      }
    }
  }
};

template <class Arithmetic, int Dp>
struct WindowBackward {
  static constexpr int Q = cpu::kQueryTile;

  const AttentionBackwardParams& p;
  Window<Arithmetic, Dp> window;
  BackwardTile<Arithmetic, Dp, Q> tile;
  Survivors<Q> survivors;
  float* sum;  // of one key's gradients

  WindowBackward(Arena& arena, const Plan& plan, const Task& task)
      : p(*plan.backward),
        window(arena, plan, task),
        tile(arena, plan),
        survivors(arena, plan, task, false),
        sum(arena.take<float>(Dp)) {}

  void run() {
    const Task& task = window.task;
    window.pack_columns();
    for (int64_t residue = task.first_residue; residue < task.end_residue; ++residue) {
      if (window.start_class(residue)) {
        for (int32_t first = window.first_query; first < window.end_query; first += Q)
          run_tile(first);
      }
      write_keys();
    }
    const int64_t num_floats = int64_t{window.plan.slots_of(task.b)} * Dp;
    float* partial = window.plan.partial(task.first_partial);
    if (num_floats == 0) return;
    std::memcpy(partial, window.keys.dk, sizeof(float) * num_floats);
    std::memcpy(partial + int64_t{window.plan.most_slots} * Dp, window.keys.dv,
                sizeof(float) * num_floats);
  }

  void run_tile(int32_t first) {
    const KeyClass& tokens = window.tokens;
    tile.lanes.set_window(window.plan, tokens, first, window.end_query);
    if (tile.lanes.any) {
      tile.start(p.q, tokens.b, tokens.h, [&](int i) {
        return tile.lanes.live(i) ? tile.lanes.position[i] - p.q_offset : -1;
      });
      window.for_each_block(
          tile.lanes, survivors, [&](int32_t row, int size, bool masked, const Bounds<Q>& bounds) {
            tile.add(window.keys, row, size, masked ? &bounds : nullptr, survivors.get());
          });
    }
    for (int i = 0; i < Q && first + i < window.end_query; ++i) {
      char* to = row_of(p.dq, p.dtype, tokens.b, tokens.position(first + i) - p.q_offset, tokens.h);
      if (tile.lanes.live(i)) {
        write_row(to, tile.dq + i * Dp, p.scale, p.dtype, static_cast<int>(p.D));
      } else {  // padding, or a global token, whose row is another task's
        write_zeros(to, p.dtype, static_cast<int>(p.D));
      }
    }
  }

  // The gradients of the class's keys that the task's queries reach; the first and the last task of
  // a class also write those that no query reaches.
  void write_keys() {
    const int32_t num_keys = window.tokens.num_keys, reach = window.plan.window;
    const int32_t reach_after = p.causal ? 0 : reach;
    const bool none = window.first_query >= window.end_query;
    const int32_t first = none || window.is_first ? 0 : window.first_query - reach;
    const int32_t end =
        none || window.is_last ? num_keys : smaller(window.end_query + reach_after, num_keys);
    for (int32_t step = first; step < end; ++step) {
      const int64_t row = window.row_of_step(step);
      const bool found = !none && step >= window.first_step && row < window.keys.count;
      const Task& task = window.task;
      float* edge = nullptr;  // dk and dv of this key, shared with another task
      if (task.left_edge >= 0 && step < window.first_query + reach_after) {
        edge = window.plan.edge(task.left_edge) + int64_t{step - window.first_query + reach} * Dp;
      } else if (task.right_edge >= 0 && step >= window.end_query - reach) {
        edge = window.plan.edge(task.right_edge) + int64_t{step - window.end_query + reach} * Dp;
      }
      const int64_t position = window.tokens.position(step);
      write_key(p.dk, position, found ? window.keys.dk + row * Dp : nullptr, edge, p.scale);
      if (edge != nullptr) edge += 2 * int64_t{reach} * Dp;
      write_key(p.dv, position, found ? window.keys.dv + row * Dp : nullptr, edge,
                window.plan.kept_scale);
    }
  }

  void write_key(const TensorBNHD& gradient, int64_t position, const float* found, float* edge,
                 float factor) {
    const Task& task = window.task;
    char* to = row_of(gradient, p.dtype, task.b, position, task.h);
    if (edge != nullptr && task.phase == 0) {
      if (found != nullptr) {
        std::memcpy(edge, found, sizeof(float) * Dp);
      } else {
        std::memset(edge, 0, sizeof(float) * Dp);
      }
    } else if (edge != nullptr) {
      for (int d = 0; d < Dp; ++d) sum[d] = edge[d] + (found != nullptr ? found[d] : 0.0f);
      write_row(to, sum, factor, p.dtype, static_cast<int>(p.D));
    } else if (found != nullptr) {
      write_row(to, found, factor, p.dtype, static_cast<int>(p.D));
    } else {
      write_zeros(to, p.dtype, static_cast<int>(p.D));
    }
  }
};

// The gradients that the global queries of one batch row and head send to their own projections.
template <class Arithmetic, int Dp>
struct GlobalBackward {
  static constexpr int Q = kRowTile;
  using Tile = BackwardTile<Arithmetic, Dp, Q>;

  const Plan& plan;
  const AttentionBackwardParams& p;
  const Task& task;
  Arena arena;
  Keys<Arithmetic, Dp> keys;
  Survivors<Q> survivors;
  int32_t first_slot, end_slot;

  GlobalBackward(Arena& arena_, const Plan& plan_, const Task& task_)
      : plan(plan_),
        p(*plan_.backward),
        task(task_),
        arena(arena_),
        keys(arena, kKeyBlock, true),
        survivors(arena, plan_, task_, true),
        first_slot(plan_.slot_begin_B[task_.b]),
        end_slot(plan_.slot_begin_B[task_.b + 1]) {
    tiles = arena.take<Tile*>(num_tiles());
    for (int32_t i = 0; i < num_tiles(); ++i) {
      Tile* memory = arena.take<Tile>(1);
      if (arena_.counts()) {
        Tile counted(arena, plan);
      } else {
        tiles[i] = new (memory) Tile(arena, plan);
      }
    }
    arena_ = arena;
  }
  Tile** tiles;

  int32_t num_tiles() const {
    return static_cast<int32_t>(cpu::ceil_div(end_slot - first_slot, Q));
  }

  void run() {
    for (int64_t g = 0; g < p.G; ++g) {
      write_zeros(row_of(p.dq_global, p.dtype, task.b, g, task.h), p.dtype, static_cast<int>(p.D));
    }
    for (int32_t i = 0; i < num_tiles(); ++i) start_tile(*tiles[i], first_slot + i * Q);
    for_each_global_block(plan, task, keys, 0, static_cast<int32_t>(p.M - 1),
                          [&](const KeyClass& tokens, int32_t step, int size) {
                            for (int32_t i = 0; i < num_tiles(); ++i)
                              add(*tiles[i], tokens, step, size);
                            write_keys(tokens, step, size);
                          });
    for (int32_t i = 0; i < num_tiles(); ++i) write_queries(*tiles[i], first_slot + i * Q);
  }

  void start_tile(Tile& tile, int32_t first) {
    tile.lanes.set_global_rows(plan, task.b, first, end_slot);
    tile.start(p.q_global, task.b, task.h, [&](int i) {
      return tile.lanes.live(i) ? int64_t{plan.slot_number[first + i]} : -1;
    });
  }

  void add(Tile& tile, const KeyClass& tokens, int32_t step, int size) {
    if (!tile.lanes.any || keys.all_dead(0, size)) return;
    survivors.draw_steps(tile.lanes, tokens.residue, step, size);
    const bool masked = needs_mask(keys, tile.lanes.keys, tokens, step, size);
    tile.add(keys, 0, size, masked ? &tile.lanes.keys : nullptr, survivors.get());
  }

  void write_keys(const KeyClass& tokens, int32_t step, int size) const {
    const int head_size = static_cast<int>(p.D);
    for (int32_t key = 0; key < size && step + key < tokens.num_keys; ++key) {
      const int64_t position = tokens.position(step + key);
      write_row(row_of(p.dk_global, p.dtype, task.b, position, task.h), keys.dk + key * Dp, p.scale,
                p.dtype, head_size);
      write_row(row_of(p.dv_global, p.dtype, task.b, position, task.h), keys.dv + key * Dp,
                plan.kept_scale, p.dtype, head_size);
    }
  }

  void write_queries(const Tile& tile, int32_t first) const {
    for (int i = 0; i < Q; ++i) {
      if (!tile.lanes.live(i)) continue;
      write_row(row_of(p.dq_global, p.dtype, task.b, plan.slot_number[first + i], task.h),
                tile.dq + i * Dp, p.scale, p.dtype, static_cast<int>(p.D));
    }
  }
};

// The gradients of the global keys: what each window task found, in the tasks' order.
template <int Dp>
void add_up_columns(const Plan& plan, const Task& task) {
  const AttentionBackwardParams& p = *plan.backward;
  for (int32_t slot = 0; slot < plan.slots_of(task.b); ++slot) {
    const int64_t position = plan.slot_position[plan.slot_begin_B[task.b] + slot];
    for (int of_v = 0; of_v < 2; ++of_v) {
      float sum[Dp] = {};
      for (int32_t i = task.first_partial; i < task.end_partial; ++i) {
        const float* found = plan.partial(i) + (int64_t{of_v} * plan.most_slots + slot) * Dp;
        for (int d = 0; d < Dp; ++d) sum[d] += found[d];
      }
      write_row(row_of(of_v ? p.dv : p.dk, p.dtype, task.b, position, task.h), sum,
                of_v ? plan.kept_scale : p.scale, p.dtype, static_cast<int>(p.D));
    }
  }
}

}  // namespace

void backward_task(const Plan& plan, const Task& task) {
  with_arithmetic(plan, [&](auto arithmetic, auto head_size) {
    using Arithmetic = decltype(arithmetic);
    constexpr int kSize = decltype(head_size)::value;
    switch (task.work) {
      case cpu::Work::kWindow:
        return run_in_scratch<WindowBackward<Arithmetic, kSize>>(plan, task);
      case cpu::Work::kGlobalRows:
        return run_in_scratch<GlobalBackward<Arithmetic, kSize>>(plan, task);
      case cpu::Work::kGlobalColumns:
        return add_up_columns<kSize>(plan, task);
    }
  });
}

}  // namespace longpretrain::LONGPRETRAIN_LEVEL
