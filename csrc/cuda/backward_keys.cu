// Gradients of keys and values within the windows, those of global tokens excepted.
//
// A block takes kTokenTile keys of one residue class and goes through the tiles of queries that see
// them. Its rows are the keys: the transposed weights and gradients of scores are then left sides
// of the products that dv and dk sum up, straight from registers. Nothing is added from outside of
// the block, so no order of blocks changes a bit.
//
// Letters: see ../attention.h.
#include "backward.h"
#include "kernels.h"

namespace longpretrain::cuda {
namespace {

template <class T, int D>
struct Shape {
  static constexpr bool kOfKeys = true;  // what a block takes a tile of
  // Strips of a warp share what they read from shared memory; more than this takes more registers
  // than there are.
  static constexpr int kStrips = kIs16Bit<T> && D <= 64 ? 2 : 1;
  static constexpr int kThreads = kTokenTile / (kStrips * kStripRows) * kWarp;
  // Of a multiprocessor, at once: how many registers the compiler may give a thread.
  static constexpr int kBlocks = kIs16Bit<T> ? (D <= 64 ? 4 : 2) : D == 32 ? 2 : 1;
  // With 64 of them only three blocks had room on sm_80.
  static constexpr int kQueries = kIs16Bit<T> && D == 64 ? 32 : rows_of_tile<T, D>();
  // Keys of 16 bits, and short values too, move on to registers, and their place to queries.
  static constexpr bool kValuesMove = kIs16Bit<T> && D == 32;

  static constexpr int kKeyBytes = Tile<T, D>::bytes(kTokenTile);
  static constexpr int kStageBytes = Tile<T, D>::bytes(2 * kQueries);
  static constexpr int kSeenBytes = kTokenTile * static_cast<int>(sizeof(Range));
  static constexpr int kTotalsBytes = kQueries * static_cast<int>(sizeof(QueryTotals));

  // Where they begin in shared memory.
  static constexpr int kStage = 0;  // two of them
  static constexpr int kValues = kValuesMove ? kStageBytes + kKeyBytes : 2 * kStageBytes;
  static constexpr int kKeys = kIs16Bit<T> ? kStageBytes : kValues + kKeyBytes;
  static constexpr int kSeen = 2 * kStageBytes + (kValuesMove   ? 0
                                                  : kIs16Bit<T> ? kKeyBytes
                                                                : 2 * kKeyBytes);
  static constexpr int kTotals = kSeen + kSeenBytes;        // of each stage
  static constexpr int kKept = kTotals + 2 * kTotalsBytes;  // of the strips
  static constexpr int kBlock =
      kKept + kTokenTile / kStripRows * kQueries * static_cast<int>(sizeof(uint16_t));
  static constexpr int kSights = kBlock + static_cast<int>(sizeof(WindowBlock));  // of the warps
  static constexpr int kEnd = kSights + kThreads / kWarp * static_cast<int>(sizeof(Sight));
};

template <class T, int D>
struct WindowBackwardKeys {
  using S = Shape<T, D>;
  using TileTD = Tile<T, D>;
  using Loader = StepLoader<T, D, S::kThreads>;
  static constexpr int kStrips = S::kStrips, kQueries = S::kQueries;

  const Problem& p;
  const WindowBlock& block;
  const ResidueClass& tokens;
  char* shared;
  const Factors factors;
  const int first_row;  // of the warp's strips, in the tile of keys

  LeftRows<T, D> keys[kStrips], values[kStrips];
  float dk[kStrips][D / 8][4], dv[kStrips][D / 8][4];

  __device__ __forceinline__ WindowBackwardKeys(const Problem& p_, const WindowBlock& block_,
                                                char* shared_)
      : p(p_),
        block(block_),
        tokens(block_.tokens),
        shared(shared_),
        factors(p_),
        first_row(warp_id() * kStrips * kStripRows) {}

