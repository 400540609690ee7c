// What both kernels of the window's backward pass do with an element of a tile, and how they look
// at the rows of a block. Weights are computed again from the log-sum-exp that the forward pass has
// left.
//
// Letters: see ../attention.h.
#pragma once

#include "dropout.h"
#include "launch.h"
#include "products.h"

namespace longpretrain::cuda {

constexpr float kLog2E = 1.44269504f;
constexpr int kStripRows = 16;
constexpr int kPiece = 16;  // columns of a tile that are in registers at once
constexpr int kPieceTiles = kPiece / 8;

// Of the tiles that come and go: at most 8 KiB, so that four of them leave room for other blocks.
template <class T, int D>
constexpr int rows_of_tile() {
  constexpr int kRows = (8 << 10) / Tile<T, D>::kRowBytes;
  return kRows < kTokenTile ? kRows : kTokenTile;
}

// What turns the products of a call into gradients.
struct Factors {
  float log2_scale;  // from a product of q and k to a score in base 2; may be negative
  float kept_scale;

  __device__ __forceinline__ explicit Factors(const Problem& p)
      : log2_scale(p.scale * kLog2E), kept_scale(p.kept_scale) {}
};

// What the weights of a query have in common.
struct QueryTotals {
  float log2_sum;  // log-sum-exp of the scores in base 2; +inf makes every weight 0
  float delta;     // sum of out * dout: of each weight times its gradient
};

__device__ __forceinline__ QueryTotals no_query() { return {INFINITY, 0.0f}; }

// `product` of q and k becomes the weight that dropout keeps, `gradient` of that weight becomes the
// gradient of the score, but for the factor `scale`.
template <bool kMasked, bool kDropout>
__device__ __forceinline__ void differentiate(float& product, float& gradient,
                                              const Factors& factors, const QueryTotals& query,
                                              bool counts, bool kept) {
  float log2_weight = fmaf(product, factors.log2_scale, -query.log2_sum);
  // At most 1, also where the log-sum-exp of large scores was rounded down. NaN stays, unlike in
  // fminf.
  if (log2_weight > 0.0f) log2_weight = 0.0f;
  if (kMasked && !counts) log2_weight = -INFINITY;
  const float weight = exp2_approx(log2_weight);
  if constexpr (kDropout) {
    product = kept ? weight : 0.0f;
    gradient = weight * ((kept ? gradient * factors.kept_scale : 0.0f) - query.delta);
  } else {
    product = weight;
    gradient = weight * (gradient - query.delta);
  }
}

__device__ __forceinline__ bool is_live(const ColumnBits& live, int row) {
  return ((row < kWarp ? live.word[0] : live.word[1]) >> (row % kWarp) & 1) != 0;
}

// What a row that is not live sees: it is in nobody's way, since nothing of it is written.
__device__ __forceinline__ Range everything() { return {0, INT32_MAX - 1}; }

// What the live rows of a block see together, and what all rows of a warp see.
struct Sight {
  Range any, all;

  // Row i of kTokenTile sees of_row[i]; the warp's are the num_rows from first_row on.
  __device__ __forceinline__ Sight(const Range* of_row, const ColumnBits& live, int first_row,
                                   int num_rows)
      : any{INT32_MAX, -1}, all(everything()) {
#pragma unroll
    for (int i = 0; i < kTokenTile; i += kWarp) {
      const int row = lane_id() + i;
      const Range seen = of_row[row];
      if (is_live(live, row)) {
        any = {smaller(any.first, seen.first), larger(any.last, seen.last)};
      }
      if (row >= first_row && row < first_row + num_rows) {
        all = {larger(all.first, seen.first), smaller(all.last, seen.last)};
      }
    }
    share_ranges<1>(any, all);
  }
};

// Of the lane's two rows of a strip.
__device__ __forceinline__ RowRanges ranges_of_strip(const Range* of_row, int first) {
  const int row = first + lane_id() / 4;
  return {{of_row[row], of_row[row + 8]}};
}

// As multiply_rows, but with the left rows, strip by strip from `first_left` on, in a tile.
template <class T, int D, int kStrips, int kTiles>
__device__ __forceinline__ void multiply_tiles(float (&c)[kStrips][kTiles][4],
                                               const Tile<T, D>& left, int first_left,
                                               const Tile<T, D>& right, int first_right) {
  if constexpr (kIs16Bit<T>) {
    const int lane = lane_id();
    const char* left_rows = left.at(first_left + lane % 16, lane / 16);
    const char* right_rows = right.at(first_right + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t a[kStrips][4];
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        load_matrices<false, Tile<T, D>>(a[s], left_rows, s * kStripRows, 2 * k);
      }
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        uint32_t b[4];
        load_matrices<false, Tile<T, D>>(b, right_rows, 8 * n, 2 * k);
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
          mma_m16n8k16<T>(c[s][n], a[s], b[0], b[1]);
          mma_m16n8k16<T>(c[s][n + 1], a[s], b[2], b[3]);
        }
      }
    }
  } else {
    LeftRows<T, D> rows[kStrips];
#pragma unroll
    for (int s = 0; s < kStrips; ++s) rows[s].load(left, first_left + s * kStripRows);
    multiply_rows(c, rows, right, first_right);
  }
}

// Zeros in the rows of a block's steps that have a bit; row 0 sits at the position `offset`.
template <class T, int D, int kThreads>
__device__ __forceinline__ void write_zeros(const TensorBNHD& to, const WindowBlock& block,
                                            int32_t offset, const ColumnBits& rows) {
  constexpr int kPieces = Tile<T, D>::kPieces;
  typename T::Storage* head = head_of<T>(to, block.b, block.h);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kTokenTile * kPieces; i += kThreads) {
    const int row = i / kPieces;
    if (!is_live(rows, row)) continue;
    const int32_t n = block.tokens.position(block.first_step + row) - offset;
    reinterpret_cast<uint4*>(head + n * to.stride_N)[i % kPieces] = make_uint4(0, 0, 0, 0);
  }
}

template <int kStrips, int kTiles>
__device__ __forceinline__ void clear(float (&x)[kStrips][kTiles][4]) {
#pragma unroll
  for (int s = 0; s < kStrips; ++s) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x[s][n][e] = 0.0f;
    }
  }
}

// A kernel of the window's backward pass: Pass(problem, block, shared).run() for a block with work.
template <class Pass>
__device__ __forceinline__ void run_block(const Problem& p, char* shared) {
  using S = typename Pass::S;
  const WindowBlock mine(p, kTokenTile, S::kOfKeys);
  const ResidueClass& tokens = mine.tokens;
  if (mine.first_step >= (S::kOfKeys ? tokens.num_keys : tokens.end_query)) return;
  if (!S::kOfKeys && mine.first_step + kTokenTile <= tokens.first_query) return;
  // There it takes no registers.
  WindowBlock* block = reinterpret_cast<WindowBlock*>(shared + S::kBlock);
  if (threadIdx.x == 0) *block = mine;
  __syncthreads();
  Pass(p, *block, shared).run();
}

template <class S>
void launch_window(const char* name, void (*kernel)(const Problem), const Problem& problem,
                   void* stream) {
  launch(name, kernel, window_grid(problem, kTokenTile, S::kOfKeys), S::kThreads, S::kEnd, stream,
         problem);
}

}  // namespace longpretrain::cuda
