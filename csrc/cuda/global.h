// What the kernels about global tokens share. They take the slots of global tokens kSlotTile at a
// time, and the tokens of the sequence by position, whatever the head's dilation.
//
// Letters: see ../attention.h.
#pragma once

#include "dropout.h"
#include "products.h"

namespace longpretrain::cuda {

constexpr int kGlobalWarps = 4, kGlobalThreads = kGlobalWarps * kWarp;
static_assert(kGlobalWarps * 16 == kTokenTile);  // a warp takes 16 tokens of a tile

// Blocks of a multiprocessor at once, which leave the registers that no kernel here outgrows.
template <class T, int D>
constexpr int kBlocks = kIs16Bit<T> && D <= 64 ? 4 : 2;

// Which chunk of which head a block takes; where a grid covers tiles of slots too, of which tile.
struct GlobalBlock {
  int32_t b, h, dilation;
  int32_t chunk, first_slot;
  int32_t begin, end;  // of the chunk's tokens

  __device__ __forceinline__ GlobalBlock(const Problem& p, const Chunks& chunks, int32_t num_tokens)
      : b(p.first_b + static_cast<int32_t>(blockIdx.z)),
        h(p.first_head + static_cast<int32_t>(blockIdx.y)),
        dilation(p.dilation[blockIdx.y]),
        chunk(static_cast<int32_t>(blockIdx.x) % chunks.count),
        first_slot(static_cast<int32_t>(blockIdx.x) / chunks.count * kSlotTile),
        begin(chunk * chunks.size),
        end(smaller(begin + chunks.size, num_tokens)) {}
};

inline dim3 global_grid(const Problem& problem, int32_t num_blocks) {
  return dim3(static_cast<unsigned>(num_blocks), static_cast<unsigned>(problem.num_heads),
              static_cast<unsigned>(problem.num_b));
}

// Place of what a block found for a slot among all partial results: [B, H, chunk, G].
__device__ __forceinline__ int64_t partial_row(const Problem& p, const Chunks& chunks, int32_t b,
                                               int32_t h, int32_t chunk, int32_t slot) {
  return ((int64_t{b} * p.H + h) * chunks.count + chunk) * p.G + slot;
}

// The position of a slot's token; -1: the slot is not in use, or does not exist.
__device__ __forceinline__ int32_t position_of_slot(const Problem& p, int32_t b, int32_t slot) {
  return slot < p.G ? p.slot_position_BG[int64_t{b} * p.G + slot] : -1;
}
// Also -1 where the token's query is none of the N.
__device__ __forceinline__ int32_t query_of_slot(const Problem& p, int32_t b, int32_t slot) {
  const int32_t position = position_of_slot(p, b, slot);
  return position >= p.q_offset && position < p.q_offset + p.N ? position : -1;
}

// The keys that a global token's query, or a local query among the global tokens' keys, may see:
// positions. None for a query at -1.
__device__ __forceinline__ Range reach_of(const Problem& p, int32_t b, int32_t query) {
  if (query < 0) return {0, -1};
  Range keys = document_of(p, b, query);
  if (p.causal) keys.last = smaller(keys.last, query);
  return keys;
}

// Which of kTokenTile tokens, whose flags a FlagLoader has fetched, are no padding.
__device__ __forceinline__ ColumnBits no_padding(uint32_t fetched) {
  return {{__ballot_sync(~0u, (fetched & kPadding) == 0),
           __ballot_sync(~0u, (fetched >> 16 & kPadding) == 0)}};
}

// Bit i: the weight of key key_of(i), of 16, is kept for the query at a position. Lanes l and l +
// 16 are about the same query, share the work and both know the result. A key at -1 may get any
// bit.
template <class KeyOf>
__device__ __forceinline__ uint32_t draw_sixteen(const Problem& p, int32_t b, uint32_t head,
                                                 int32_t query, int32_t dilation, KeyOf key_of) {
  const uint64_t seed = static_cast<uint64_t>(p.dropout_seed_B[b]);
  const int first = lane_id() / 16 * 8;
  uint32_t kept = 0;
#pragma unroll 1
  for (int i = first; i < first + 8; ++i) {
    const uint32_t byte =
        dropout_byte(seed, head, static_cast<uint32_t>(query), larger(key_of(i), 0), dilation);
    kept |= (byte >= static_cast<uint32_t>(p.drop_below) ? 1u : 0u) << i;
  }
  return kept | __shfl_xor_sync(~0u, kept, 16);
}

// The same for neighbouring keys; first_key is a multiple of 16.
__device__ __forceinline__ uint32_t draw_neighbours(const Problem& p, int32_t b, uint32_t head,
                                                    int32_t query, int32_t dilation,
                                                    int32_t first_key) {
  if (dilation != 1) {
    return draw_sixteen(p, b, head, query, dilation, [=](int i) { return first_key + i; });
  }
  const uint4 words =
      philox4x32(static_cast<uint64_t>(p.dropout_seed_B[b]), head, static_cast<uint32_t>(query), 0,
                 static_cast<uint32_t>(first_key) / kSixteen);
  return kept_of_sixteen(words, static_cast<uint32_t>(p.drop_below));
}

// Sums up over the block's warps o, which multiply_weights has made, times a factor for each of the
// lane's two rows. Row r of the 16 goes to row_of(r), a pointer to D numbers; null: nowhere. On the
// way all lies in `shared`, 256 * D bytes that no thread needs any more when all have come here.
template <class T, int D, class RowOf>
__device__ __forceinline__ void sum_over_warps(const float (&o)[D / 8][4], const float (&factor)[2],
                                               char* shared, RowOf row_of) {
  const Tile<Float32, D> sums{shared};
  const int first = warp_id() * 16 + lane_id() / 4;
  __syncthreads();
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
    const int column = sum_column<T>(n, 0);
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      char* piece = sums.at(first + 8 * x, column / 4);
      reinterpret_cast<float2*>(piece)[column % 4 / 2] =
          make_float2(o[n][2 * x] * factor[x], o[n][2 * x + 1] * factor[x]);
    }
  }
  __syncthreads();
  constexpr int kPieces = D / 4;
  static_assert(16 * kPieces % kGlobalThreads == 0);
#pragma unroll
  for (int done = 0; done < 16 * kPieces; done += kGlobalThreads) {
    const int i = done + static_cast<int>(threadIdx.x);
    float* row = row_of(i / kPieces);
    if (row == nullptr) continue;
    float4 sum = load_piece(sums.at(i / kPieces, i % kPieces));
#pragma unroll
    for (int warp = 1; warp < kGlobalWarps; ++warp) {
      const float4 more = load_piece(sums.at(16 * warp + i / kPieces, i % kPieces));
      sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
    }
    reinterpret_cast<float4*>(row)[i % kPieces] = sum;
  }
}

// Two neighbouring numbers of a row.
template <class T>
__device__ __forceinline__ void store_pair(typename T::Storage* to, float low, float high) {
  if constexpr (kIs16Bit<T>) {
    *reinterpret_cast<uint32_t*>(to) = pack<T>(low, high);
  } else {
    *reinterpret_cast<float2*>(to) = make_float2(low, high);
  }
}

// Calls body(column) for the pairs of neighbouring columns that are this lane's, of D.
template <int D, class Body>
__device__ __forceinline__ void for_pairs(Body body) {
#pragma unroll
  for (int column = 2 * lane_id(); column < D; column += 2 * kWarp) body(column);
}

}  // namespace longpretrain::cuda