  // Two stages: while one is used the other is loaded.
  __device__ __forceinline__ TileTD query_tile(int stage) const {
    return {shared + S::kStage + stage * S::kStageBytes};
  }
  __device__ __forceinline__ TileTD dout_tile(int stage) const {
    return query_tile(stage).from_row(kQueries);
  }
  __device__ __forceinline__ QueryTotals* totals(int stage) const {
    return reinterpret_cast<QueryTotals*>(shared + S::kTotals + stage * S::kTotalsBytes);
  }
  __device__ __forceinline__ TileTD key_tile() const { return {shared + S::kKeys}; }
  __device__ __forceinline__ TileTD value_tile() const { return {shared + S::kValues}; }
  // Which queries see a key, in steps.
  __device__ __forceinline__ Range* seen_by() const {
    return reinterpret_cast<Range*>(shared + S::kSeen);
  }

  __device__ __forceinline__ void run() {
    const uint32_t fetched = fetch_flags();
    const ColumnBits live = live_columns(fetched);
    if (!live.any()) {
      const ColumnBits padding = padding_of(fetched);
      write_zeros<T, D, S::kThreads>(p.dk, block, 0, padding);
      write_zeros<T, D, S::kThreads>(p.dv, block, 0, padding);
      return;
    }
    load_keys(live);
    look_at_row(live);
    __syncthreads();
    Sight sight(seen_by(), live, first_row, kStrips * kStripRows);
    sight.any.first = larger(sight.any.first, tokens.first_query);
    sight.any.last = smaller(sight.any.last, tokens.end_query - 1);
    Sight* kept = reinterpret_cast<Sight*>(shared + S::kSights) + warp_id();
    if (lane_id() == 0) *kept = sight;
    __syncwarp();
    add_queries(*kept);
    write();
  }

  __device__ __forceinline__ uint32_t fetch_flags() const {
    return FlagLoader(p, block.b, tokens, 0, tokens.num_keys).fetch(block.first_step);
  }
  // Without the rows behind the last key.
  __device__ __forceinline__ ColumnBits padding_of(uint32_t fetched) const {
    const int32_t step = block.first_step + lane_id();
    return {{__ballot_sync(~0u, (fetched & 0xffff) == kPadding && step < tokens.num_keys),
             __ballot_sync(~0u, fetched >> 16 == kPadding && step + kWarp < tokens.num_keys)}};
  }

  __device__ __forceinline__ void load_keys(const ColumnBits& live) {
    Loader k_loader(p.k, block.b, block.h, tokens, 0, block.first_step, 0, tokens.num_keys);
    Loader v_loader(p.v, block.b, block.h, tokens, 0, block.first_step, 0, tokens.num_keys);
    k_loader.template load_live<kTokenTile>(key_tile(), live.word);
    v_loader.template load_live<kTokenTile>(value_tile(), live.word);
    copy_commit();
  }

  __device__ __forceinline__ void look_at_row(const ColumnBits& live) const {
    const int row = static_cast<int>(threadIdx.x);
    if (row >= kTokenTile) return;
    seen_by()[row] = is_live(live, row)
                         ? window_of(p, block.b, tokens, block.first_step + row, Side::kBehind)
                         : everything();
  }

