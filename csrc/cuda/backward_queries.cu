// Gradients of local queries.
//
// A block takes kTokenTile queries of one residue class. First come the global tokens, gathered
// kSlotTile at a time, then the tiles of keys that the queries' windows touch.
//
// Letters: see ../attention.h.
#include "backward.h"
#include "kernels.h"

namespace longpretrain::cuda {
namespace {

static_assert(kSlotTile == kPiece);

template <class T, int D>
struct Shape {
  static constexpr bool kOfKeys = false;  // what a block takes a tile of
  // Strips of a warp share what they read from shared memory; more than this takes more registers
  // than there are.
  static constexpr int kStrips = kIs16Bit<T> && D <= 64 ? 2 : 1;
  static constexpr int kThreads = kTokenTile / (kStrips * kStripRows) * kWarp;
  // Of a multiprocessor, at once: how many registers the compiler may give a thread.
  static constexpr int kBlocks = kIs16Bit<T> ? (D == 32 ? 6 : D == 64 ? 4 : 2) : D == 32 ? 3 : 2;
  static constexpr int kKeys = rows_of_tile<T, D>();

  // Where they begin in shared memory: two stages, queries and gradients of their outputs (those of
  // 16 bits move on to registers, and their place to keys), and what is told of the rows.
  static constexpr int kStageBytes = Tile<T, D>::bytes(2 * kKeys);
  static constexpr int kStage = 0;
  static constexpr int kQueries = (kIs16Bit<T> ? 1 : 2) * kStageBytes;
  static constexpr int kWindows = kQueries + Tile<T, D>::bytes(2 * kTokenTile);
  static constexpr int kTotals = kWindows + kTokenTile * static_cast<int>(sizeof(Range));
  static constexpr int kBlock = kTotals + kTokenTile * static_cast<int>(sizeof(QueryTotals));
  static constexpr int kEnd = kBlock + static_cast<int>(sizeof(WindowBlock));
};

template <class T, int D>
struct WindowBackwardQueries {
  using S = Shape<T, D>;
  using TileTD = Tile<T, D>;
  using Loader = StepLoader<T, D, S::kThreads>;
  static constexpr int kStrips = S::kStrips, kThreads = S::kThreads, kKeys = S::kKeys;

  const Problem& p;
  const WindowBlock& block;
  const ResidueClass& tokens;
  char* shared;
  const Factors factors;
  const int first_row;  // of the warp's strips, in the tile of queries

  QueryTotals totals[kStrips][2];  // of the lane's rows
  LeftRows<T, D> queries[kStrips], douts[kStrips];
  float dq[kStrips][D / 8][4];

  __device__ __forceinline__ WindowBackwardQueries(const Problem& p_, const WindowBlock& block_,
                                                   char* shared_)
      : p(p_),
        block(block_),
        tokens(block_.tokens),
        shared(shared_),
        factors(p_),
        first_row(warp_id() * kStrips * kStripRows) {}

  // Two stages: while one is used the other is loaded.
  __device__ __forceinline__ TileTD key_tile(int stage) const {
    return {shared + S::kStage + stage * S::kStageBytes};
  }
  __device__ __forceinline__ TileTD value_tile(int stage) const {
    return key_tile(stage).from_row(kKeys);
  }
  __device__ __forceinline__ TileTD query_tile() const { return {shared + S::kQueries}; }
  __device__ __forceinline__ TileTD dout_tile() const { return query_tile().from_row(kTokenTile); }
  // Which keys a query sees, in steps.
  __device__ __forceinline__ Range* windows() const {
    return reinterpret_cast<Range*>(shared + S::kWindows);
  }
  __device__ __forceinline__ QueryTotals* shared_totals() const {
    return reinterpret_cast<QueryTotals*>(shared + S::kTotals);
  }
  // In the tile, of the lane's row x of a strip.
  __device__ __forceinline__ int row_of(int strip, int x) const {
    return first_row + strip * kStripRows + lane_id() / 4 + 8 * x;
  }

