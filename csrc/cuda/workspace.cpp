#include "workspace.h"

#include <algorithm>

namespace longpretrain::cuda {
namespace {

constexpr int64_t kManyBlocks = 512;   // about four for each multiprocessor of an A100 or H100
constexpr int64_t kFewBlocks = 128;    // about one
constexpr int64_t kSmallestChunk = 2;  // tiles: less work than that is not worth a block

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Chunks cut(int64_t num_tokens, int64_t num_chunks) {
  const int64_t num_tiles = ceil_div(num_tokens, kTokenTile);
  const int64_t most = ceil_div(num_tiles, kSmallestChunk);
  const int64_t tiles = ceil_div(num_tiles, std::clamp<int64_t>(num_chunks, 1, most));
  return {static_cast<int32_t>(tiles * kTokenTile),
          static_cast<int32_t>(ceil_div(num_tiles, tiles))};
}

// Takes pieces off a region one after the other.
class Pieces {
 public:
  explicit Pieces(void* memory) : start_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    constexpr size_t kAlignment = 256;
    const size_t offset = num_bytes_;
    num_bytes_ +=
        (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return start_ == nullptr ? nullptr : reinterpret_cast<T*>(start_ + offset);
  }
  size_t num_bytes() const { return num_bytes_; }

 private:
  char* start_;
  size_t num_bytes_ = 0;
};

int64_t num_partials(const AttentionParams& params, bool backward) {
  const int64_t M = params.M, N = params.N, H = params.H, D = params.D, G = params.G;
  const int64_t slots = params.B * H * G;
  if (!backward) return slots * chunks_of_global_rows(M, H, G).count * (D + 2);
  // Summed up at once, so that the second kind can follow in the same place.
  const int64_t rows = slots * chunks_of_global_rows_backward(M, H, G).count * D;
  const int64_t columns = slots * chunks_of_global_columns(N, H, G).count * 2 * D;
  return std::max(rows, columns);
}

}  // namespace

Chunks chunks_of_global_rows(int64_t M, int64_t H, int64_t G) {
  return cut(M, ceil_div(kManyBlocks, H * ceil_div(G, kSlotTile)));
}

Chunks chunks_of_global_rows_backward(int64_t M, int64_t H, int64_t G) {
  // A block goes through all slots.
  return cut(M,
             std::max(ceil_div(kManyBlocks, H * ceil_div(G, kSlotTile)), ceil_div(kFewBlocks, H)));
}

Chunks chunks_of_global_columns(int64_t N, int64_t H, int64_t G) {
  return cut(N, ceil_div(kManyBlocks, H * ceil_div(G, kSlotTile)));
}

Workspace lay_out(const AttentionParams& params, bool backward, void* memory) {
  Pieces pieces(memory);
  Workspace found;
  const int64_t num_tokens = params.B * params.M;
  found.flags_BM = pieces.take<uint8_t>(num_tokens);
  if (params.document_BM != nullptr) {
    found.document_begin_BM = pieces.take<int32_t>(num_tokens);
    found.document_end_BM = pieces.take<int32_t>(num_tokens);
  }
  if (backward) found.delta_BNH = pieces.take<float>(params.B * params.N * params.H);
  if (params.G > 0) {
    found.slot_position_BG = pieces.take<int32_t>(params.B * params.G);
    found.partials = pieces.take<float>(num_partials(params, backward));
  }
  found.num_bytes = pieces.num_bytes();
  return found;
}

}  // namespace longpretrain::cuda
