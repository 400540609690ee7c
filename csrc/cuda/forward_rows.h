// The queries of a block of the window's forward kernel: which they are and what they see.
//
// Letters: see ../attention.h.
#pragma once

#include "mask.h"
#include "softmax.h"

namespace longpretrain::cuda {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kStripRows = 16;  // a warp has one or two strips

// What a block's warps know in common, and what a thread needs once in a tile. It lies in shared
// memory: registers are what bounds the number of warps on a multiprocessor. Ranges are in steps.
template <int kStrips>
struct ForwardCommon {
  static constexpr int kRows = kWarps * kStrips * kStripRows;

  OnlineSoftmax softmax[kStrips][kThreads];
  WindowBlock block;
  uint64_t dropout_seed;
  Range windows[kRows];        // of each query; none where there is nothing to compute
  Range seen_by_some[kWarps];  // by a warp's queries
  Range seen_by_all[kWarps];
  Range seen_by_block;
  uint32_t live[2];  // a bit for each key of the two tiles that are here
};

// A thread's view of the block.
template <int kStrips>
struct ForwardRows {
  static constexpr int kWarpRows = kStrips * kStripRows, kRows = kWarps * kWarpRows;

  const Problem& p;
  ForwardCommon<kStrips>& common;
  const WindowBlock& block;
  const ResidueClass& tokens;

  __device__ __forceinline__ ForwardRows(const Problem& p_, ForwardCommon<kStrips>& common_)
      : p(p_), common(common_), block(common_.block), tokens(common_.block.tokens) {}

  // Rows of the tile of queries: the first of a strip, and the lane's two.
  static __device__ __forceinline__ int strip(int s) {
    const uint32_t warp = fresh(uint32_t{threadIdx.x}) / kWarp;
    return static_cast<int>(warp) * kWarpRows + s * kStripRows;
  }
  static __device__ __forceinline__ int row_of(int s, int x) {
    const uint32_t thread = fresh(uint32_t{threadIdx.x}), warp = thread / kWarp;
    return static_cast<int>(warp * kWarpRows + thread % kWarp / 4) + s * kStripRows + 8 * x;
  }
  __device__ __forceinline__ int32_t step_of(int s, int row) const {
    return block.first_step + strip(s) + row;
  }
  __device__ __forceinline__ int32_t own_step(int s, int x) const {
    return block.first_step + row_of(s, x);
  }
  __device__ __forceinline__ RowRanges windows_of(int s) const {
    return {{common.windows[row_of(s, 0)], common.windows[row_of(s, 1)]}};
  }

  // Whether a row of the block is to be computed here.
  __device__ __forceinline__ bool look_at_rows() {
    bool any = false;
    Range some = {INT32_MAX, -1}, all = {0, INT32_MAX};
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const int32_t step = own_step(s, x);
        Range window = {0, -1};
        if (flag_of(step) == 0) {
          any = true;
          window = window_of(p, block.b, tokens, step, Side::kBefore);
          some = {smaller(some.first, window.first), larger(some.last, window.last)};
          all = {larger(all.first, window.first), smaller(all.last, window.last)};
        }
        if (lane_id() % 4 == 0) common.windows[row_of(s, x)] = window;
      }
    }
    share_ranges<4>(some, all);
    if (lane_id() == 0) {
      common.seen_by_some[warp_id()] = some;
      common.seen_by_all[warp_id()] = all;
    }
    if (threadIdx.x == 0) {
      const int32_t first = larger(block.first_step, tokens.first_query);
      const int32_t last = smaller(block.first_step + kRows, tokens.end_query) - 1;
      // Neither end of a window ever falls along the rows.
      common.seen_by_block = {window_of(p, block.b, tokens, first, Side::kBefore).first,
                              window_of(p, block.b, tokens, last, Side::kBefore).last};
    }
    return __syncthreads_or(any) != 0;
  }

  // kGlobal for the rows of nobody.
  __device__ __forceinline__ uint8_t flag_of(int32_t step) const {
    const bool is_query = step >= tokens.first_query && step < tokens.end_query;
    return is_query ? p.flags_BM[p.token(block.b, tokens.position(step))] : kGlobal;
  }
};

}  // namespace longpretrain::cuda
