// The rows of global tokens: each attends to the whole sequence, with projections of its own.
// Blocks take a chunk of the keys each, and leave a partial result that a second kernel combines.
//
// Letters: see ../attention.h.
#include "global.h"
#include "kernels.h"
#include "launch.h"
#include "softmax.h"

namespace longpretrain::cuda {
namespace {

template <class T, int D>
constexpr size_t kTileBytes = Tile<T, D>::bytes(kSlotTile + 2 * kTokenTile);
constexpr size_t kStatisticsBytes = 2 * kGlobalWarps * 16 * sizeof(float);

// Of a slot and a chunk, as in OnlineSoftmax.
struct Statistics {
  float most, sum;
};

// They lie behind the partial sums themselves, which are [B, H, chunk, G, D].
__device__ __forceinline__ Statistics* statistics(const Problem& p, const Chunks& chunks) {
  const int64_t num_rows = int64_t{p.B} * p.H * chunks.count * p.G;
  return reinterpret_cast<Statistics*>(p.partials + num_rows * p.D);
}

// What a sum of weights relative to one score is multiplied with to be relative to a greater one.
__device__ __forceinline__ float rebased(const Problem& p, float from, float to) {
  return from == -INFINITY ? 0.0f : exp2_approx(rebase(from, to, p.log2_scale));
}

template <class T, int D>
struct GlobalRows {
  using TileTD = Tile<T, D>;

  const Problem& p;
  const Chunks& chunks;
  const GlobalBlock& block;
  const ResidueClass tokens;
  TileTD queries, keys, values;
  float* shared_most;  // [warp][16]
  float* shared_sum;

  RowRanges reach;  // of the lane's two slots: positions
  LeftRows<T, D> left[1];
  OnlineSoftmax softmax;
  float o[1][D / 8][4] = {};

  __device__ __forceinline__ GlobalRows(const Problem& p_, const Chunks& chunks_,
                                        const GlobalBlock& block_, char* shared)
      : p(p_),
        chunks(chunks_),
        block(block_),
        tokens(p_, 0, 1),
        queries{shared},
        keys(queries.from_row(kSlotTile)),
        values(keys.from_row(kTokenTile)),
        shared_most(reinterpret_cast<float*>(shared + kTileBytes<T, D>)),
        shared_sum(shared_most + kGlobalWarps * 16) {}

  __device__ __forceinline__ int32_t query_of(int row) const {
    return query_of_slot(p, block.b, block.first_slot + row);
  }

  // The keys that any of the slots reaches; the same for all threads. `any` tells if a slot is
  // used.
  __device__ __forceinline__ Range look_at_slots(bool* any) {
    Range all = {INT32_MAX, -1};
    bool used = false;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int32_t query = query_of(lane_id() / 4 + 8 * x);
      reach.row[x] = reach_of(p, block.b, query);
      if (query < 0) continue;
      used = true;
      all = {smaller(all.first, reach.row[x].first), larger(all.last, reach.row[x].last)};
    }
#pragma unroll
    for (int distance = 4; distance < kWarp; distance *= 2) {
      all.first = smaller(all.first, __shfl_xor_sync(~0u, all.first, distance));
      all.last = larger(all.last, __shfl_xor_sync(~0u, all.last, distance));
    }
    *any = __any_sync(~0u, used);
    return all;
  }

  __device__ __forceinline__ void run() {
    bool any;
    const Range all = look_at_slots(&any);
    if (!any) return;
    const int32_t first = larger(block.begin, all.first / kTokenTile * kTokenTile);
    const int32_t end = smaller(block.end, all.last + 1);
    if (first < end) add_keys(first, end);
    leave();
  }

  // All that was loaded is there, and no thread reads any more what it has read so far.
  static __device__ __forceinline__ void arrive() {
    copy_wait<0>();
    __syncthreads();
  }

