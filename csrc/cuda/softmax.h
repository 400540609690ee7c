// Softmax over keys that come tile by tile, in base 2.
//
// Letters: see ../attention.h.
#pragma once

#include "products.h"

namespace longpretrain::cuda {

// For the lane's two rows of a strip, g and g + 8. A score that does not count is -inf. The base is
// the greatest score, scaled; the sum is that of this lane's columns alone.
struct alignas(16) OnlineSoftmax {
  float base[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};

  // Turns scores into weights 2^(log2_scale * score - base) and brings what was summed up so far,
  // o, to the new base. log2_scale is positive.
  template <int kTiles, int kSums>
  __device__ __forceinline__ void add(float (&scores)[kTiles][4], float (&o)[kSums][4],
                                      float log2_scale) {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      float most = -INFINITY;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        most = fmaxf(most, fmaxf(scores[n][2 * x], scores[n][2 * x + 1]));
      }
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      const float last = base[x];
      base[x] = fmaxf(last, most * log2_scale);
      // Without a key so far: -inf - 0 below, not -inf + inf.
      const float taken = base[x] == -INFINITY ? 0.0f : base[x];
      const float before = exp2_approx(last - taken);
      float added = 0.0f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[n][2 * x + e];
          score = exp2_approx(fmaf(score, log2_scale, -taken));
          added += score;
        }
      }
      sum[x] = fmaf(sum[x], before, added);
#pragma unroll
      for (int n = 0; n < kSums; ++n) {
        o[n][2 * x] *= before;
        o[n][2 * x + 1] *= before;
      }
    }
  }

  // Of the whole row. To be called once, after the last tile.
  __device__ __forceinline__ void sum_up() {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      sum[x] += __shfl_xor_sync(~0u, sum[x], 1);
      sum[x] += __shfl_xor_sync(~0u, sum[x], 2);
    }
  }
  // Natural; +inf for a row without keys.
  __device__ __forceinline__ float log_sum_exp(int x) const {
    constexpr float kLn2 = 0.693147181f;
    return sum[x] != 0.0f ? (base[x] + log2_approx(sum[x])) * kLn2 : INFINITY;
  }
};

}  // namespace longpretrain::cuda
