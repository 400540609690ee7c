// What is done to the weights of a tile: scores are kept transposed, [key][query], so that a lane
// is a query, and softmax never combines lanes.
//
// Letters: see attention.h; Q is the queries of a tile.
#pragma once

#include "philox.h"
#include "queries.h"

namespace longpretrain::LONGPRETRAIN_LEVEL {
namespace {

// Which weights of a block survive dropout: [key][Q / kLanes].
template <int Q>
struct Survivors {
  StoredMask* masks;
  uint64_t seed = 0;
  int32_t drop_below = 0;
  uint32_t head = 0;

  Survivors(Arena& arena, const Plan& plan, const Task& task, bool global_rows)
      : masks(arena.take<StoredMask>(kKeyBlock * (Q / kLanes))),
        drop_below(plan.params->drop_below) {
    head = static_cast<uint32_t>(task.h) + (global_rows ? kGlobalRow : 0);
    if (drop_below != 0 && plan.params->dropout_seed_B != nullptr) {
      seed = static_cast<uint64_t>(plan.params->dropout_seed_B[task.b]);
    }
  }

  // Null without dropout: nothing to apply.
  const StoredMask* get() const { return drop_below != 0 ? masks : nullptr; }

  // Neighbouring steps of a class; first_step and num_keys are multiples of sixteen.
  void draw_steps(const Lanes<Q>& lanes, int32_t residue, int32_t first_step, int num_keys) {
    if (drop_below == 0) return;
    for (int key = 0; key < num_keys; key += kSixteen) {
      const uint32_t sixteen = static_cast<uint32_t>(first_step + key) / kSixteen;
      const Counter counter{head, static_cast<uint32_t>(residue), sixteen, seed};
      for (int n = 0; n < Q / kLanes; ++n) {
        Ints words[4];
        draw(words, load(lanes.position + n * kLanes), counter);
        StoredMask* to = masks + key * (Q / kLanes) + n;
        for (int i = 0; i < 4; ++i, to += 4 * (Q / kLanes)) {
          put(to, survives<0>(words[i], drop_below));
          put(to + Q / kLanes, survives<1>(words[i], drop_below));
          put(to + 2 * (Q / kLanes), survives<2>(words[i], drop_below));
          put(to + 3 * (Q / kLanes), survives<3>(words[i], drop_below));
        }
      }
    }
  }

  // Keys anywhere; a number below 0 is no key.
  void draw_positions(const Lanes<Q>& lanes, int32_t dilation, const int32_t* position,
                      int num_keys) {
    if (drop_below == 0) return;
    for (int key = 0; key < num_keys; ++key) {
      const uint32_t at = static_cast<uint32_t>(greater(position[key], 0));
      const uint32_t step = at / static_cast<uint32_t>(dilation);
      const Counter counter{head, at % static_cast<uint32_t>(dilation), step / kSixteen, seed};
      for (int n = 0; n < Q / kLanes; ++n) {
        Ints words[4];
        draw(words, load(lanes.position + n * kLanes), counter);
        const Ints word = words[step / 4 % 4];
        StoredMask* to = masks + key * (Q / kLanes) + n;
        switch (step % 4) {
          case 0:
            put(to, survives<0>(word, drop_below));
            break;
          case 1:
            put(to, survives<1>(word, drop_below));
            break;
          case 2:
            put(to, survives<2>(word, drop_below));
            break;
          default:
            put(to, survives<3>(word, drop_below));
            break;
        }
      }
    }
  }
};

// kRows x kCols weights into the form in which they are A of a product over keys: [key / P][Q].
template <class Arithmetic, int Q, int kCols>
LONGPRETRAIN_INLINE void store_pairs(typename Arithmetic::Unit* to, Floats (&x)[kRows][kCols]) {
  if constexpr (Arithmetic::kPerUnit == 1) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
      for (int n = 0; n < kCols; ++n) store(to + m * Q + n * kLanes, x[m][n]);
    }
  } else {
#if defined(__AVX512BF16__)
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; m += 2) {
#pragma GCC unroll 16
      for (int n = 0; n < kCols; ++n) {
        const __m512i two = (__m512i)_mm512_cvtne2ps_pbh(x[m + 1][n], x[m][n]);
        _mm512_storeu_si512(to + m / 2 * Q + n * kLanes, _mm512_permutexvar_epi16(order, two));
      }
    }
#endif
  }
}

// Into the form in which they are A of a product over queries: [key][Q / P].
template <class Arithmetic, int Q, int kCols>
LONGPRETRAIN_INLINE void store_rows(typename Arithmetic::Unit* to, Floats (&x)[kRows][kCols]) {
  if constexpr (Arithmetic::kPerUnit == 1) {
    store_pairs<Arithmetic, Q, kCols>(to, x);
  } else {
#if defined(__AVX512BF16__)
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
      for (int n = 0; n < kCols; ++n) {
        const __m256i one = (__m256i)_mm512_cvtneps_pbh(x[m][n]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + m * (Q / 2) + n * (kLanes / 2)), one);
      }
    }
#endif
  }
}

// 0 where the query does not reach the key. `column` counts vectors of queries.
template <int Q, int kCols>
LONGPRETRAIN_INLINE void mask_tile(const int32_t* number, const Bounds<Q>& bounds, int column,
                                   Floats (&x)[kRows][kCols]) {
#pragma GCC unroll 16
  for (int n = 0; n < kCols; ++n) {
    const Ints low = load(bounds.low + (column + n) * kLanes);
    const Ints high = load(bounds.high + (column + n) * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
      x[m][n] = keep_where(within(all(number[m]), low, high), x[m][n]);
  }
}

// 0 where dropout drops the weight.
template <int Q, int kCols>
LONGPRETRAIN_INLINE void drop_tile(const StoredMask* survivors, Floats (&x)[kRows][kCols]) {
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < kCols; ++n)
      x[m][n] = keep_where(get(survivors + m * (Q / kLanes) + n), x[m][n]);
  }
}

}  // namespace
}  // namespace longpretrain::LONGPRETRAIN_LEVEL