  __device__ __forceinline__ void add_keys(int32_t first, int32_t end) {
    using Loader = StepLoader<T, D, kGlobalThreads>;
    Loader key_loader(p.k_global, block.b, block.h, tokens, 0, first, 0, end);
    Loader value_loader(p.v_global, block.b, block.h, tokens, 0, first, 0, end);
    load_rows<T, D, kGlobalThreads, kSlotTile>(queries, p.q_global, block.b, block.h, [&](int row) {
      return query_of(row) < 0 ? -1 : block.first_slot + row;
    });
    const FlagLoader flags(p, block.b, tokens, 0, end);
    ColumnBits live = no_padding(flags.fetch(first));
    key_loader.template load_live<kTokenTile>(keys, live.word);
    copy_commit();
    arrive();
    left[0].load(queries, 0);
    if (p.sign < 0.0f) {
      // Float32 changes them where they lie.
      if (kIs16Bit<T> || warp_id() == 0) left[0].negate();
      if (!kIs16Bit<T>) __syncthreads();
    }
    for (int32_t key = first; key < end; key += kTokenTile) {
      value_loader.template load_live<kTokenTile>(values, live.word);
      copy_commit();
      const int32_t own_key = key + 16 * warp_id();
      const uint32_t counts = counting(live, own_key);
      const uint32_t fetched = flags.fetch(key + kTokenTile);
      const bool any = __any_sync(~0u, counts != 0) != 0;
      float scores[1][2][4] = {};
      if (any) multiply_rows(scores, left, keys, 16 * warp_id());
      arrive();
      if (key + kTokenTile < end) {
        live = no_padding(fetched);
        key_loader.template load_live<kTokenTile>(keys, live.word);
      }
      copy_commit();
      if (any) add_tile(scores, counts, own_key);
      arrive();
    }
  }

  // Bit 4 * n + e for each of the lane's scores with the warp's 16 keys of a tile.
  __device__ __forceinline__ uint32_t counting(const ColumnBits& live, int32_t own_key) const {
    const uint32_t own = (warp_id() < 2 ? live.word[0] : live.word[1]) >> (16 * (warp_id() % 2));
    uint32_t counts = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int column = 8 * (i / 4) + 2 * (lane_id() % 4) + i % 2;
      if ((own >> column & 1) != 0 && reach.row[i % 4 / 2].has(own_key + column)) counts |= 1u << i;
    }
    return counts;
  }

  __device__ __forceinline__ void add_tile(float (&scores)[1][2][4], uint32_t counts,
                                           int32_t own_key) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if ((counts >> i & 1) == 0) scores[0][i / 4][i % 4] = -INFINITY;
    }
    softmax.add(scores[0], o[0], p.log2_scale);
    if (p.drop_below != 0) {
      const int lane = lane_id();
      const uint32_t drawn =
          draw_neighbours(p, block.b, static_cast<uint32_t>(block.h) + kGlobalRow,
                          query_of(lane % 16), block.dilation, own_key);
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const uint32_t kept = __shfl_sync(~0u, drawn, lane / 4 + 8 * x) >> (2 * (lane % 4));
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if ((kept >> (8 * n + e) & 1) == 0) scores[0][n][2 * x + e] = 0.0f;
          }
        }
      }
    }
    multiply_weights(o, scores, values, 16 * warp_id());
  }

  // The warps' results become one, which goes to the scratch memory.
  __device__ __forceinline__ void leave() {
    softmax.sum_up();
    const int lane = lane_id();
    if (lane % 4 == 0) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        shared_most[16 * warp_id() + lane / 4 + 8 * x] = softmax.most[x];
        shared_sum[16 * warp_id() + lane / 4 + 8 * x] = softmax.sum[x];
      }
    }
    __syncthreads();
    float factor[2];
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int row = lane / 4 + 8 * x;
      float most = -INFINITY, sum = 0.0f;
      for (int warp = 0; warp < kGlobalWarps; ++warp) {
        most = fmaxf(most, shared_most[16 * warp + row]);
      }
      for (int warp = 0; warp < kGlobalWarps; ++warp) {
        sum += shared_sum[16 * warp + row] * rebased(p, shared_most[16 * warp + row], most);
      }
      factor[x] = rebased(p, softmax.most[x], most);
      if (warp_id() == 0 && lane % 4 == 0 && query_of(row) >= 0) {
        statistics(p, chunks)[row_of(row)] = {most, sum};
      }
    }
    sum_over_warps<T, D>(o[0], factor, keys.base, [&](int row) {
      return query_of(row) < 0 ? nullptr : p.partials + row_of(row) * D;
    });
  }

  __device__ __forceinline__ int64_t row_of(int row) const {
    return partial_row(p, chunks, block.b, block.h, block.chunk, block.first_slot + row);
  }
};

