// Gradients of the rows of global tokens: of their queries, and of the keys and values that they
// attend to with projections of their own.
//
// A block takes a chunk of the keys, kTokenTile at a time, and goes through all slots. What it
// finds for the queries is a partial result; a second kernel sums up those of all blocks.
//
// Letters: see ../attention.h.
#include "global_backward.h"
#include "kernels.h"
#include "launch.h"

namespace longpretrain::cuda {
namespace {

constexpr int kStageStride =
    kTokenTile + 8;  // floats; more than the keys, to spread over the banks

template <class T, int D>
constexpr size_t kTileBytes = Tile<T, D>::bytes(2 * kTokenTile + 2 * kSlotTile);
constexpr size_t kColumnBytes = kSlotTile * sizeof(QueryColumn);
constexpr size_t kStageBytes = kSlotTile * kStageStride * sizeof(float);

// A quarter of the columns of 16 rows: o[i][2 * x + e] stands in row g + 8 * x, column
// quarter_column(i) + e, of the warp's D / 4.
template <class T, int D>
__device__ __forceinline__ int quarter_column(int i) {
  const int q = lane_id() % 4, first = warp_id() * (D / 4);
  return first + (kIs16Bit<T> ? 8 * i + 2 * q : q * (D / 16) + 2 * i);
}

// o += stage * the tile: [16][kTokenTile] times [kTokenTile][D / 4].
template <class T, int D>
__device__ __forceinline__ void multiply_quarter(float (&o)[D / 32][4], const float* stage,
                                                 const Tile<T, D>& tile) {
  const int lane = lane_id(), g = lane / 4, q = lane % 4;
  if constexpr (kIs16Bit<T>) {
#pragma unroll
    for (int key = 0; key < kTokenTile; key += 32) {
      uint32_t left[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float* pair = stage + (g + i % 2 * 8) * kStageStride + key + i / 2 * 8 + 2 * q;
        const float2 numbers = *reinterpret_cast<const float2*>(pair);
        left[i / 4][i % 4] = pack<T>(numbers.x, numbers.y);
      }
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        uint32_t right[4];
        ldmatrix_x4<true>(right, tile.at(key + lane, warp_id() * (D / 32) + i));
        mma_m16n8k16<T>(o[i], left[0], right[0], right[1]);
        mma_m16n8k16<T>(o[i], left[1], right[2], right[3]);
      }
    }
  } else {
#pragma unroll 4
    for (int key = 0; key < kTokenTile; ++key) {
      const float left[2] = {stage[g * kStageStride + key], stage[(g + 8) * kStageStride + key]};
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        const int column = quarter_column<T, D>(i);
        const float2 right =
            reinterpret_cast<const float2*>(tile.at(key, column / 4))[column % 4 / 2];
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          o[i][2 * x] = fmaf(left[x], right.x, o[i][2 * x]);
          o[i][2 * x + 1] = fmaf(left[x], right.y, o[i][2 * x + 1]);
        }
      }
    }
  }
}

template <class T, int D>
struct GlobalRowsBackward {
  using TileTD = Tile<T, D>;

  const Problem& p;
  const Chunks& chunks;
  const GlobalBlock& block;
  TileTD keys, values, queries, douts;
  QueryColumn* columns;
  float* stage;  // gradients of scores: [kSlotTile][kStageStride]

  int32_t own_key[2];  // positions of the lane's two keys; -1: padding, or behind the last
  float dk[1][D / 8][4], dv[1][D / 8][4];

  __device__ __forceinline__ GlobalRowsBackward(const Problem& p_, const Chunks& chunks_,
                                                const GlobalBlock& block_, char* shared)
      : p(p_),
        chunks(chunks_),
        block(block_),
        keys{shared},
        values(keys.from_row(kTokenTile)),
        queries(values.from_row(kTokenTile)),
        douts(queries.from_row(kSlotTile)),
        columns(reinterpret_cast<QueryColumn*>(shared + kTileBytes<T, D>)),
        stage(reinterpret_cast<float*>(shared + kTileBytes<T, D> + kColumnBytes)) {}

