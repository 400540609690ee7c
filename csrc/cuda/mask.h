// Which elements of a tile of scores count. A warp's tile has 16 rows and kTokenTile columns, as in
// products.h; rows and columns are tokens of one class, either queries and keys or, in the backward
// pass, keys and queries: who sees whom is told by the same ranges seen from either side.
//
// Letters: see ../attention.h.
#pragma once

#include "tile.h"

namespace longpretrain::cuda {

// Tokens from `first` to `last`, by steps or positions; none when first > last.
struct Range {
  int32_t first, last;

  __device__ __forceinline__ bool has(int32_t i) const { return first <= i && i <= last; }
};

// A range for each of a lane's two rows, g and g + 8.
struct RowRanges {
  Range row[2];
};

// What any of some lanes sees and what all of them see; lanes l and l + kDistance, 2 * kDistance
// and so on are asked, and all told.
template <int kDistance>
__device__ __forceinline__ void share_ranges(Range& any, Range& all) {
#pragma unroll
  for (int distance = kDistance; distance < kWarp; distance *= 2) {
    any.first = smaller(any.first, __shfl_xor_sync(~0u, any.first, distance));
    any.last = larger(any.last, __shfl_xor_sync(~0u, any.last, distance));
    all.first = larger(all.first, __shfl_xor_sync(~0u, all.first, distance));
    all.last = smaller(all.last, __shfl_xor_sync(~0u, all.last, distance));
  }
}

// What documents leave for a token: positions.
__device__ __forceinline__ Range document_of(const Problem& p, int32_t b, int32_t position) {
  if (p.document_begin_BM == nullptr) return {0, p.M - 1};
  const int64_t token = p.token(b, position);
  return {p.document_begin_BM[token], p.document_end_BM[token] - 1};
}

// The steps of a class within a window about `step`, on both sides or one: those seen by a query
// when causal has kBefore, those by which a key is seen when it has kBehind. The step is one of the
// class.
enum class Side { kBefore, kBehind };

__device__ __forceinline__ Range window_of(const Problem& p, int32_t b, const ResidueClass& tokens,
                                           int32_t step, Side causal_side) {
  Range steps = {larger(step - p.window, 0), smaller(step + p.window, tokens.num_keys - 1)};
  if (p.causal && causal_side == Side::kBefore) steps.last = step;
  if (p.causal && causal_side == Side::kBehind) steps.first = step;
  if (p.document_begin_BM != nullptr) {
    const Range document = document_of(p, b, tokens.position(step));
    steps.first = larger(steps.first, tokens.first_step_from(document.first));
    steps.last = smaller(steps.last, tokens.last_step_to(document.last));
  }
  return steps;
}

// The flags of kTokenTile tokens of a class, two in a lane, asked for early and looked at late.
struct FlagLoader {
  const Problem& p;
  const int32_t& b;
  const ResidueClass& tokens;
  int32_t begin, end;

  // Tokens outside of [begin, end) are dead.
  __device__ __forceinline__ FlagLoader(const Problem& p_, const int32_t& b_,
                                        const ResidueClass& tokens_, int32_t begin_, int32_t end_)
      : p(p_), b(b_), tokens(tokens_), begin(begin_), end(end_) {}

  __device__ __forceinline__ uint8_t flag(int32_t step) const {
    const bool is_token = step >= begin && step < end;
    return is_token ? p.flags_BM[p.token(b, tokens.position(step))] : kPadding;
  }
  // Of the steps first_step + lane and, in the upper half, kWarp further.
  __device__ __forceinline__ uint32_t fetch(int32_t first_step) const {
    const int32_t step = first_step + lane_id();
    return flag(step) | uint32_t{flag(step + kWarp)} << 16;
  }
};

// One bit for each of kTokenTile columns.
struct ColumnBits {
  uint32_t word[2];

  __device__ __forceinline__ bool any() const { return (word[0] | word[1]) != 0; }
  __device__ __forceinline__ bool all() const { return (word[0] & word[1]) == ~0u; }
};

__device__ __forceinline__ ColumnBits live_columns(uint32_t fetched) {
  return {{__ballot_sync(~0u, (fetched & 0xffff) == 0), __ballot_sync(~0u, fetched >> 16 == 0)}};
}

// Bits from `first` on, of 32.
__device__ __forceinline__ uint32_t bits_from(int32_t first) {
  return first <= 0 ? ~0u : first >= 32 ? 0u : ~0u << first;
}

// For each of a lane's rows a bit for each of its own columns, of 32: element x[n][e] has bit
// 8 * n + e % 2 of word[e / 2].
struct WordBits {
  uint32_t word[2];

  __device__ __forceinline__ bool has(int n, int e) const {
    return (word[e / 2] >> (8 * n + e % 2) & 1) != 0;
  }
};

template <int kTiles>
__device__ __forceinline__ void put_where_not(const WordBits& bits, float value,
                                              float (&x)[kTiles][4]) {
  static_assert(kTiles <= 4);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!bits.has(n, e)) x[n][e] = value;
    }
  }
}

// The columns are the 32 steps from first_step on.
__device__ __forceinline__ WordBits allowed_32(const RowRanges& ranges, uint32_t live,
                                               int32_t first_step) {
  WordBits bits;
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const uint32_t within = bits_from(ranges.row[x].first - first_step) &
                            ~bits_from(ranges.row[x].last + 1 - first_step);
    bits.word[x] = (live & within) >> (2 * (fresh_lane_id() % 4));
  }
  return bits;
}

}  // namespace longpretrain::cuda
