// The rows of local queries: their windows and the global tokens' columns, in one softmax.
//
// A block takes a tile of queries of one residue class, a warp 16 or 32 of them: with 32 each
// number read from shared memory serves two products of the tensor cores, which the bandwidth of
// shared memory would bound otherwise. First come the global tokens, gathered kSlotTile at a time,
// then the tiles of keys that the queries' windows touch; while one tile is worked on the next
// arrives. A warp leaves out the tiles that none of its queries sees.
//
// Letters: see ../attention.h.
#include "dropout.h"
#include "forward_rows.h"
#include "kernels.h"
#include "launch.h"

namespace longpretrain::cuda {
namespace {

constexpr int kTileKeys = 32;  // more would leave too few registers

// What a kernel is tuned by, within 255 registers and 99 KiB of shared memory (sm_86).
template <class T, int D>
struct Shape {
  static constexpr int kStrips = kIs16Bit<T> ? 2 : 1;                           // of a warp
  using Rows = std::conditional_t<D == 128, RowsInTile<T, D>, LeftRows<T, D>>;  // of queries
  static constexpr int kRows = kWarps * kStrips * kStripRows;
  static constexpr int kBlocks = D == 32 ? 4 : D == 64 ? 3 : kIs16Bit<T> ? 2 : 1;  // on sm_80
  // First what is in common, then the tiles.
  static constexpr int kFirstTile =
      (static_cast<int>(sizeof(ForwardCommon<kStrips>)) + 127) / 128 * 128;
  static constexpr int kSharedBytes = kFirstTile + Tile<T, D>::bytes(kRows + 4 * kTileKeys);
};

template <class T, int D, bool kDropout>
struct WindowForward : ForwardRows<Shape<T, D>::kStrips> {
  using TileTD = Tile<T, D>;
  using Loader = StepLoader<T, D, kThreads>;
  static constexpr int kStrips = Shape<T, D>::kStrips;
  using Rows = ForwardRows<kStrips>;
  using Rows::block, Rows::common, Rows::flag_of, Rows::kRows, Rows::own_step, Rows::p,
      Rows::row_of, Rows::step_of, Rows::strip, Rows::tokens;

  TileTD queries, keys, values;  // two tiles of keys, two of values

  typename Shape<T, D>::Rows left[kStrips];
  float o[kStrips][D / 8][4];

  __device__ __forceinline__ WindowForward(const Problem& problem, char* shared,
                                           ForwardCommon<kStrips>& common_)
      : Rows(problem, common_),
        queries{shared + Shape<T, D>::kFirstTile},
        keys(queries.from_row(kRows)),
        values(keys.from_row(2 * kTileKeys)) {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      softmax_of(s) = OnlineSoftmax();
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o[s][n][e] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ OnlineSoftmax& softmax_of(int s) const {
    return common.softmax[s][fresh(uint32_t{threadIdx.x})];
  }
  // Scores become weights.
  template <int kTiles>
  __device__ __forceinline__ void weigh(int s, float (&scores)[kTiles][4]) {
    OnlineSoftmax softmax = softmax_of(s);
    softmax.add(scores, o[s], p.log2_scale);
    softmax_of(s) = softmax;
  }

  __device__ __forceinline__ void run() {
    if (this->look_at_rows()) {
      const int32_t first_key = common.seen_by_block.first / kTileKeys * kTileKeys;
      load_queries();
      load_slots(0);
      load_keys(first_key, fetch_flag(first_key));
      copy_commit();
      arrive();
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        left[s].load(queries, strip(s));
        if (p.sign < 0.0f) left[s].negate();
      }
      add_slots();
      add_window(first_key);
    }
    write();
  }

  // Of the lane's key of a tile, asked for early and looked at late.
  __device__ __forceinline__ uint8_t fetch_flag(int32_t first_key) const {
    const int32_t step = first_key + lane_id();
    const bool is_key = step < tokens.num_keys;
    return is_key ? p.flags_BM[p.token(block.b, tokens.position(step))] : kPadding;
  }

  // Tiles lie in turn from row 0 and from row kTileKeys on.
  static __device__ __forceinline__ int row_of_tile(int32_t key) { return key & kTileKeys; }

  __device__ __forceinline__ void load_keys(int32_t key, uint8_t flag) {
    const uint32_t live[1] = {__ballot_sync(~0u, flag == 0)};
    const int row = row_of_tile(key);
    Loader(p.k, block.b, block.h, tokens, 0, key, 0, 0)
        .template load_live<kTileKeys>(keys.from_row(row), live);
    Loader(p.v, block.b, block.h, tokens, 0, key, 0, 0)
        .template load_live<kTileKeys>(values.from_row(row), live);
    if (threadIdx.x == 0) common.live[row / kTileKeys] = live[0];
  }

