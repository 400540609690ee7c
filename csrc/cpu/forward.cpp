// The forward pass of one task: one softmax over the keys of a window and the global keys, or over
// all keys for a global query.
//
// The softmax is first tried without a running maximum: weights are exp(score), which floats hold
// for scores from about -41 to 27, and the sum tells whether that went well. If it did not, the
// tile is done again with one.
//
// Letters: see attention.h and queries.h.
#include <cmath>

#include "window.h"

namespace longpretrain::LONGPRETRAIN_LEVEL {
namespace {

template <class Arithmetic, int Dp, int Q>
struct ForwardTile {
  using Unit = typename Arithmetic::Unit;
  static constexpr int kPerUnit = Arithmetic::kPerUnit, kUnits = Dp / kPerUnit;
  static constexpr int kCols = Q / kLanes < kVectors ? Q / kLanes : kVectors;
  static constexpr float kLowest = -0x1.fffffep127f;  // of all floats

  const Plan& plan;
  const AttentionParams& p;
  float factor;  // from a product of q and k to a score in powers of two
  QueryRows<Arithmetic, Dp, Q> q;
  Lanes<Q> lanes;
  Unit* weights;  // [key / kPerUnit][Q]
  float* scores;  // [key][Q], with a running maximum only
  float* out;     // [Q][Dp], not yet divided by total
  float total[Q], highest[Q];

  ForwardTile(Arena& arena, const Plan& plan_)
      : plan(plan_), p(*plan_.params), factor(p.scale * kLog2E), q(arena) {
    weights = arena.take<Unit>(kKeyBlock / kPerUnit * Q);
    scores = arena.take<float>(kKeyBlock * Q);
    out = arena.take<float>(Q * Dp);
  }

  void start() {
    std::memset(out, 0, sizeof(float) * Q * Dp);
    for (int i = 0; i < Q; ++i) {
      total[i] = 0.0f;
      highest[i] = kLowest;
    }
  }

  // Adds the keys of a block, `size` rows from `row` on.
  void add(const Keys<Arithmetic, Dp>& keys, int32_t row, int size, const Bounds<Q>* bounds,
           const StoredMask* survivors, bool safely) {
    if (safely) {
      find_scores(keys, row, size, bounds);
      raise_highest(size);
      weigh_scores(size, survivors);
    } else {
      weigh(keys, row, size, bounds, survivors);
    }
    add_matrix_product<Arithmetic, Dp, 1, Q>(Q, size / kPerUnit, weights,
                                             keys.v_pairs + int64_t{row} / kPerUnit * Dp, out);
  }

  // Weights straight from the products, which never leave the registers.
  __attribute__((noinline)) void weigh(const Keys<Arithmetic, Dp>& keys, int32_t row, int size,
                                       const Bounds<Q>* bounds, const StoredMask* survivors) {
    const Floats times = all(factor);
    for (int column = 0; column < Q / kLanes; column += kCols) {
      Floats sum[kCols];
      for (int n = 0; n < kCols; ++n) sum[n] = load(total + (column + n) * kLanes);
      for (int key = 0; key < size; key += kRows) {
        Floats x[kRows][kCols];
        products<Arithmetic, kCols, kUnits, Q>(keys.k_rows + int64_t{row + key} * kUnits,
                                               q.transposed + column * kLanes, x);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
          for (int n = 0; n < kCols; ++n) x[m][n] = exp2(x[m][n] * times);
        }
        if (bounds != nullptr) mask_tile<Q>(keys.number + row + key, *bounds, column, x);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
          for (int n = 0; n < kCols; ++n) sum[n] = sum[n] + x[m][n];
        }
        if (survivors != nullptr) drop_tile<Q>(survivors + key * (Q / kLanes) + column, x);
        store_pairs<Arithmetic, Q, kCols>(weights + key / kPerUnit * Q + column * kLanes, x);
      }
      for (int n = 0; n < kCols; ++n) store(total + (column + n) * kLanes, sum[n]);
    }
  }

