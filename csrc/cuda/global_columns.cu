// Gradients of the ordinary keys and values of global tokens, which all local queries may see.
// Blocks take a chunk of the queries and a tile of slots each, and leave partial results; a second
// kernel sums them up.
//
// Letters: see ../attention.h.
#include "global_backward.h"
#include "kernels.h"
#include "launch.h"

namespace longpretrain::cuda {
namespace {

template <class T, int D>
constexpr size_t kTileBytes = Tile<T, D>::bytes(2 * kSlotTile + 2 * kTokenTile);
constexpr size_t kColumnBytes = kTokenTile * sizeof(QueryColumn);

template <class T, int D>
struct GlobalColumns {
  using TileTD = Tile<T, D>;

  const Problem& p;
  const Chunks& chunks;
  const GlobalBlock& block;
  TileTD keys, values, queries, douts;
  QueryColumn* columns;  // of the warp's queries

  int32_t own_key[2];  // positions of the lane's two slots
  float dk[1][D / 8][4], dv[1][D / 8][4];

  __device__ __forceinline__ GlobalColumns(const Problem& p_, const Chunks& chunks_,
                                           const GlobalBlock& block_, char* shared)
      : p(p_),
        chunks(chunks_),
        block(block_),
        keys{shared},
        values(keys.from_row(kSlotTile)),
        queries(values.from_row(kSlotTile)),
        douts(queries.from_row(kTokenTile)),
        columns(reinterpret_cast<QueryColumn*>(shared + kTileBytes<T, D>) + 16 * warp_id()) {}

  __device__ __forceinline__ int32_t key_of(int row) const {
    return position_of_slot(p, block.b, block.first_slot + row);
  }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int x = 0; x < 2; ++x) own_key[x] = key_of(lane_id() / 4 + 8 * x);
    if (!__any_sync(~0u, own_key[0] >= 0 || own_key[1] >= 0)) return;
    const auto slot_row = [&](int row) { return key_of(row); };
    load_rows<T, D, kGlobalThreads, kSlotTile>(keys, p.k, block.b, block.h, slot_row);
    load_rows<T, D, kGlobalThreads, kSlotTile>(values, p.v, block.b, block.h, slot_row);
    const ResidueClass tokens(p, 0, 1);
    const int32_t begin = p.q_offset + block.begin, end = p.q_offset + block.end;
    const FlagLoader flags(p, block.b, tokens, begin, end);
    using Loader = StepLoader<T, D, kGlobalThreads>;
    Loader query_loader(p.q, block.b, block.h, tokens, p.q_offset, begin, begin, end);
    Loader dout_loader(p.dout, block.b, block.h, tokens, p.q_offset, begin, begin, end);
    clear(dk);
    clear(dv);
#pragma unroll 1
    for (int32_t n = block.begin; n < block.end; n += kTokenTile) {
      // Rows of global tokens and of padding are left out.
      const ColumnBits live = live_columns(flags.fetch(p.q_offset + n));
      query_loader.template load_live<kTokenTile>(queries, live.word);
      dout_loader.template load_live<kTokenTile>(douts, live.word);
      copy_commit();
      const int own_row = 16 * warp_id() + lane_id() % 16;
      const int32_t query = is_live(live, own_row) ? p.q_offset + n + own_row : -1;
      if (lane_id() < 16) columns[lane_id()] = column_of(p, block.b, block.h, query);
      copy_wait<0>();
      __syncthreads();
      add_queries(query);
      __syncthreads();
    }
    leave(dk[0], 0);
    leave(dv[0], 1);
  }

  // `query`: the position of that of column lane % 16.
  __device__ __forceinline__ void add_queries(int32_t query) {
    const uint32_t counts = counting(columns, own_key);
    if (!__any_sync(~0u, counts != 0)) return;
    const int first_row = 16 * warp_id();
    float weights[1][2][4] = {}, gradients[1][2][4] = {};
    multiply_tiles(weights, keys, 0, queries, first_row);
    multiply_tiles(gradients, values, 0, douts, first_row);
    uint32_t kept = ~0u;
    if (p.drop_below != 0) {
      kept = kept_of(draw_sixteen(p, block.b, static_cast<uint32_t>(block.h), query, block.dilation,
                                  [&](int row) { return key_of(row); }));
    }
    differentiate_tile(weights[0], gradients[0], p, columns, counts, kept);
    multiply_weights(dv, weights, douts, first_row);
    multiply_weights(dk, gradients, queries, first_row);
  }

