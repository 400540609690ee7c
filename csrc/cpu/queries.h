// Tiles of queries, and which keys they reach.
//
// Letters: see attention.h; Dp is D filled up with zeros, Q the queries of a tile.
#pragma once

#include "keys.h"

namespace longpretrain::LONGPRETRAIN_LEVEL {
namespace {

// The keys that each query of a tile reaches, by their numbers, first and last. A lane without a
// query reaches none.
template <int Q>
struct Bounds {
  int32_t low[Q], high[Q];
  // Over lanes with a query, which keys are needed; over all lanes, which ones need no mask.
  int32_t first_needed, last_needed, first_free, last_free;

  void summarize() {
    first_needed = last_free = INT32_MAX;
    last_needed = first_free = -1;
    for (int i = 0; i < Q; ++i) {
      const bool none = low[i] > high[i];
      first_free = greater(first_free, low[i]);
      last_free = smaller(last_free, high[i]);
      first_needed = smaller(first_needed, none ? INT32_MAX : low[i]);
      last_needed = greater(last_needed, none ? -1 : high[i]);
    }
  }
};

// A tile of queries: where they sit and what they reach.
template <int Q>
struct Lanes {
  int32_t position[Q];  // -1: no query, or one that is computed elsewhere or not at all
  Bounds<Q> keys;       // of a window: in steps of the class; of a global row: positions
  Bounds<Q> columns;    // of a window: positions of global keys
  int32_t first;        // of a window: the step of lane 0
  bool any;

  bool live(int lane) const { return position[lane] >= 0; }

  // What documents and causality leave of a sequence for the token at a position.
  static void reach(const Plan& plan, int64_t b, int64_t position, int32_t* low, int32_t* high) {
    const AttentionParams& p = *plan.params;
    *low = 0;
    *high = static_cast<int32_t>(p.M - 1);
    if (plan.document_begin_BM != nullptr) {
      *low = plan.document_begin_BM[b * p.M + position];
      *high = plan.document_end_BM[b * p.M + position] - 1;
    }
    if (p.causal) *high = smaller(*high, static_cast<int32_t>(position));
  }

  void clear(int lane) {
    position[lane] = -1;
    keys.low[lane] = columns.low[lane] = INT32_MAX;
    keys.high[lane] = columns.high[lane] = -1;
  }

  // Up to Q steps of a class from first_step on, those before end.
  void set_window(const Plan& plan, const KeyClass& tokens, int32_t first_step, int32_t end) {
    const AttentionParams& p = *plan.params;
    const uint8_t* flags_M = plan.flags_BM + tokens.b * p.M;
    const int32_t last_key = static_cast<int32_t>(p.M - 1), last_step = tokens.num_keys - 1;
    first = first_step;
    any = false;
    for (int i = 0; i < Q; ++i) {
      const int32_t step = first_step + i;
      position[i] = static_cast<int32_t>(tokens.position(step));
      columns.low[i] = 0;
      columns.high[i] = p.causal ? position[i] : last_key;
      keys.low[i] = greater(step - plan.window, 0);
      keys.high[i] = p.causal ? step : smaller(step + plan.window, last_step);
    }
    if (plan.document_begin_BM != nullptr) stay_in_documents(plan, tokens, end);
    for (int i = 0; i < Q; ++i) {
      if (first_step + i >= end || flags_M[position[i]] != 0) {
        clear(i);
      } else {
        any = true;
      }
    }
    keys.summarize();
  }

  void stay_in_documents(const Plan& plan, const KeyClass& tokens, int32_t end) {
    const int64_t row = tokens.b * plan.params->M;
    for (int i = 0; i < Q && first + i < end; ++i) {
      const int32_t begin = plan.document_begin_BM[row + position[i]];
      const int32_t last = plan.document_end_BM[row + position[i]] - 1;
      columns.low[i] = greater(columns.low[i], begin);
      columns.high[i] = smaller(columns.high[i], last);
      keys.low[i] = greater(keys.low[i], tokens.first_step_from(begin));
      keys.high[i] = smaller(keys.high[i], tokens.last_step_to(last));
    }
  }