  __attribute__((noinline)) void find_scores(const Keys<Arithmetic, Dp>& keys, int32_t row,
                                             int size, const Bounds<Q>* bounds) {
    const Floats nothing = all(-INFINITY);
    for (int column = 0; column < Q / kLanes; column += kCols) {
      for (int key = 0; key < size; key += kRows) {
        Floats x[kRows][kCols];
        products<Arithmetic, kCols, kUnits, Q>(keys.k_rows + int64_t{row + key} * kUnits,
                                               q.transposed + column * kLanes, x);
        for (int m = 0; m < kRows; ++m) {
          for (int n = 0; n < kCols; ++n) {
            Floats score = x[m][n] * all(factor);
            if (bounds != nullptr) {
              const Ints low = load(bounds->low + (column + n) * kLanes);
              const Ints high = load(bounds->high + (column + n) * kLanes);
              score = select(within(all(keys.number[row + key + m]), low, high), score, nothing);
            }
            store(scores + (key + m) * Q + (column + n) * kLanes, score);
          }
        }
      }
    }
  }

  // What was added up so far is scaled to the new maximum.
  __attribute__((noinline)) void raise_highest(int size) {
    float shrink[Q];
    for (int n = 0; n < Q; n += kLanes) {
      const Floats before = load(highest + n);
      Floats now = before;
      for (int key = 0; key < size; ++key) now = larger(now, load(scores + key * Q + n));
      const Floats ratio = exp2(before - now);
      store(highest + n, now);
      store(shrink + n, ratio);
      store(total + n, load(total + n) * ratio);
    }
    for (int i = 0; i < Q; ++i) {
      if (shrink[i] == 1.0f) continue;
      for (int d = 0; d < Dp; ++d) out[i * Dp + d] *= shrink[i];
    }
  }

  __attribute__((noinline)) void weigh_scores(int size, const StoredMask* survivors) {
    for (int column = 0; column < Q / kLanes; column += kCols) {
      for (int key = 0; key < size; key += kRows) {
        Floats x[kRows][kCols];
        for (int n = 0; n < kCols; ++n) {
          const int lane = (column + n) * kLanes;
          const Floats top = load(highest + lane);
          Floats sum = load(total + lane);
          for (int m = 0; m < kRows; ++m) {
            x[m][n] = exp2(load(scores + (key + m) * Q + lane) - top);
            sum = sum + x[m][n];
          }
          store(total + lane, sum);
        }
        if (survivors != nullptr) drop_tile<Q>(survivors + key * (Q / kLanes) + column, x);
        store_pairs<Arithmetic, Q, kCols>(weights + key / kPerUnit * Q + column * kLanes, x);
      }
    }
  }

  // Whether floats held all sums: a row's largest weight is one of its keys', and not tiny. NaN is
  // no.
  bool went_well() const {
    for (int i = 0; i < Q; ++i) {
      const bool fits = total[i] >= 0x1p-60f && total[i] <= 0x1p40f;
      if (lanes.live(i) && !fits) return false;
    }
    return true;
  }

  void write(int lane, int64_t b, int64_t n, int64_t h, bool safely) const {
    const float factor_of_row = plan.kept_scale / total[lane];
    write_row(row_of(p.out, p.dtype, b, n, h), out + lane * Dp, factor_of_row, p.dtype,
              static_cast<int>(p.D));
    const float log_total = std::log(total[lane]);
    p.lse_BNH[(b * p.N + n) * p.H + h] = safely ? highest[lane] * kLn2 + log_total : log_total;
  }
};

template <class Arithmetic, int Dp>
struct WindowForward {
  static constexpr int Q = cpu::kQueryTile;

  Window<Arithmetic, Dp> window;
  ForwardTile<Arithmetic, Dp, Q> tile;
  Survivors<Q> survivors;
  bool safely = false;  // once a tile needed it, the task's next ones will

  WindowForward(Arena& arena, const Plan& plan, const Task& task)
      : window(arena, plan, task), tile(arena, plan), survivors(arena, plan, task, false) {}

  void run() {
    window.pack_columns();
    for (int64_t residue = window.task.first_residue; residue < window.task.end_residue;
         ++residue) {
      if (!window.start_class(residue)) continue;
      for (int32_t first = window.first_query; first < window.end_query; first += Q)
        run_tile(first);
    }
  }