  __device__ __forceinline__ void run() {
    const ColumnBits live = live_rows();
    if (!live.any()) {
      write_zeros<T, D, kThreads>(p.dq, block, p.q_offset, all_rows());
      return;
    }
    load_queries(live);
    look_at_row(live);
    __syncthreads();
    add_keys(Sight(windows(), live, first_row, kStrips * kStripRows));
    write();
  }

  __device__ __forceinline__ ColumnBits live_rows() const {
    const FlagLoader flags(p, block.b, tokens, tokens.first_query, tokens.end_query);
    return live_columns(flags.fetch(block.first_step));
  }
  __device__ __forceinline__ ColumnBits all_rows() const {
    const int32_t first = tokens.first_query - block.first_step;
    const int32_t end = tokens.end_query - block.first_step;
    return {{bits_from(first) & ~bits_from(end), bits_from(first - 32) & ~bits_from(end - 32)}};
  }

  __device__ __forceinline__ void load_queries(const ColumnBits& live) {
    Loader q_loader(p.q, block.b, block.h, tokens, p.q_offset, block.first_step, tokens.first_query,
                    tokens.end_query);
    Loader dout_loader(p.dout, block.b, block.h, tokens, p.q_offset, block.first_step,
                       tokens.first_query, tokens.end_query);
    q_loader.template load_live<kTokenTile>(query_tile(), live.word);
    dout_loader.template load_live<kTokenTile>(dout_tile(), live.word);
    copy_commit();
  }

  __device__ __forceinline__ void look_at_row(const ColumnBits& live) const {
    const int row = static_cast<int>(threadIdx.x);
    if (row >= kTokenTile) return;
    Range window = everything();
    QueryTotals query = no_query();
    if (is_live(live, row)) {
      const int32_t step = block.first_step + row;
      window = window_of(p, block.b, tokens, step, Side::kBefore);
      const int64_t at = p.row(block.b, tokens.position(step) - p.q_offset, block.h);
      query = {p.lse_BNH[at] * kLog2E, p.delta_BNH[at]};
    }
    windows()[row] = window;
    shared_totals()[row] = query;
  }

  __device__ __forceinline__ void add_keys(const Sight& sight) {
    // Dropout draws for sixteen keys at once.
    const int32_t first_key = sight.any.first / kSixteen * kSixteen;
    const int32_t slot_tiles = ceil_div(p.G, kSlotTile);
    const int32_t num_tiles = slot_tiles + ceil_div(sight.any.last + 1 - first_key, kKeys);
    const auto fetch_flags = [&](int32_t step) {
      return FlagLoader(p, block.b, tokens, 0, tokens.num_keys).fetch(step);
    };
    Loader k_loader(p.k, block.b, block.h, tokens, 0, first_key, 0, tokens.num_keys);
    Loader v_loader(p.v, block.b, block.h, tokens, 0, first_key, 0, tokens.num_keys);
    uint32_t fetched = fetch_flags(first_key);
    ColumnBits live{};
    int stage = 1;
    clear(dq);
    // One tile early: while a tile is used, the next is loaded.
    int32_t tile = -1;
#pragma unroll 1
    do {
      if (tile >= 0) arrive();
      if (tile == 0) {
        load_left();
        __syncthreads();
      }
      const ColumnBits live_here = live;
      const int32_t key = first_key + (tile - slot_tiles) * kKeys;
      if (tile + 1 < slot_tiles) {
        load_slots(stage ^ 1, tile + 1);
      } else if (tile + 1 < num_tiles) {
        live = live_columns(fetched);
        k_loader.template load_live<kKeys>(key_tile(stage ^ 1), live.word);
        v_loader.template load_live<kKeys>(value_tile(stage ^ 1), live.word);
        fetched = fetch_flags(key + 2 * kKeys);
      }
      copy_commit();
      if (tile >= 0 && tile < slot_tiles) {
        add_slots(stage, tile);
      } else if (live_here.any()) {
        const bool all_count =
            live_here.all() && sight.all.has(key) && sight.all.has(key + kKeys - 1);
        if (p.drop_below != 0) {
          all_count ? add_tile<false, true>(stage, key, live_here)
                    : add_tile<true, true>(stage, key, live_here);
        } else {
          all_count ? add_tile<false, false>(stage, key, live_here)
                    : add_tile<true, false>(stage, key, live_here);
        }
      }
      stage ^= 1;
    } while (++tile < num_tiles);
  }