  // The global tokens numbered [first, end) of a batch row, as queries; end - first <= Q.
  void set_global_rows(const Plan& plan, int64_t b, int32_t first, int32_t end) {
    const AttentionParams& p = *plan.params;
    any = false;
    for (int i = 0; i < Q; ++i) {
      const int64_t token = first + i < end ? plan.slot_position[first + i] : -1;
      if (token < p.q_offset || token >= p.q_offset + p.N) {
        clear(i);
        continue;
      }
      any = true;
      position[i] = static_cast<int32_t>(token);
      reach(plan, b, token, &keys.low[i], &keys.high[i]);
    }
    keys.summarize();
  }
};

// [rows][columns] of 32-bit units -> [columns][rows].
template <int kUnitRows, int kUnitColumns, class Unit>
void transpose(Unit* to, const Unit* from) {
#if defined(__AVX512F__)
  for (int i = 0; i < kUnitRows; i += 16) {
    for (int j = 0; j < kUnitColumns; j += 16) {
      __m512i x[16], y[16];
      for (int k = 0; k < 16; ++k) x[k] = _mm512_loadu_si512(from + (i + k) * kUnitColumns + j);
      for (int k = 0; k < 16; k += 2) {
        y[k] = _mm512_unpacklo_epi32(x[k], x[k + 1]);
        y[k + 1] = _mm512_unpackhi_epi32(x[k], x[k + 1]);
      }
      for (int k = 0; k < 16; k += 4) {
        for (int e = 0; e < 2; ++e) {
          x[k + 2 * e] = _mm512_unpacklo_epi64(y[k + e], y[k + 2 + e]);
          x[k + 2 * e + 1] = _mm512_unpackhi_epi64(y[k + e], y[k + 2 + e]);
        }
      }
      for (int k = 0; k < 16; k += 8) {
        for (int e = 0; e < 4; ++e) {
          y[k + e] = _mm512_shuffle_i32x4(x[k + e], x[k + 4 + e], 0x88);
          y[k + 4 + e] = _mm512_shuffle_i32x4(x[k + e], x[k + 4 + e], 0xdd);
        }
      }
      for (int e = 0; e < 8; ++e) {
        Unit* low = to + (j + e) * kUnitRows + i;
        _mm512_storeu_si512(low, _mm512_shuffle_i32x4(y[e], y[8 + e], 0x88));
        _mm512_storeu_si512(low + 8 * kUnitRows, _mm512_shuffle_i32x4(y[e], y[8 + e], 0xdd));
      }
    }
  }
#else
  // Squares that stay in the nearest cache lines.
  for (int i = 0; i < kUnitRows; i += 8) {
    for (int j = 0; j < kUnitColumns; j += 8) {
      for (int a = 0; a < 8; ++a) {
        for (int c = 0; c < 8; ++c)
          to[(j + c) * kUnitRows + i + a] = from[(i + a) * kUnitColumns + j + c];
      }
    }
  }
#endif
}

// Queries, or gradients of their outputs, in the forms that the products want.
template <class Arithmetic, int Dp, int Q>
struct QueryRows {
  using Unit = typename Arithmetic::Unit;
  static constexpr int kPerUnit = Arithmetic::kPerUnit, kUnits = Dp / kPerUnit;

  Unit* rows;        // [Q][kUnits]
  Unit* transposed;  // [kUnits][Q]
  Unit* pairs;       // [Q / kPerUnit][Dp]

  explicit QueryRows(Arena& arena) {
    rows = arena.take<Unit>(Q * kUnits);
    transposed = arena.take<Unit>(Q * kUnits);
    pairs = kPerUnit == 1 ? rows : arena.take<Unit>(Q * kUnits);
  }

  // Lane i is row_number(i) of x; rows below 0 are zeros.
  template <class RowNumber>
  void read(const AttentionParams& p, const TensorBNHD& x, int64_t b, int64_t h, bool want_pairs,
            RowNumber row_number) {
    for (int i = 0; i < Q; ++i) {
      const int64_t n = row_number(i);
      const char* from = n < 0 ? nullptr : row_of(x, p.dtype, b, n, h);
      read_units(rows + i * kUnits, from, p.dtype, static_cast<int>(p.D), Dp);
    }
    transpose<Q, kUnits>(transposed, rows);
    if constexpr (kPerUnit == 2) {
      for (int i = 0; want_pairs && i < Q; i += 2) {
        interleave(pairs + i / 2 * Dp, rows + i * kUnits, rows + (i + 1) * kUnits, Dp);
      }
    }
  }
};

}  // namespace
}  // namespace longpretrain::LONGPRETRAIN_LEVEL