  __device__ __forceinline__ void load_queries() {
    Loader loader(p.q, block.b, block.h, tokens, p.q_offset, block.first_step, tokens.first_query,
                  tokens.end_query);
    loader.template load<kRows>(queries);
  }

  // All that was loaded is there, and no thread reads any more what it has read so far.
  static __device__ __forceinline__ void arrive() {
    copy_wait<0>();
    __syncthreads();
  }

  // --- global tokens -----------------------------------------------------------------------------
  // Two tiles of slots fit where the second tile of keys and values will lie: one is loaded while
  // the other is used.
  __device__ __forceinline__ int first_row_of_slots(int32_t tile) const {
    static_assert(2 * kSlotTile <= kTileKeys);
    return row_of_tile(common.seen_by_block.first + kTileKeys) + tile % 2 * kSlotTile;
  }

  __device__ __forceinline__ int32_t slot_position(int32_t slot) const {
    return slot < p.G ? p.slot_position_BG[int64_t{block.b} * p.G + slot] : -1;
  }

  __device__ __forceinline__ void load_slots(int32_t tile) {
    if (tile * kSlotTile >= p.G) return;
    const auto row_of = [&](int row) { return slot_position(tile * kSlotTile + row); };
    const int first = first_row_of_slots(tile);
    load_rows<T, D, kThreads, kSlotTile>(keys.from_row(first), p.k, block.b, block.h, row_of);
    load_rows<T, D, kThreads, kSlotTile>(values.from_row(first), p.v, block.b, block.h, row_of);
  }

  __device__ __forceinline__ void add_slots() {
    for (int32_t tile = 0; tile * kSlotTile < p.G; ++tile) {
      load_slots(tile + 1);
      copy_commit();
      add_slot_tile(tile);
      arrive();
    }
  }

  __device__ __forceinline__ void add_slot_tile(int32_t tile) {
    constexpr int kTiles = kSlotTile / 8;
    int32_t position[kTiles][2];  // of the lane's columns
    bool any = false;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        position[n][e] = slot_position(tile * kSlotTile + 8 * n + 2 * (lane_id() % 4) + e);
        any |= position[n][e] >= 0;
      }
    }
    if (!__any_sync(~0u, any)) return;
    float scores[kStrips][kTiles][4] = {};
    multiply_rows(scores, left, keys, first_row_of_slots(tile));
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      mask_slots(s, position, scores[s]);
      weigh(s, scores[s]);
      if constexpr (kDropout) drop_slots(s, tile, scores[s]);
    }
    multiply_weights(o, scores, values, first_row_of_slots(tile));
  }

  __device__ __forceinline__ void mask_slots(int s, const int32_t (&position)[kSlotTile / 8][2],
                                             float (&scores)[kSlotTile / 8][4]) const {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      Range reach = common.windows[row_of(s, x)];
      if (reach.first <= reach.last) {
        const int32_t query = tokens.position(own_step(s, x));
        reach = document_of(p, block.b, query);
        if (p.causal) reach.last = smaller(reach.last, query);
      }
#pragma unroll
      for (int n = 0; n < kSlotTile / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (!reach.has(position[n][e])) scores[n][2 * x + e] = -INFINITY;
        }
      }
    }
  }

  // Half of the warp draws for the 16 queries and one slot, half for the next.
  __device__ __forceinline__ void drop_slots(int s, int32_t tile,
                                             float (&weights)[kSlotTile / 8][4]) const {
    const int lane = lane_id();
    const uint32_t query = static_cast<uint32_t>(tokens.position(step_of(s, lane % 16)));
#pragma unroll 1
    for (int pair = 0; pair < kSlotTile / 2; ++pair) {
      const int32_t key = slot_position(tile * kSlotTile + 2 * pair + lane / 16);
      if (!__any_sync(~0u, key >= 0)) continue;
      const uint32_t byte = dropout_byte(common.dropout_seed, static_cast<uint32_t>(block.h), query,
                                         larger(key, 0), tokens.dilation);
      const uint32_t kept = __ballot_sync(~0u, byte >= static_cast<uint32_t>(p.drop_below));
#pragma unroll
      for (int n = 0; n < kSlotTile / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int bit = lane / 4 + 8 * (e / 2) + 16 * (e % 2);
          if (pair == lane % 4 + 4 * n && (kept >> bit & 1) == 0) weights[n][e] = 0.0f;
        }
      }
    }
  }

  // --- the window --------------------------------------------------------------------------------
  __device__ __forceinline__ void add_window(int32_t first_key) {
    uint8_t fetched = fetch_flag(first_key + kTileKeys);
    for (int32_t key = first_key; key <= common.seen_by_block.last; key += kTileKeys) {
      arrive();
      if (key + kTileKeys <= common.seen_by_block.last) load_keys(key + kTileKeys, fetched);
      copy_commit();
      const auto fetch_next = [&] { fetched = fetch_flag(key + 2 * kTileKeys); };
      const uint32_t warp = fresh(uint32_t{threadIdx.x}) / kWarp;
      const Range some = common.seen_by_some[warp], all = common.seen_by_all[warp];
      const uint32_t live = common.live[row_of_tile(key) / kTileKeys];
      const int32_t last = key + kTileKeys - 1;
      if (live == 0 || last < some.first || key > some.last) {
        fetch_next();
      } else if (live == ~0u && all.has(key) && all.has(last)) {
        add_tile<false>(key, live, fetch_next);
      } else {
        add_tile<true>(key, live, fetch_next);
      }
    }
  }

  // `before_sums` is called where registers have become free.
  template <bool kMasked, class Call>
  __device__ __forceinline__ void add_tile(int32_t key, uint32_t live, Call before_sums) {
    constexpr int kTiles = kTileKeys / 8;
    float scores[kStrips][kTiles][4] = {};
    multiply_rows(scores, left, keys, row_of_tile(key));
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      if constexpr (kMasked) {
        put_where_not(allowed_32(this->windows_of(s), live, key), -INFINITY, scores[s]);
      }
      weigh(s, scores[s]);
    }