  __device__ __forceinline__ void add_queries(const Sight& sight) {
    const Range& queries = sight.any;
    const auto fetch_flags = [&](int32_t step) {
      return FlagLoader(p, block.b, tokens, tokens.first_query, tokens.end_query).fetch(step);
    };
    Loader q_loader(p.q, block.b, block.h, tokens, p.q_offset, queries.first, tokens.first_query,
                    tokens.end_query);
    Loader dout_loader(p.dout, block.b, block.h, tokens, p.q_offset, queries.first,
                       tokens.first_query, tokens.end_query);
    uint32_t fetched = fetch_flags(queries.first);
    ColumnBits live{};
    int stage = 1;
    clear(dk);
    clear(dv);
    // One tile early: while a tile is used, the next is loaded.
    int32_t query = queries.first - kQueries;
#pragma unroll 1
    do {
      if (query >= queries.first) arrive();
      if (query == queries.first) {
        load_left();
        __syncthreads();
      }
      const bool any = live.any();
      QueryTotals next = no_query();
      if (query + kQueries <= queries.last) {
        live = live_columns(fetched);
        q_loader.template load_live<kQueries>(query_tile(stage ^ 1), live.word);
        dout_loader.template load_live<kQueries>(dout_tile(stage ^ 1), live.word);
        next = fetch_totals(query + kQueries, live);
        fetched = fetch_flags(query + 2 * kQueries);
      }
      copy_commit();
      if (any) {
        const bool all_count = sight.all.has(query) && sight.all.has(query + kQueries - 1);
        if (p.drop_below != 0) {
          draw(query);
          add_tile<true, true>(stage, query);  // one more kind of body takes too many registers
        } else if (all_count) {
          add_tile<false, false>(stage, query);
        } else {
          add_tile<true, false>(stage, query);
        }
      }
      stage ^= 1;
      keep_totals(stage, next);
      query += kQueries;
    } while (query <= queries.last);
  }

  __device__ __forceinline__ void load_left() {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      keys[s].load(key_tile(), first_row + s * kStripRows);
      if constexpr (S::kValuesMove) values[s].load(value_tile(), first_row + s * kStripRows);
    }
  }

  // All that was loaded is there, and no thread reads any more what it has read so far.
  static __device__ __forceinline__ void arrive() {
    copy_wait<0>();
    __syncthreads();
  }

  // Of the tile's query that is this thread's to look up.
  __device__ __forceinline__ QueryTotals fetch_totals(int32_t query, const ColumnBits& live) const {
    const int row = static_cast<int>(threadIdx.x);
    if (row >= kQueries || !is_live(live, row)) return no_query();
    const int64_t at = p.row(block.b, tokens.position(query + row) - p.q_offset, block.h);
    return {p.lse_BNH[at], p.delta_BNH[at]};
  }
  __device__ __forceinline__ void keep_totals(int stage, const QueryTotals& query) const {
    if (threadIdx.x < kQueries) {
      totals(stage)[threadIdx.x] = {query.log2_sum * kLog2E, query.delta};
    }
  }