  __device__ __forceinline__ void run() {
    const ResidueClass tokens(p, 0, 1);
    const FlagLoader flags(p, block.b, tokens, 0, block.end);
    using Loader = StepLoader<T, D, kGlobalThreads>;
    Loader key_loader(p.k_global, block.b, block.h, tokens, 0, block.begin, 0, block.end);
    Loader value_loader(p.v_global, block.b, block.h, tokens, 0, block.begin, 0, block.end);
#pragma unroll 1
    for (int32_t key = block.begin; key < block.end; key += kTokenTile) {
      const ColumnBits live = no_padding(flags.fetch(key));
      key_loader.template load_live<kTokenTile>(keys, live.word);
      value_loader.template load_live<kTokenTile>(values, live.word);
      copy_commit();
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const int row = 16 * warp_id() + lane_id() / 4 + 8 * x;
        own_key[x] = is_live(live, row) ? key + row : -1;
      }
      clear(dk);
      clear(dv);
#pragma unroll 1
      for (int32_t slot = 0; slot < p.G; slot += kSlotTile) add_slots(slot, key);
      copy_wait<0>();  // without a slot in use nobody has waited so far
      __syncthreads();
      write(key);
      __syncthreads();
    }
  }

  __device__ __forceinline__ void add_slots(int32_t first_slot, int32_t first_key) {
    const int32_t query = query_of_slot(p, block.b, first_slot + lane_id() % 16);
    if (!__any_sync(~0u, query >= 0)) return;
    const auto query_of = [&](int row) { return query_of_slot(p, block.b, first_slot + row); };
    load_rows<T, D, kGlobalThreads, kSlotTile>(queries, p.q_global, block.b, block.h, [&](int row) {
      return query_of(row) < 0 ? -1 : first_slot + row;
    });
    load_rows<T, D, kGlobalThreads, kSlotTile>(douts, p.dout, block.b, block.h, [&](int row) {
      return query_of(row) < 0 ? -1 : query_of(row) - p.q_offset;
    });
    copy_commit();
    if (threadIdx.x < kSlotTile) columns[threadIdx.x] = column_of(p, block.b, block.h, query);
    copy_wait<0>();
    __syncthreads();

    float gradients[1][2][4] = {};
    const uint32_t counts = counting(columns, own_key);
    const bool any = __any_sync(~0u, counts != 0) != 0;
    if (any) add_tile(gradients, counts, query, first_key + 16 * warp_id());
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int key = 16 * warp_id() + lane_id() / 4 + i % 4 / 2 * 8;
      stage[column_number(i / 4, i) * kStageStride + key] = gradients[0][i / 4][i % 4];
    }
    // Also: no thread reads the slots' rows any more, others may come.
    const bool any_of_block = __syncthreads_or(any) != 0;
    const bool is_first = first_key == block.begin;
    if (any_of_block || is_first) add_to_queries(first_slot, is_first);
  }

  // `query`: the position of that of column lane % 16.
  __device__ __forceinline__ void add_tile(float (&gradients)[1][2][4], uint32_t counts,
                                           int32_t query, int32_t first_key) {
    float weights[1][2][4] = {};
    multiply_tiles(weights, keys, 16 * warp_id(), queries, 0);
    multiply_tiles(gradients, values, 16 * warp_id(), douts, 0);
    uint32_t kept = ~0u;
    if (p.drop_below != 0) {
      kept = kept_of(draw_neighbours(p, block.b, static_cast<uint32_t>(block.h) + kGlobalRow, query,
                                     block.dilation, first_key));
    }
    differentiate_tile(weights[0], gradients[0], p, columns, counts, kept);
    multiply_weights(dv, weights, douts, 0);
    multiply_weights(dk, gradients, queries, 0);
  }

  // No other block and no other thread has anything to do with these partial sums.
  __device__ __forceinline__ void add_to_queries(int32_t first_slot, bool is_first) const {
    float dq[D / 32][4] = {};
    multiply_quarter<T, D>(dq, stage, keys);
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int32_t slot = first_slot + lane_id() / 4 + 8 * x;
      if (query_of_slot(p, block.b, slot) < 0) continue;
      float* row = p.partials + partial_row(p, chunks, block.b, block.h, block.chunk, slot) * D;
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        float2* to = reinterpret_cast<float2*>(row + quarter_column<T, D>(i));
        const float2 before = is_first ? make_float2(0.0f, 0.0f) : *to;
        *to = make_float2(before.x + dq[i][2 * x], before.y + dq[i][2 * x + 1]);
      }
    }
  }

  __device__ __forceinline__ void write(int32_t first_key) const {
    const auto rows_of = [&](const TensorBNHD& x) {
      typename T::Storage* head = head_of<T>(x, block.b, block.h);
      return [=, this](int row) {
        const int64_t key = int64_t{first_key} + 16 * warp_id() + row;
        return key < block.end ? head + key * x.stride_N : nullptr;
      };
    };
    float factor_k[2], factor_v[2];
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      factor_k[x] = own_key[x] < 0 ? 0.0f : p.scale;
      factor_v[x] = own_key[x] < 0 ? 0.0f : p.kept_scale;
    }
    store_rows<T, D>(dk[0], factor_k, values, 16 * warp_id(), rows_of(p.dk_global));
    store_rows<T, D>(dv[0], factor_v, values, 16 * warp_id(), rows_of(p.dv_global));
  }
};

