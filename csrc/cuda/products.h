// Products of a warp: 16 rows on the left, a tile of shared memory on the right. What is done
// between two products (mask, softmax, dropout) sees the same numbers in the same lanes for every
// dtype: with g = lane / 4 and q = lane % 4, the element x[n][e] of a matrix with 16 rows stands in
// row g + 8 * (e / 2), column 8 * n + 2 * q + e % 2. (Only sums over keys, O below, have their
// columns elsewhere for Float32: see store_rows.)
//
// kStrips strips of 16 rows share what is read of the right side.
//
// Letters: see ../attention.h.
#pragma once

#include <type_traits>

#include "tile.h"

namespace longpretrain::cuda {

// Reads by ldmatrix what lies `rows` rows, a multiple of 8, and `pieces` pieces, an even number,
// behind `from`: Tile::at of an even piece or the next. To change the address is less work than to
// work out that of each piece.
template <bool kTransposed, class TileTD>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const char* from, int rows,
                                              int pieces) {
  ldmatrix_x4<kTransposed>(r, from, static_cast<uint32_t>((pieces & 7) * 16),
                           static_cast<uint32_t>(rows * TileTD::kRowBytes + (pieces & ~7) * 16));
}

// 16 rows of D numbers, as the left side of products. They are read by the mma's 16 columns k, from
// the tile's row `first` on.

// Numbers of 16 bits, held in registers.
template <class T, int D>
struct RowsInRegisters {
  static constexpr bool kInTile = false;
  uint32_t a[D / 16][4];

  __device__ __forceinline__ void load(const Tile<T, D>& tile, int first) {
    const char* from = tile.at(first + lane_id() % 16, lane_id() / 16);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) load_matrices<false, Tile<T, D>>(a[k], from, 0, 2 * k);
  }
  __device__ __forceinline__ void negate() {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[k][i] ^= 0x80008000u;
    }
  }
};

// They stay in the tile, where nobody else may write meanwhile.
template <class T, int D>
struct RowsInTile {
  static constexpr bool kInTile = true;
  Tile<T, D> tile;
  int first;

  __device__ __forceinline__ void load(const Tile<T, D>& tile_, int first_) {
    tile = tile_;
    first = first_;
  }
  __device__ __forceinline__ void read(uint32_t (&a)[4], int k) const {
    const uint32_t lane = fresh_lane_id();
    const char* from = tile.at(first + static_cast<int>(lane % 16), static_cast<int>(lane / 16));
    load_matrices<false, Tile<T, D>>(a, from, 0, 2 * k);
  }
  __device__ __forceinline__ void negate() {
    constexpr int kPieces = Tile<T, D>::kPieces;
    constexpr uint32_t kSigns = kIs16Bit<T> ? 0x80008000u : 0x80000000u;
#pragma unroll
    for (int done = 0; done < 16 * kPieces; done += kWarp) {
      const int i = done + lane_id();
      uint4& piece = *reinterpret_cast<uint4*>(tile.at(first + i / kPieces, i % kPieces));
      piece = make_uint4(piece.x ^ kSigns, piece.y ^ kSigns, piece.z ^ kSigns, piece.w ^ kSigns);
    }
    __syncwarp();
  }
};

template <class T, int D>
using LeftRows = std::conditional_t<kIs16Bit<T>, RowsInRegisters<T, D>, RowsInTile<T, D>>;

__device__ __forceinline__ float4 load_piece(const char* shared) {
  return *reinterpret_cast<const float4*>(shared);
}
__device__ __forceinline__ float dot(const float4& a, const float4& b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// c += rows * (the tile's rows [first, first + 8 * kTiles))^T.
template <class T, int D, class Rows, int kStrips, int kTiles>
__device__ __forceinline__ void multiply_rows(float (&c)[kStrips][kTiles][4],
                                              const Rows (&rows)[kStrips], const Tile<T, D>& tile,
                                              int first) {
  const uint32_t lane = fresh_lane_id();
  if constexpr (kIs16Bit<T>) {
    const char* from =
        tile.at(first + static_cast<int>(lane % 8 + lane / 16 * 8), static_cast<int>(lane / 8 % 2));
    const auto multiply = [&](int n, int k, const auto& left_of) {
      uint32_t right[4];
      load_matrices<false, Tile<T, D>>(right, from, 8 * n, 2 * k);
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        mma_m16n8k16<T>(c[s][n], left_of(s), right[0], right[1]);
        mma_m16n8k16<T>(c[s][n + 1], left_of(s), right[2], right[3]);
      }
    };
    if constexpr (Rows::kInTile) {
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        uint32_t left[kStrips][4];
#pragma unroll
        for (int s = 0; s < kStrips; ++s) rows[s].read(left[s], k);
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
          multiply(n, k, [&](int s) -> const uint32_t (&)[4] { return left[s]; });
        }
      }
    } else {  // in the order that needs the fewest registers
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
          multiply(n, k, [&](int s) -> const uint32_t (&)[4] { return rows[s].a[k]; });
        }
      }
    }
  } else {
    const int g = static_cast<int>(lane / 4), column = first + static_cast<int>(lane % 4 * 2);
#pragma unroll 1
    for (int piece = 0; piece < D / 4; ++piece) {
      float4 left[kStrips][2];
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        left[s][0] = load_piece(rows[s].tile.at(rows[s].first + g, piece));
        left[s][1] = load_piece(rows[s].tile.at(rows[s].first + g + 8, piece));
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float4 right = load_piece(tile.at(column + 8 * n + e, piece));
#pragma unroll
          for (int s = 0; s < kStrips; ++s) {
            c[s][n][e] = dot(left[s][0], right, c[s][n][e]);
            c[s][n][2 + e] = dot(left[s][1], right, c[s][n][2 + e]);
          }
        }
      }
    }
  }
}

