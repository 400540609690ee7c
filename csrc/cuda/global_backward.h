// What the kernels about the gradients of global tokens share. Their tiles are transposed: rows are
// keys, columns queries, 16 each for a warp. Element x[n][e] has bit 4 * n + e of a lane's masks.
//
// Letters: see ../attention.h.
#pragma once

#include "backward.h"
#include "global.h"

namespace longpretrain::cuda {

// A column. In shared memory, 16 together.
struct __align__(16) QueryColumn {
  QueryTotals totals;
  Range keys;  // positions of those that it may see
};

// The column of the query at a position; -1: of none, whose weights are 0.
__device__ __forceinline__ QueryColumn column_of(const Problem& p, int32_t b, int32_t h,
                                                 int32_t query) {
  if (query < 0) return {no_query(), {0, -1}};
  const int64_t row = p.row(b, query - p.q_offset, h);
  return {{p.lse_BNH[row] * kLog2E, p.delta_BNH[row]}, reach_of(p, b, query)};
}

__device__ __forceinline__ int column_number(int n, int e) {
  return 8 * n + 2 * (lane_id() % 4) + e % 2;
}

// Which elements count; `key` has the positions of the lane's two rows, -1 where there is none.
__device__ __forceinline__ uint32_t counting(const QueryColumn* columns, const int32_t (&key)[2]) {
  uint32_t counts = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int32_t position = key[i % 4 / 2];
    if (position >= 0 && columns[column_number(i / 4, i)].keys.has(position)) counts |= 1u << i;
  }
  return counts;
}

// Which weights dropout keeps; `drawn` is that of draw_sixteen, for the query of column lane % 16.
__device__ __forceinline__ uint32_t kept_of(uint32_t drawn) {
  uint32_t kept = 0;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint32_t rows = __shfl_sync(~0u, drawn, column_number(n, e)) >> (lane_id() / 4);
      kept |= (rows & 1) << (4 * n + e) | (rows >> 8 & 1) << (4 * n + 2 + e);
    }
  }
  return kept;
}

// Products of queries and keys become weights, gradients of weights become those of scores.
__device__ __forceinline__ void differentiate_tile(float (&weights)[2][4], float (&gradients)[2][4],
                                                   const Problem& p, const QueryColumn* columns,
                                                   uint32_t counts, uint32_t kept) {
  const Factors factors(p);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    differentiate<true, true>(weights[i / 4][i % 4], gradients[i / 4][i % 4], factors,
                              columns[column_number(i / 4, i)].totals, (counts >> i & 1) != 0,
                              (kept >> i & 1) != 0);
  }
}

}  // namespace longpretrain::cuda