  __device__ __forceinline__ void load_left() {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      queries[s].load(query_tile(), first_row + s * kStripRows);
      douts[s].load(dout_tile(), first_row + s * kStripRows);
#pragma unroll
      for (int x = 0; x < 2; ++x) totals[s][x] = shared_totals()[row_of(s, x)];
    }
  }

  // All that was loaded is there, and no thread reads any more what it has read so far.
  static __device__ __forceinline__ void arrive() {
    copy_wait<0>();
    __syncthreads();
  }

  __device__ __forceinline__ int32_t slot_position(int32_t slot) const {
    return slot < p.G ? p.slot_position_BG[int64_t{block.b} * p.G + slot] : -1;
  }

  __device__ __forceinline__ void load_slots(int stage, int32_t tile) {
    const auto row_of = [&](int row) { return slot_position(tile * kSlotTile + row); };
    load_rows<T, D, kThreads, kSlotTile>(key_tile(stage), p.k, block.b, block.h, row_of);
    load_rows<T, D, kThreads, kSlotTile>(value_tile(stage), p.v, block.b, block.h, row_of);
  }

  __device__ __forceinline__ void add_slots(int stage, int32_t tile) {
    int32_t position[kPieceTiles][2];  // of the lane's columns
    bool any = false;
#pragma unroll
    for (int n = 0; n < kPieceTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        position[n][e] = slot_position(tile * kSlotTile + 8 * n + 2 * (lane_id() % 4) + e);
        any |= position[n][e] >= 0;
      }
    }
    if (!__any_sync(~0u, any)) return;
    WordBits counts[kStrips], kept[kStrips];
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      counts[s] = seen_slots(s, position);
      kept[s] = {{~0u, ~0u}};
      if (p.drop_below != 0) kept[s] = draw_slots(s, tile);
    }
    add_piece<true, true>(stage, 0, counts, kept);
  }

  __device__ __forceinline__ WordBits seen_slots(int strip,
                                                 const int32_t (&position)[kPieceTiles][2]) const {
    WordBits bits = {{0, 0}};
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int32_t step = block.first_step + row_of(strip, x);
      if (step < tokens.first_query || step >= tokens.end_query) continue;
      const int32_t query = tokens.position(step);
      Range seen = document_of(p, block.b, query);
      if (p.causal) seen.last = smaller(seen.last, query);
#pragma unroll
      for (int n = 0; n < kPieceTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (position[n][e] >= 0 && seen.has(position[n][e])) bits.word[x] |= 1u << (8 * n + e);
        }
      }
    }
    __syncwarp();  // rows have parted the lanes, products need them together
    return bits;
  }

  // Half of the warp draws for the 16 queries and one slot, half for the next.
  __device__ __forceinline__ WordBits draw_slots(int strip, int32_t tile) const {
    const int lane = lane_id();
    const uint64_t seed = static_cast<uint64_t>(p.dropout_seed_B[block.b]);
    const int32_t step = block.first_step + first_row + strip * kStripRows + lane % 16;
    const uint32_t query = static_cast<uint32_t>(tokens.position(step));
    WordBits bits = {{0, 0}};
#pragma unroll 1
    for (int pair = 0; pair < kSlotTile / 2; ++pair) {
      const int32_t key = slot_position(tile * kSlotTile + 2 * pair + lane / 16);
      const uint32_t byte = dropout_byte(seed, static_cast<uint32_t>(block.h), query,
                                         larger(key, 0), tokens.dilation);
      const uint32_t kept = __ballot_sync(~0u, byte >= static_cast<uint32_t>(p.drop_below));
      if (pair % 4 != lane % 4) continue;
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const uint32_t of_row = kept >> (lane / 4 + 8 * x);
        bits.word[x] |= ((of_row & 1) | (of_row >> 15 & 2)) << (pair / 4 * 8);
      }
    }
    __syncwarp();
    return bits;
  }

  template <bool kMasked, bool kDropout>
  __device__ __forceinline__ void add_tile(int stage, int32_t key, const ColumnBits& live) {
    WordBits counts[kStrips], kept[kStrips];
#pragma unroll 1
    for (int column = 0; column < kKeys; column += kPiece) {
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        if constexpr (kMasked) {
          const uint32_t word = column < kWarp ? live.word[0] : live.word[1];
          counts[s] = allowed_32(ranges_of_strip(windows(), first_row + s * kStripRows),
                                 word >> (column % kWarp), key + column);
        }
        if constexpr (kDropout) {
          if (column % kWarp == 0) {
            kept[s] = draw(s, key + column);
          } else {
            kept[s] = {{kept[s].word[0] >> kPiece, kept[s].word[1] >> kPiece}};
          }
        }
      }
      add_piece<kMasked, kDropout>(stage, column, counts, kept);
    }
  }

  __device__ __forceinline__ WordBits draw(int strip, int32_t key) const {
    const WindowDropout dropout = {static_cast<uint64_t>(p.dropout_seed_B[block.b]),
                                   static_cast<uint32_t>(block.h),
                                   static_cast<uint32_t>(p.drop_below), tokens};
    return dropout.draw_32(block.first_step + first_row + strip * kStripRows, key);
  }

  // kPiece keys of a tile, from its row `first` on.
  template <bool kMasked, bool kDropout>
  __device__ __forceinline__ void add_piece(int stage, int first, const WordBits (&counts)[kStrips],
                                            const WordBits (&kept)[kStrips]) {
    const TileTD keys = key_tile(stage), values = value_tile(stage);
    float weights[kStrips][kPieceTiles][4] = {}, gradients[kStrips][kPieceTiles][4] = {};
    multiply_rows(weights, queries, keys, first);
    multiply_rows(gradients, douts, values, first);
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
#pragma unroll
      for (int n = 0; n < kPieceTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const bool count = !kMasked || counts[s].has(n, e);
          const bool keep = !kDropout || kept[s].has(n, e);
          differentiate<kMasked, kDropout>(weights[s][n][e], gradients[s][n][e], factors,
                                           totals[s][e / 2], count, keep);
        }
      }
    }
    multiply_weights(dq, gradients, keys, first);
  }

  // Rows of padding and of global tokens are zeros. Which rows live is looked up again: to keep
  // that would take registers from the loop.
  __device__ __forceinline__ void write() {
    const ColumnBits live = live_rows(), all = all_rows();
    arrive();
    typename T::Storage* rows = head_of<T>(p.dq, block.b, block.h);
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const float factor[2] = {is_live(live, row_of(s, 0)) ? p.scale : 0.0f,
                               is_live(live, row_of(s, 1)) ? p.scale : 0.0f};
      const int first = first_row + s * kStripRows;
      store_rows<T, D>(dq[s], factor, query_tile(), first, [&](int row) -> typename T::Storage* {
        if (!is_live(all, first + row)) return nullptr;
        const int32_t n = tokens.position(block.first_step + first + row) - p.q_offset;
        return rows + n * p.dq.stride_N;
      });
    }
  }
};

template <class T, int D>
__global__ void __launch_bounds__(Shape<T, D>::kThreads, Shape<T, D>::kBlocks)
    backward_queries_kernel(const Problem p) {
  LONGPRETRAIN_SHARED(shared);
  run_block<WindowBackwardQueries<T, D>>(p, shared);
}

}  // namespace

void window_backward_queries(const Problem& problem, DType dtype, void* stream) {
  with_types(dtype, problem.D, [&](auto type, auto head_size) {
    using T = decltype(type);
    constexpr int D = decltype(head_size)::value;
    launch_window<Shape<T, D>>("backward_queries_kernel", backward_queries_kernel<T, D>, problem,
                               stream);
  });
}

}  // namespace longpretrain::cuda