template <class T, int D>
__global__ void __launch_bounds__(kGlobalThreads, kBlocks<T, D>)
    global_rows_kernel(const Problem p, const Chunks chunks) {
  LONGPRETRAIN_SHARED(shared);
  const GlobalBlock block(p, chunks, p.M);
  GlobalRows<T, D>(p, chunks, block, shared).run();
}

// A warp combines the partial results of one slot.
template <class T, int D>
__global__ void __launch_bounds__(kGlobalThreads)
    combine_rows_kernel(const Problem p, const Chunks chunks) {
  const int32_t slot = static_cast<int32_t>(blockIdx.x) * kGlobalWarps + warp_id();
  const int32_t b = p.first_b + static_cast<int32_t>(blockIdx.z);
  const int32_t h = p.first_head + static_cast<int32_t>(blockIdx.y);
  const int32_t query = query_of_slot(p, b, slot);
  if (query < 0) return;

  const int64_t first = partial_row(p, chunks, b, h, 0, slot);
  const Statistics* found = statistics(p, chunks) + first;
  float most = -INFINITY, sum = 0.0f;
  for (int32_t i = 0; i < chunks.count; ++i) {
    most = fmaxf(most, found[int64_t{i} * p.G].most);
  }
  float o[2][2] = {};  // of the lane's pairs of columns
  for (int32_t i = 0; i < chunks.count; ++i) {
    const Statistics one = found[int64_t{i} * p.G];
    const float factor = rebased(p, one.most, most);
    sum = fmaf(one.sum, factor, sum);
    const float* row = p.partials + (first + int64_t{i} * p.G) * D;
    for_pairs<D>([&](int column) {
      const float2 pair = *reinterpret_cast<const float2*>(row + column);
      o[column / 64][0] = fmaf(pair.x, factor, o[column / 64][0]);
      o[column / 64][1] = fmaf(pair.y, factor, o[column / 64][1]);
    });
  }
  const int64_t n = query - p.q_offset;
  const float factor = sum == 0.0f ? 0.0f : p.kept_scale / sum;  // NaN stays NaN
  typename T::Storage* out = head_of<T>(p.out, b, h) + n * p.out.stride_N;
  for_pairs<D>([&](int column) {
    store_pair<T>(out + column, o[column / 64][0] * factor, o[column / 64][1] * factor);
  });
  if (lane_id() == 0) {
    OnlineSoftmax whole;
    whole.most[0] = most;
    whole.sum[0] = sum;
    p.lse_BNH[p.row(b, query - p.q_offset, h)] = whole.log_sum_exp(0, p.log2_scale);
  }
}

}  // namespace

void global_rows(const Problem& problem, DType dtype, void* stream) {
  if (problem.G == 0) return;
  const Chunks chunks = chunks_of_global_rows(problem.M, problem.H, problem.G);
  with_types(dtype, problem.D, [&](auto type, auto head_size) {
    using T = decltype(type);
    constexpr int D = decltype(head_size)::value;
    launch("global_rows_kernel", global_rows_kernel<T, D>,
           global_grid(problem, chunks.count * ceil_div(problem.G, kSlotTile)), kGlobalThreads,
           kTileBytes<T, D> + kStatisticsBytes, stream, problem, chunks);
    launch("combine_rows_kernel", combine_rows_kernel<T, D>,
           global_grid(problem, ceil_div(problem.G, kGlobalWarps)), kGlobalThreads, 0, stream,
           problem, chunks);
  });
}

}  // namespace longpretrain::cuda