// o += weights * (the tile's rows [first, first + 8 * kTiles)).
template <class T, int D, int kStrips, int kTiles>
__device__ __forceinline__ void multiply_weights(float (&o)[kStrips][D / 8][4],
                                                 const float (&weights)[kStrips][kTiles][4],
                                                 const Tile<T, D>& tile, int first) {
  static_assert(kTiles % 2 == 0);
  const uint32_t lane = fresh_lane_id();
  if constexpr (kIs16Bit<T>) {
    const char* from = tile.at(first + static_cast<int>(lane % 16), static_cast<int>(lane / 16));
#pragma unroll
    for (int k = 0; k < kTiles; k += 2) {
      uint32_t left[kStrips][4];
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &weights[s][k + i / 2][i % 2 * 2];
          left[s][i] = pack<T>(pair[0], pair[1]);
        }
      }
#pragma unroll
      for (int n = 0; n < D / 8; n += 2) {
        uint32_t right[4];
        load_matrices<true, Tile<T, D>>(right, from, 8 * k, n);
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
          mma_m16n8k16<T>(o[s][n], left[s], right[0], right[1]);
          mma_m16n8k16<T>(o[s][n + 1], left[s], right[2], right[3]);
        }
      }
    }
  } else {
    // The weights of a key are with one lane of every four.
    const int q = static_cast<int>(lane % 4);
#pragma unroll
    for (int key = 0; key < 8 * kTiles; ++key) {
      const int owner = static_cast<int>(lane) - q + key % 8 / 2;
      float left[kStrips][2];
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        left[s][0] = __shfl_sync(~0u, weights[s][key / 8][key % 2], owner);
        left[s][1] = __shfl_sync(~0u, weights[s][key / 8][2 + key % 2], owner);
      }
#pragma unroll
      for (int n = 0; n < D / 8; n += 2) {
        const float4 right = load_piece(tile.at(first + key, 2 * n + q));
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            o[s][n][2 * x] = fmaf(left[s][x], right.x, o[s][n][2 * x]);
            o[s][n][2 * x + 1] = fmaf(left[s][x], right.y, o[s][n][2 * x + 1]);
            o[s][n + 1][2 * x] = fmaf(left[s][x], right.z, o[s][n + 1][2 * x]);
            o[s][n + 1][2 * x + 1] = fmaf(left[s][x], right.w, o[s][n + 1][2 * x + 1]);
          }
        }
      }
    }
  }
}

// The column of o[n][e], which multiply_weights has made.
template <class T>
__device__ __forceinline__ int sum_column(int n, int e) {
  const int q = lane_id() % 4;
  return kIs16Bit<T> ? 8 * n + 2 * q + e % 2 : 8 * (n & ~1) + 4 * q + 2 * (n & 1) + e % 2;
}

// Writes o, which multiply_weights has made, times a factor for each of the lane's two rows; a
// factor of 0 writes zeros whatever o is. Row r of the 16 goes to row_of(r), a pointer to D
// numbers; null: nowhere. On the way the rows lie in the tile from row `first` on, rows of this
// warp alone that no lane reads any more.
template <class T, int D, class RowOf>
__device__ __forceinline__ void store_rows(const float (&o)[D / 8][4], const float (&factor)[2],
                                           const Tile<T, D>& tile, int first, RowOf row_of) {
  const int lane = lane_id(), g = lane / 4, q = lane % 4;
  __syncwarp();
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const bool zero = factor[x] == 0.0f;
    const auto number = [&](int n, int e) { return zero ? 0.0f : o[n][2 * x + e] * factor[x]; };
#pragma unroll
    for (int n = 0; n < D / 8; n += kIs16Bit<T> ? 1 : 2) {
      if constexpr (kIs16Bit<T>) {
        char* to = tile.at(first + g + 8 * x, n) + 4 * q;
        *reinterpret_cast<uint32_t*>(to) = pack<T>(number(n, 0), number(n, 1));
      } else {
        char* to = tile.at(first + g + 8 * x, 2 * n + q);
        *reinterpret_cast<float4*>(to) =
            make_float4(number(n, 0), number(n, 1), number(n + 1, 0), number(n + 1, 1));
      }
    }
  }
  __syncwarp();
  constexpr int kPieces = Tile<T, D>::kPieces;
#pragma unroll
  for (int done = 0; done < 16 * kPieces; done += kWarp) {
    const int i = done + lane;
    typename T::Storage* row = row_of(i / kPieces);
    if (row != nullptr) {
      reinterpret_cast<uint4*>(row)[i % kPieces] =
          *reinterpret_cast<const uint4*>(tile.at(first + i / kPieces, i % kPieces));
    }
  }
}

}  // namespace longpretrain::cuda
