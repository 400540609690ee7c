// What a kernel knows of a call: plain data, given by value. And where the tokens of a residue
// class sit: those at positions residue, residue + d, residue + 2 * d, ... of a head with dilation
// d are an undilated problem of their own, in which a token is named by its step.
//
// Letters: see ../attention.h.
#pragma once

#include <cstdint>

#include "../attention.h"
#include "ptx.h"
#include "workspace.h"

namespace longpretrain::cuda {

constexpr int32_t kHeadsPerLaunch = 128;      // their dilations travel with the problem
constexpr uint8_t kPadding = 1, kGlobal = 2;  // flags of a token; a global token is no padding

struct Problem {
  TensorBNHD q, k, v, q_global, k_global, v_global, out;
  float* lse_BNH;
  // Backward; null data in the forward pass.
  TensorBNHD dout, dq, dk, dv, dq_global, dk_global, dv_global;

  int32_t B, N, M, H, D, G;
  int32_t q_offset;
  int32_t window;  // one-sided, in steps, at most M
  bool causal;
  float scale;       // of the scores, as given
  float log2_scale;  // |scale| * log2(e), never 0: scores in base 2, but for their sign
  // Of the scores before they are scaled: -1 where `scale` is negative.
  float sign;
  int32_t drop_below;  // 0: no dropout
  float kept_scale;    // of the weights that dropout keeps

  const uint8_t* padding_BM;
  const int64_t* document_BM;
  const int64_t* global_index_BG;
  const int64_t* dropout_seed_B;

  // Scratch memory of the call, see workspace.h.
  uint8_t* flags_BM;
  int32_t* slot_position_BG;                     // -1: no live slot
  int32_t *document_begin_BM, *document_end_BM;  // null without documents
  float* delta_BNH;
  float* partials;

  // A launch is about num_heads heads and num_rows_B rows of the batch; blockIdx counts from these.
  int32_t first_head, num_heads, first_b, num_b;
  int32_t dilation[kHeadsPerLaunch];  // of head first_head + i; at most M

  __device__ __forceinline__ int64_t token(int32_t b, int32_t position) const {  // into [B, M]
    return int64_t{b} * M + position;
  }
  __device__ __forceinline__ int64_t row(int32_t b, int32_t n, int32_t h) const {  // into [B, N, H]
    return (int64_t{b} * N + n) * H + h;
  }
};

// The numbers of one head of a batch row.
template <class T>
__device__ __forceinline__ typename T::Storage* head_of(const TensorBNHD& x, int32_t b, int32_t h) {
  return static_cast<typename T::Storage*>(x.data) + b * x.stride_B + h * x.stride_H;
}

__host__ __device__ __forceinline__ int32_t ceil_div(int32_t a, int32_t b) {
  return a <= 0 ? 0 : (a - 1) / b + 1;
}
__device__ __forceinline__ int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
__device__ __forceinline__ int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// The tokens of a class: steps [0, num_keys) are keys, [first_query, end_query) queries as well.
// Nothing here overflows for M up to kLargestSequence; position() of a step outside of the class is
// some number that nobody may use.
struct ResidueClass {
  int32_t residue, dilation;
  int32_t num_keys, first_query, end_query;

  __device__ __forceinline__ ResidueClass(const Problem& p, int32_t residue_, int32_t dilation_)
      : residue(residue_),
        dilation(dilation_),
        num_keys(ceil_div(p.M - residue_, dilation_)),
        first_query(ceil_div(p.q_offset - residue_, dilation_)),
        end_query(ceil_div(p.q_offset + p.N - residue_, dilation_)) {}

  __device__ __forceinline__ int32_t position(int32_t step) const {
    return static_cast<int32_t>(static_cast<uint32_t>(residue) +
                                static_cast<uint32_t>(step) * static_cast<uint32_t>(dilation));
  }
  // The first step at or behind a position, the last one at or before it (-1: there is none).
  __device__ __forceinline__ int32_t first_step_from(int32_t at) const {
    return ceil_div(at - residue, dilation);
  }
  __device__ __forceinline__ int32_t last_step_to(int32_t at) const {
    return at < residue ? -1 : (at - residue) / dilation;
  }
};

// Which tile of steps of which class a block of a window kernel takes. Tiles begin at multiples of
// their size, for queries too: how a sequence is split over calls is not seen.
struct WindowBlock {
  int32_t b, h;
  ResidueClass tokens;
  int32_t first_step;

  // For a launch with the blocks of window_grid.
  __device__ __forceinline__ WindowBlock(const Problem& p, int32_t tile_steps, bool of_keys)
      : WindowBlock(p, p.dilation[blockIdx.y], tile_steps, of_keys) {}

 private:
  __device__ __forceinline__ WindowBlock(const Problem& p, int32_t d, int32_t tile_steps,
                                         bool of_keys)
      : b(p.first_b + static_cast<int32_t>(blockIdx.z)),
        h(p.first_head + static_cast<int32_t>(blockIdx.y)),
        tokens(p, static_cast<int32_t>(blockIdx.x) % d, d),
        first_step(0) {
    // The first query of any class lies in the tile of step q_offset / d.
    const int32_t first_tile = of_keys ? 0 : p.q_offset / d / tile_steps;
    const int32_t tile = first_tile + static_cast<int32_t>(blockIdx.x) / d;
    // Another head's dilation may ask for far more blocks; none has work behind this tile.
    constexpr int32_t kEnd = static_cast<int32_t>(kLargestSequence);
    first_step = smaller(tile, kEnd / tile_steps) * tile_steps;
  }
};

// Blocks of a window kernel: x classes and tiles, of the head that has most of them, y heads, z
// rows of the batch. Blocks beyond the tiles of their own head have nothing to do.
dim3 window_grid(const Problem& problem, int32_t tile_steps, bool of_keys);

// A problem but for its heads and rows, which for_each_launch fills in.
Problem make_problem(const AttentionParams& params, const Workspace& workspace);
Problem make_problem(const AttentionBackwardParams& params, const Workspace& workspace);

// Calls body(problem) for all heads and rows of the batch, as many at once as a launch may have.
template <class Body>
void for_each_launch(const AttentionParams& params, Problem problem, Body body) {
  constexpr int32_t kRowsPerLaunch = 65535;
  for (problem.first_b = 0; problem.first_b < problem.B; problem.first_b += kRowsPerLaunch) {
    const int32_t rows_left = problem.B - problem.first_b;
    problem.num_b = rows_left < kRowsPerLaunch ? rows_left : kRowsPerLaunch;
    for (problem.first_head = 0; problem.first_head < problem.H;
         problem.first_head += kHeadsPerLaunch) {
      const int32_t heads_left = problem.H - problem.first_head;
      problem.num_heads = heads_left < kHeadsPerLaunch ? heads_left : kHeadsPerLaunch;
      for (int32_t i = 0; i < problem.num_heads; ++i) {
        const int64_t dilation = params.dilation_H[problem.first_head + i];
        // A dilation beyond the sequence reaches as little as one as long as the sequence.
        problem.dilation[i] = static_cast<int32_t>(dilation < params.M ? dilation : params.M);
      }
      body(static_cast<const Problem&>(problem));
    }
  }
}

}  // namespace longpretrain::cuda