  template <bool kMasked, bool kDropout>
  __device__ __forceinline__ void add_tile(int stage, int32_t query) {
    const TileTD queries = query_tile(stage), douts = dout_tile(stage);
#pragma unroll 1
    for (int column = 0; column < kQueries; column += kPiece) {
      float weights[kStrips][kPieceTiles][4] = {}, gradients[kStrips][kPieceTiles][4] = {};
      multiply_rows(weights, keys, queries, column);
      if constexpr (S::kValuesMove) {
        multiply_rows(gradients, values, douts, column);
      } else {
        multiply_tiles(gradients, value_tile(), first_row, douts, column);
      }
      const QueryTotals* of_column = totals(stage) + column + 2 * (lane_id() % 4);
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        const int row = first_row + s * kStripRows;
        WordBits counts{};
        // Dead queries have no weights anyway.
        if constexpr (kMasked) {
          counts = allowed_32(ranges_of_strip(seen_by(), row), ~0u, query + column);
        }
#pragma unroll
        for (int n = 0; n < kPieceTiles; ++n) {
          const float4 two = *reinterpret_cast<const float4*>(of_column + 8 * n);
          const QueryTotals of[2] = {{two.x, two.y}, {two.z, two.w}};
          uint32_t kept = 0;  // of both columns, from the lane's row g on
          if constexpr (kDropout) kept = kept_of_columns(row, column + 8 * n);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const bool keep = (kept >> (16 * (e % 2) + 8 * (e / 2)) & 1) != 0;
            differentiate<kMasked, kDropout>(weights[s][n][e], gradients[s][n][e], factors,
                                             of[e % 2], counts.has(n, e), keep);
          }
        }
      }
      multiply_weights(dv, weights, douts, column);
      multiply_weights(dk, gradients, queries, column);
    }
  }

  // Draws for the keys of the warp and all queries of a tile.
  __device__ __forceinline__ void draw(int32_t query) const {
    const uint32_t residue = static_cast<uint32_t>(tokens.residue);
#pragma unroll 1
    for (int i = 0; i < kStrips * kQueries; i += kWarp) {
      const int row = first_row + (i + lane_id()) / kQueries * kStripRows;
      const int column = (i + lane_id()) % kQueries;
      const uint4 words = philox4x32(
          static_cast<uint64_t>(p.dropout_seed_B[block.b]), static_cast<uint32_t>(block.h),
          static_cast<uint32_t>(tokens.position(query + column)), residue,
          static_cast<uint32_t>(block.first_step + row) / kSixteen);
      if (i + lane_id() < kStrips * kQueries) {
        kept_of_strip(row)[column] =
            static_cast<uint16_t>(kept_of_sixteen(words, static_cast<uint32_t>(p.drop_below)));
      }
    }
    __syncwarp();
  }
  // Bit i: dropout keeps the weight of the query and key i of the strip.
  __device__ __forceinline__ uint16_t* kept_of_strip(int row) const {
    return reinterpret_cast<uint16_t*>(shared + S::kKept) + row / kStripRows * kQueries;
  }
  __device__ __forceinline__ uint32_t kept_of_columns(int row, int column) const {
    const uint16_t* two = kept_of_strip(row) + column + 2 * (lane_id() % 4);
    return *reinterpret_cast<const uint32_t*>(two) >> (lane_id() / 4);
  }

  // Rows of padding are zeros, those of global tokens someone else's. The flags are looked up
  // again: to keep them would take registers from the loop.
  __device__ __forceinline__ void write() {
    const uint32_t fetched = fetch_flags();
    const ColumnBits live = live_columns(fetched), padding = padding_of(fetched);
    const ColumnBits mine = {{live.word[0] | padding.word[0], live.word[1] | padding.word[1]}};
    arrive();
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const int first = first_row + s * kStripRows, row = first + lane_id() / 4;
      const bool is_sum[2] = {is_live(live, row), is_live(live, row + 8)};
      write(p.dk, dk[s], is_sum, p.scale, first, mine);
      write(p.dv, dv[s], is_sum, p.kept_scale, first, mine);
    }
  }

  __device__ __forceinline__ void write(const TensorBNHD& to, const float (&sum)[D / 8][4],
                                        const bool (&is_sum)[2], float scale, int first,
                                        const ColumnBits& mine) const {
    const float factor[2] = {is_sum[0] ? scale : 0.0f, is_sum[1] ? scale : 0.0f};
    typename T::Storage* rows = head_of<T>(to, block.b, block.h);
    store_rows<T, D>(sum, factor, key_tile(), first, [&](int row) -> typename T::Storage* {
      if (!is_live(mine, first + row)) return nullptr;
      return rows + tokens.position(block.first_step + first + row) * to.stride_N;
    });
  }
};

template <class T, int D>
__global__ void __launch_bounds__(Shape<T, D>::kThreads, Shape<T, D>::kBlocks)
    backward_keys_kernel(const Problem p) {
  LONGPRETRAIN_SHARED(shared);
  run_block<WindowBackwardKeys<T, D>>(p, shared);
}

}  // namespace

void window_backward_keys(const Problem& problem, DType dtype, void* stream) {
  with_types(dtype, problem.D, [&](auto type, auto head_size) {
    using T = decltype(type);
    constexpr int D = decltype(head_size)::value;
    launch_window<Shape<T, D>>("backward_keys_kernel", backward_keys_kernel<T, D>, problem, stream);
  });
}

}  // namespace longpretrain::cuda
