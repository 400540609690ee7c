// Softmax over keys that come tile by tile, in base 2.
//
// Letters: see ../attention.h.
#pragma once

#include "products.h"

namespace longpretrain::cuda {

// Scores whose multiples in base 2 are beyond this are taken relative to the greatest one before
// they are scaled. Below, the scaled greatest score is a base that costs nothing per score, but is
// itself rounded: all weights of a row are off by one factor, which their quotients do not see.
// Here it is at most 2^(1/512); beyond 2^31 the greatest weight could be infinite, or 0.
constexpr float kLargestBase = 65536.0f;

// The exponent of a weight that was relative to the score `from` when it is relative to `to`, the
// greater one. To be the same for all that is brought from one to the other.
__device__ __forceinline__ float rebase(float from, float to, float log2_scale) {
  const float base = multiply_rounded(to, log2_scale);
  return fabsf(base) <= kLargestBase ? multiply_rounded(from, log2_scale) - base
                                     : (from - to) * log2_scale;
}

// For the lane's two rows of a strip, g and g + 8. A score that does not count is -inf. `most` is
// the greatest score; the sum is that of this lane's columns alone.
struct alignas(16) OnlineSoftmax {
  float most[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};

  // Turns scores into weights 2^(log2_scale * (score - most)) and brings what was summed up so far,
  // o, to the new `most`. log2_scale is positive.
  template <int kTiles, int kSums>
  __device__ __forceinline__ void add(float (&scores)[kTiles][4], float (&o)[kSums][4],
                                      float log2_scale) {
    float last[2], before[2], base[2];
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      last[x] = most[x];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        most[x] = fmaxf(most[x], fmaxf(scores[n][2 * x], scores[n][2 * x + 1]));
      }
      most[x] = fmaxf(most[x], __shfl_xor_sync(~0u, most[x], 1));
      most[x] = fmaxf(most[x], __shfl_xor_sync(~0u, most[x], 2));
      // Without a key so far: -inf - 0 below, not -inf + inf.
      base[x] = most[x] == -INFINITY ? 0.0f : multiply_rounded(most[x], log2_scale);
      before[x] = multiply_rounded(last[x], log2_scale) - base[x];
    }
    if (fmaxf(fabsf(base[0]), fabsf(base[1])) > kLargestBase) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        if (fabsf(base[x]) > kLargestBase) {
          before[x] = (last[x] - most[x]) * log2_scale;
          base[x] = 0.0f;
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            scores[n][2 * x] -= most[x];
            scores[n][2 * x + 1] -= most[x];
          }
        }
      }
    }
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      before[x] = exp2_approx(before[x]);
      float added = 0.0f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[n][2 * x + e];
          score = exp2_approx(fmaf(score, log2_scale, -base[x]));
          added += score;
        }
      }
      sum[x] = fmaf(sum[x], before[x], added);
#pragma unroll
      for (int n = 0; n < kSums; ++n) {
        o[n][2 * x] *= before[x];
        o[n][2 * x + 1] *= before[x];
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
  __device__ __forceinline__ float log_sum_exp(int x, float log2_scale) const {
    constexpr float kLn2 = 0.693147181f;
    if (sum[x] == 0.0f) return INFINITY;
    return (multiply_rounded(most[x], log2_scale) + log2_approx(sum[x])) * kLn2;
  }
};

}  // namespace longpretrain::cuda