  // Partial results are [B, H, chunk, G] rows of D numbers for k, then D for v.
  __device__ __forceinline__ void leave(const float (&sums)[D / 8][4], int which) const {
    const float factor[2] = {1.0f, 1.0f};
    sum_over_warps<T, D>(sums, factor, queries.base, [&](int row) {
      const int32_t slot = block.first_slot + row;
      const int64_t place = partial_row(p, chunks, block.b, block.h, block.chunk, slot);
      return key_of(row) < 0 ? nullptr : p.partials + (2 * place + which) * D;
    });
  }
};

template <class T, int D>
__global__ void __launch_bounds__(kGlobalThreads, kBlocks<T, D>)
    global_columns_kernel(const Problem p, const Chunks chunks) {
  LONGPRETRAIN_SHARED(shared);
  const GlobalBlock block(p, chunks, p.N);
  GlobalColumns<T, D>(p, chunks, block, shared).run();
}

// A warp sums up the partial results of one slot.
template <class T, int D>
__global__ void __launch_bounds__(kGlobalThreads)
    sum_key_gradients_kernel(const Problem p, const Chunks chunks) {
  const int32_t slot = static_cast<int32_t>(blockIdx.x) * kGlobalWarps + warp_id();
  const int32_t b = p.first_b + static_cast<int32_t>(blockIdx.z);
  const int32_t h = p.first_head + static_cast<int32_t>(blockIdx.y);
  const int64_t key = position_of_slot(p, b, slot);
  if (key < 0) return;
  const float* row = p.partials + 2 * partial_row(p, chunks, b, h, 0, slot) * D;
  typename T::Storage* dk = head_of<T>(p.dk, b, h) + key * p.dk.stride_N;
  typename T::Storage* dv = head_of<T>(p.dv, b, h) + key * p.dv.stride_N;
  for_pairs<D>([&](int column) {
    float2 sum_k = make_float2(0.0f, 0.0f), sum_v = sum_k;
    for (int32_t i = 0; i < chunks.count; ++i) {
      const float* partial = row + 2 * int64_t{i} * p.G * D + column;
      const float2 one_k = *reinterpret_cast<const float2*>(partial);
      const float2 one_v = *reinterpret_cast<const float2*>(partial + D);
      sum_k = make_float2(sum_k.x + one_k.x, sum_k.y + one_k.y);
      sum_v = make_float2(sum_v.x + one_v.x, sum_v.y + one_v.y);
    }
    store_pair<T>(dk + column, sum_k.x * p.scale, sum_k.y * p.scale);
    store_pair<T>(dv + column, sum_v.x * p.kept_scale, sum_v.y * p.kept_scale);
  });
}

}  // namespace

void global_columns_backward(const Problem& problem, DType dtype, void* stream) {
  if (problem.G == 0) return;
  const Chunks chunks = chunks_of_global_columns(problem.N, problem.H, problem.G);
  with_types(dtype, problem.D, [&](auto type, auto head_size) {
    using T = decltype(type);
    constexpr int D = decltype(head_size)::value;
    launch("global_columns_kernel", global_columns_kernel<T, D>,
           global_grid(problem, chunks.count * ceil_div(problem.G, kSlotTile)), kGlobalThreads,
           kTileBytes<T, D> + kColumnBytes, stream, problem, chunks);
    launch("sum_key_gradients_kernel", sum_key_gradients_kernel<T, D>,
           global_grid(problem, ceil_div(problem.G, kGlobalWarps)), kGlobalThreads, 0, stream,
           problem, chunks);
  });
}

}  // namespace longpretrain::cuda
