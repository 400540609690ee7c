// Rows of tokens in shared memory: how they lie there, and how they come from and go to the
// tensors.
//
// Letters: see ../attention.h.
#pragma once

#include "problem.h"

namespace longpretrain::cuda {

constexpr int kWarp = 32;

// Blocks are one-dimensional. (Unsigned arithmetic: the compiler does not know that no thread has a
// negative number.)
__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % uint32_t{kWarp}); }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x / uint32_t{kWarp}); }
// The same for loops that have no register to keep what follows from it.
__device__ __forceinline__ uint32_t fresh_lane_id() {
  return fresh(static_cast<uint32_t>(lane_id()));
}

// Rows of D numbers in pieces of 16 bytes. Pieces are swapped within 128 bytes by the row's number,
// so that eight rows' pieces of one column, as well as neighbouring pieces of a row, lie in all 32
// banks: no access in this directory meets a bank conflict.
template <class T, int D>
struct Tile {
  static constexpr int kRowBytes = D * static_cast<int>(sizeof(typename T::Storage));
  static constexpr int kPieces = kRowBytes / 16;
  static constexpr int bytes(int num_rows) { return num_rows * kRowBytes; }

  char* base;

  __device__ __forceinline__ char* at(int row, int piece) const {
    if constexpr (kPieces >= 8) {
      return base + row * kRowBytes + (piece & ~7) * 16 + ((piece ^ row) & 7) * 16;
    } else {  // two rows in 128 bytes
      static_assert(kPieces == 4);
      return base + row * kRowBytes + ((piece ^ (row >> 1)) & 3) * 16;
    }
  }
  __device__ __forceinline__ Tile from_row(int row) const { return {base + row * kRowBytes}; }
};

// Loads tile after tile of a class's tokens, in order. All kThreads of a block take part; what they
// copy has arrived after copy_wait and a barrier. Little is kept between two tiles, since registers
// are scarce in the loops about: b, h and the class are looked up again, wherever they lie.
template <class T, int D, int kThreads>
class StepLoader {
 public:
  using TileTD = Tile<T, D>;
  static constexpr int kPieces = TileTD::kPieces, kRowsAtOnce = kThreads / kPieces;

  // Row 0 of the first tile is `first_step`; tokens outside of [begin, end) are rows of zeros. The
  // tensor's row 0 sits at the position `offset`.
  __device__ __forceinline__ StepLoader(const TensorBNHD& x, const int32_t& b, const int32_t& h,
                                        const ResidueClass& tokens, int32_t offset,
                                        int32_t first_step, int32_t begin, int32_t end)
      : x_(x),
        b_(b),
        h_(h),
        tokens_(tokens),
        offset_(offset),
        step_(first_step),
        begin_(begin),
        end_(end) {}

  template <int kRows>
  __device__ __forceinline__ void load(const TileTD& tile) {
    load_where<kRows>(tile, [&](int row, int i) {
      const int32_t step = step_ + row + i;
      return step >= begin_ && step < end_;
    });
  }

  // Rows without a bit become zeros too: what stands there may be no number, and 0 times that is
  // none either. No token outside of [begin, end) may have one.
  template <int kRows, int kWords>
  __device__ __forceinline__ void load_live(const TileTD& tile, const uint32_t (&live)[kWords]) {
    static_assert(kRows <= 32 * kWords && 32 % kRowsAtOnce == 0);
    load_where<kRows>(tile,
                      [&](int row, int i) { return (live[i / 32] >> row >> (i % 32) & 1) != 0; });
  }

 private:
  template <int kRows, class Valid>
  __device__ __forceinline__ void load_where(const TileTD& tile, Valid valid) {
    static_assert(kRows % kRowsAtOnce == 0);
    const uint32_t thread = fresh(uint32_t{threadIdx.x});
    const int row = static_cast<int>(thread / kPieces), piece = static_cast<int>(thread % kPieces);
    const int64_t n = tokens_.residue - offset_ + int64_t{step_ + row} * tokens_.dilation;
    const char* from =
        reinterpret_cast<const char*>(head_of<T>(x_, b_, h_) + n * x_.stride_N) + piece * 16;
    // From one of the thread's rows to the next.
    const int64_t num_bytes = int64_t{tokens_.dilation} * x_.stride_N *
                              (kRowsAtOnce * static_cast<int>(sizeof(typename T::Storage)));
#pragma unroll
    for (int i = 0; i < kRows; i += kRowsAtOnce) {
      copy_async_16(tile.at(row + i, piece), from, valid(row, i));
      from += num_bytes;
    }
    step_ += kRows;
  }

  const TensorBNHD& x_;
  const int32_t &b_, &h_;
  const ResidueClass& tokens_;
  int32_t offset_;
  int32_t step_;  // of row 0 of the next tile
  int32_t begin_, end_;
};

// Loads kRows rows of which row i is row row_of(i) of a tensor's head; below 0: a row of zeros.
template <class T, int D, int kThreads, int kRows, class RowOf>
__device__ __forceinline__ void load_rows(const Tile<T, D>& tile, const TensorBNHD& x, int32_t b,
                                          int32_t h, RowOf row_of) {
  constexpr int kPieces = Tile<T, D>::kPieces, kTotal = kRows * kPieces;
  // The compiler does not know that threadIdx.x is below kThreads, but how often this goes round.
#pragma unroll
  for (int done = 0; done < kTotal; done += kThreads) {
    const int i = done + static_cast<int>(threadIdx.x);
    if (kTotal % kThreads != 0 && i >= kTotal) break;
    const int row = i / kPieces, piece = i % kPieces;
    const int64_t n = row_of(row);
    const typename T::Storage* from = head_of<T>(x, b, h) + (n < 0 ? 0 : n) * x.stride_N;
    copy_async_16(tile.at(row, piece), reinterpret_cast<const char*>(from) + piece * 16, n >= 0);
  }
}

}  // namespace longpretrain::cuda