  void run_tile(int32_t first) {
    const AttentionParams& p = window.p;
    const KeyClass& tokens = window.tokens;
    tile.lanes.set_window(window.plan, tokens, first, window.end_query);
    if (tile.lanes.any) {
      tile.q.read(p, p.q, tokens.b, tokens.h, false, [&](int i) {
        return tile.lanes.live(i) ? tile.lanes.position[i] - p.q_offset : -1;
      });
      if (!safely) safely = !attend(false);
      if (safely) attend(true);
    }
    for (int i = 0; i < Q && first + i < window.end_query; ++i) {
      const int64_t position = tokens.position(first + i), n = position - p.q_offset;
      if (tile.lanes.live(i)) {
        tile.write(i, tokens.b, n, tokens.h, safely);
      } else if (window.plan.flags_BM[tokens.b * p.M + position] == cpu::kPadding) {
        write_zeros(row_of(p.out, p.dtype, tokens.b, n, tokens.h), p.dtype, static_cast<int>(p.D));
        p.lse_BNH[(tokens.b * p.N + n) * p.H + tokens.h] = INFINITY;
      }
    }
  }

  bool attend(bool with_maximum) {
    tile.start();
    window.for_each_block(tile.lanes, survivors,
                          [&](int32_t row, int size, bool masked, const Bounds<Q>& bounds) {
                            tile.add(window.keys, row, size, masked ? &bounds : nullptr,
                                     survivors.get(), with_maximum);
                          });
    return with_maximum || tile.went_well();
  }
};

// The rows of the global queries of one batch row and head, each over all keys.
template <class Arithmetic, int Dp>
struct GlobalForward {
  static constexpr int Q = kRowTile;
  using Tile = ForwardTile<Arithmetic, Dp, Q>;

  const Plan& plan;
  const AttentionParams& p;
  const Task& task;
  Keys<Arithmetic, Dp> keys;
  Tile tile;
  Survivors<Q> survivors;

  GlobalForward(Arena& arena, const Plan& plan_, const Task& task_)
      : plan(plan_),
        p(*plan_.params),
        task(task_),
        keys(arena, kKeyBlock, false),
        tile(arena, plan_),
        survivors(arena, plan_, task_, true) {}

  void run() {
    const int32_t end = plan.slot_begin_B[task.b + 1];
    for (int32_t first = plan.slot_begin_B[task.b]; first < end; first += Q) run_tile(first, end);
  }

  void run_tile(int32_t first, int32_t end) {
    tile.lanes.set_global_rows(plan, task.b, first, end);
    if (!tile.lanes.any) return;
    tile.q.read(p, p.q_global, task.b, task.h, false, [&](int i) {
      return tile.lanes.live(i) ? int64_t{plan.slot_number[first + i]} : -1;
    });
    bool safely = false;
    if (!attend(safely)) attend(safely = true);
    for (int i = 0; i < Q; ++i) {
      if (tile.lanes.live(i))
        tile.write(i, task.b, tile.lanes.position[i] - p.q_offset, task.h, safely);
    }
  }

  bool attend(bool with_maximum) {
    tile.start();
    const Bounds<Q>& bounds = tile.lanes.keys;
    for_each_global_block(plan, task, keys, bounds.first_needed, bounds.last_needed,
                          [&](const KeyClass& tokens, int32_t step, int size) {
                            if (keys.all_dead(0, size)) return;
                            survivors.draw_steps(tile.lanes, tokens.residue, step, size);
                            const bool masked = needs_mask(keys, bounds, tokens, step, size);
                            tile.add(keys, 0, size, masked ? &bounds : nullptr, survivors.get(),
                                     with_maximum);
                          });
    return with_maximum || tile.went_well();
  }
};

}  // namespace

void forward_task(const Plan& plan, const Task& task) {
  with_arithmetic(plan, [&](auto arithmetic, auto head_size) {
    using Arithmetic = decltype(arithmetic);
    constexpr int kSize = decltype(head_size)::value;
    if (task.work == cpu::Work::kWindow) {
      run_in_scratch<WindowForward<Arithmetic, kSize>>(plan, task);
    } else {
      run_in_scratch<GlobalForward<Arithmetic, kSize>>(plan, task);
    }
  });
}

}  // namespace longpretrain::LONGPRETRAIN_LEVEL