template <class T, int D>
__global__ void __launch_bounds__(kGlobalThreads, kBlocks<T, D>)
    global_rows_backward_kernel(const Problem p, const Chunks chunks) {
  LONGPRETRAIN_SHARED(shared);
  const GlobalBlock block(p, chunks, p.M);
  GlobalRowsBackward<T, D>(p, chunks, block, shared).run();
}

// A warp sums up the partial results of one slot's query; those of slots without one are zeros.
template <class T, int D>
__global__ void __launch_bounds__(kGlobalThreads)
    sum_query_gradients_kernel(const Problem p, const Chunks chunks) {
  const int32_t slot = static_cast<int32_t>(blockIdx.x) * kGlobalWarps + warp_id();
  const int32_t b = p.first_b + static_cast<int32_t>(blockIdx.z);
  const int32_t h = p.first_head + static_cast<int32_t>(blockIdx.y);
  if (slot >= p.G) return;
  const int32_t count = query_of_slot(p, b, slot) < 0 ? 0 : chunks.count;
  const float* row = p.partials + partial_row(p, chunks, b, h, 0, slot) * D;
  typename T::Storage* dq = head_of<T>(p.dq_global, b, h) + slot * p.dq_global.stride_N;
  for_pairs<D>([&](int column) {
    float2 sum = make_float2(0.0f, 0.0f);
    for (int32_t i = 0; i < count; ++i) {
      const float* partial = row + int64_t{i} * p.G * D + column;
      const float2 pair = *reinterpret_cast<const float2*>(partial);
      sum = make_float2(sum.x + pair.x, sum.y + pair.y);
    }
    store_pair<T>(dq + column, sum.x * p.scale, sum.y * p.scale);
  });
}

}  // namespace

void global_rows_backward(const Problem& problem, DType dtype, void* stream) {
  if (problem.G == 0) return;
  const Chunks chunks = chunks_of_global_rows_backward(problem.M, problem.H, problem.G);
  with_types(dtype, problem.D, [&](auto type, auto head_size) {
    using T = decltype(type);
    constexpr int D = decltype(head_size)::value;
    launch("global_rows_backward_kernel", global_rows_backward_kernel<T, D>,
           global_grid(problem, chunks.count), kGlobalThreads,
           kTileBytes<T, D> + kColumnBytes + kStageBytes, stream, problem, chunks);
    launch("sum_query_gradients_kernel", sum_query_gradients_kernel<T, D>,
           global_grid(problem, ceil_div(problem.G, kGlobalWarps)), kGlobalThreads, 0, stream,
           problem, chunks);
  });
}

}  // namespace longpretrain::cuda