#pragma unroll
    for (int s = 0; kDropout && s < kStrips; ++s) {
      const WindowDropout dropout = {common.dropout_seed, static_cast<uint32_t>(block.h),
                                     static_cast<uint32_t>(p.drop_below), tokens};
      put_where_not(dropout.draw_32(step_of(s, 0), key), 0.0f, scores[s]);
    }
    before_sums();
    multiply_weights(o, scores, values, row_of_tile(key));
  }

  // --- the end -----------------------------------------------------------------------------------
  // Rows of padding are zeros, those of global tokens someone else's.
  __device__ __forceinline__ void write() {
    typename T::Storage* out = head_of<T>(p.out, block.b, block.h);
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      OnlineSoftmax softmax = softmax_of(s);
      softmax.sum_up();
      float factor[2];
      uint32_t mine[2];  // rows to write, by the first of the four lanes that have them
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const uint8_t flag = flag_of(own_step(s, x));
        const bool has_sum = flag == 0 && softmax.sum[x] != 0.0f;
        factor[x] = has_sum ? p.kept_scale / softmax.sum[x] : 0.0f;
        mine[x] = __ballot_sync(~0u, flag != kGlobal);
        if (lane_id() % 4 == 0 && flag != kGlobal) {
          const int32_t n = tokens.position(own_step(s, x)) - p.q_offset;
          p.lse_BNH[p.row(block.b, n, block.h)] =
              has_sum ? softmax.log_sum_exp(x, p.log2_scale) : INFINITY;
        }
      }
      store_rows<T, D>(o[s], factor, queries, strip(s), [&](int row) {
        const uint32_t bits = row < 8 ? mine[0] : mine[1];
        const int64_t n = int64_t{tokens.position(step_of(s, row))} - p.q_offset;
        return (bits >> (row % 8 * 4) & 1) != 0 ? out + n * p.out.stride_N : nullptr;
      });
    }
  }
};

template <class T, int D, bool kDropout>
__global__ void __launch_bounds__(kThreads, Shape<T, D>::kBlocks)
    window_forward_kernel(const Problem p) {
  LONGPRETRAIN_SHARED(shared);
  using Common = ForwardCommon<Shape<T, D>::kStrips>;
  constexpr int kRows = Common::kRows;
  const WindowBlock block(p, kRows, false);
  if (block.first_step >= block.tokens.end_query) return;
  if (block.first_step + kRows <= block.tokens.first_query) return;
  Common& common = *reinterpret_cast<Common*>(shared);
  if (threadIdx.x == 0) {
    common.block = block;
    if (kDropout) common.dropout_seed = static_cast<uint64_t>(p.dropout_seed_B[block.b]);
  }
  __syncthreads();
  WindowForward<T, D, kDropout>(p, shared, common).run();
}

template <class T, int D>
void start(const Problem& problem, void* stream) {
  const auto kernel = problem.drop_below == 0 ? window_forward_kernel<T, D, false>
                                              : window_forward_kernel<T, D, true>;
  launch("window_forward_kernel", kernel, window_grid(problem, Shape<T, D>::kRows, false), kThreads,
         Shape<T, D>::kSharedBytes, stream, problem);
}

}  // namespace

void window_forward(const Problem& problem, DType dtype, void* stream) {
  with_types(dtype, problem.D, [&](auto type, auto head_size) {
    start<decltype(type), head_size.value>(problem, stream);
  });
}

}  // namespace longpretrain::cuda
