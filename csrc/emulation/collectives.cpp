// What the lanes of a warp do together: shuffles, votes, ldmatrix and mma.
#include <bit>
#include <cmath>
#include <cstring>

#include "block.h"

namespace longpretrain::emulation {
namespace {

// Rows of 8 numbers: what the fragments of mma and ldmatrix are made of. Lane 4 r + c holds the
// numbers 2 c and 2 c + 1 of row r, in one register of two 16-bit numbers or in two of one float.
constexpr int kSide = 8;
using Halves = uint16_t[kSide][kSide];
using Row = float __attribute__((vector_size(kSide * sizeof(float))));
using Bits = uint32_t __attribute__((vector_size(kSide * sizeof(uint32_t))));
using SignedBits = int32_t __attribute__((vector_size(kSide * sizeof(int32_t))));
using Matrix = Row[kSide];

void transpose(Halves& to, const Halves& from) {
  for (int i = 0; i < kSide; ++i) {
    for (int j = 0; j < kSide; ++j) to[i][j] = from[j][i];
  }
}

void shuffle_lanes(Warp& warp, uint32_t mask, int (*source_of)(int lane, uint32_t argument)) {
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    int source = source_of(lane, warp.in[1][lane]);
    if (source < 0) source = lane;
    if (!(mask >> source & 1)) this_block().fail("a shuffle reads a lane outside its mask");
    warp.out[0][lane] = warp.in[0][source];
  }
  ++this_block().counters.shuffles;
}

void shuffle_by_lane(Warp& warp, uint32_t mask) {
  shuffle_lanes(warp, mask, [](int, uint32_t lane) { return static_cast<int>(lane & 31); });
}
void shuffle_by_xor(Warp& warp, uint32_t mask) {
  shuffle_lanes(warp, mask, [](int lane, uint32_t bits) {
    return bits < kWarpSize ? lane ^ static_cast<int>(bits) : -1;
  });
}
void shuffle_down(Warp& warp, uint32_t mask) {
  shuffle_lanes(warp, mask, [](int lane, uint32_t delta) {
    return delta < static_cast<uint32_t>(kWarpSize - lane) ? lane + static_cast<int>(delta) : -1;
  });
}

void vote(Warp& warp, uint32_t mask) {
  uint32_t votes = 0;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    votes |= warp.in[0][lane] << lane;
  }
  // Only to these: another lane may not have fetched what it was given before.
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    warp.out[0][std::countr_zero(rest)] = votes;
  }
  ++this_block().counters.shuffles;
}

void hand_out_rows(Warp& warp, bool transposed) {
  Counters& counters = this_block().counters;
  ++counters.ldmatrix;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t offsets[kWarpSize] = {};
    Halves rows, columns;
    for (int row = 0; row < kSide; ++row) {
      const int lane = matrix * kSide + row;
      offsets[row] = warp.in[4][lane];
      uint32_t words[4];
      for (int i = 0; i < 4; ++i) words[i] = warp.in[i][lane];
      std::memcpy(rows[row], words, sizeof words);
    }
    transpose(columns, rows);
    std::memcpy(warp.out[matrix], transposed ? columns : rows, sizeof rows);
    counters.ldmatrix_conflicts += extra_turns(offsets, 0xff, 16);
  }
}
void hand_out_rows(Warp& warp, uint32_t) { hand_out_rows(warp, false); }
void hand_out_columns(Warp& warp, uint32_t) { hand_out_rows(warp, true); }

template <bool kBFloat16>
void read_row(Row& to, const uint16_t (&row)[kSide]) {
  Bits bits;
  for (int i = 0; i < kSide; ++i) bits[i] = row[i];
  if (kBFloat16) {
    to = __builtin_bit_cast(Row, bits << 16);
    return;
  }
  const Bits magnitude = bits & 0x7fff, sign = (bits & 0x8000) << 16;
  const Row subnormal =
      __builtin_convertvector(__builtin_bit_cast(SignedBits, magnitude), Row) * 0x1p-24f;
  const Bits normal = (magnitude << 13) + (112u << 23);  // from one bias to the other
  const Bits special = (magnitude << 13) | 0x7f800000;   // infinity and NaN
  const Bits wide = magnitude < 0x400    ? __builtin_bit_cast(Bits, subnormal)
                    : magnitude < 0x7c00 ? normal
                                         : special;
  to = __builtin_bit_cast(Row, wide | sign);
}

template <bool kBFloat16>
void read_matrix(Matrix& to, const uint32_t (&from)[kWarpSize]) {
  Halves halves;
  std::memcpy(halves, from, sizeof halves);
  for (int i = 0; i < kSide; ++i) read_row<kBFloat16>(to[i], halves[i]);
}

// Registers: a[row half + 2 * column half], b[row half], d[2 * row half + column parity].
template <bool kBFloat16>
void multiply(Warp& warp, uint32_t) {
  ++this_block().counters.mma;
  Matrix b[2];
  for (int half = 0; half < 2; ++half) {
    Halves columns, rows;
    std::memcpy(columns, warp.in[4 + half], sizeof columns);
    transpose(rows, columns);
    for (int k = 0; k < kSide; ++k) read_row<kBFloat16>(b[half][k], rows[k]);
  }
  for (int half = 0; half < 2; ++half) {
    Matrix a[2];
    read_matrix<kBFloat16>(a[0], warp.in[half]);
    read_matrix<kBFloat16>(a[1], warp.in[half + 2]);
    uint32_t (&even)[kWarpSize] = warp.in[6 + 2 * half], (&odd)[kWarpSize] = warp.in[7 + 2 * half];
    for (int row = 0; row < kSide; ++row) {
      Bits d;
      for (int n = 0; n < kSide; ++n) d[n] = (n % 2 == 0 ? even : odd)[(kSide * row + n) / 2];
      Row sums = __builtin_bit_cast(Row, d);
      for (int k = 0; k < kSide; ++k) sums += a[0][row][k] * b[0][k];
      for (int k = 0; k < kSide; ++k) sums += a[1][row][k] * b[1][k];
      d = __builtin_bit_cast(Bits, sums);
      for (int n = 0; n < kSide; ++n) warp.out[2 * half + n % 2][(kSide * row + n) / 2] = d[n];
    }
  }
}

constexpr uint32_t kWholeWarp = ~0u;

}  // namespace

const char* name_of(Op op) {
  switch (op) {
    case Op::kSyncWarp:
      return "__syncwarp";
    case Op::kShuffle:
      return "__shfl_sync";
    case Op::kShuffleXor:
      return "__shfl_xor_sync";
    case Op::kShuffleDown:
      return "__shfl_down_sync";
    case Op::kBallot:
      return "a vote";
    case Op::kMmaBFloat16:
      return "mma of bfloat16";
    case Op::kMmaFloat16:
      return "mma of float16";
    case Op::kLdmatrix:
      return "ldmatrix";
    case Op::kLdmatrixTransposed:
      return "ldmatrix.trans";
  }
  return "?";
}

void sync_warp(uint32_t mask, Where where) {
  this_block().meet(this_lane(), Op::kSyncWarp, mask, where,
                    [](Warp&, uint32_t) { ++this_block().counters.warp_barriers; });
}

uint32_t shuffle(Shuffle kind, uint32_t mask, uint32_t value, uint32_t argument, Where where) {
  Lane& lane = this_lane();
  Warp& warp = *lane.warp;
  warp.in[0][lane.lane] = value;
  warp.in[1][lane.lane] = argument;
  switch (kind) {
    case Shuffle::kLane:
      this_block().meet(lane, Op::kShuffle, mask, where, shuffle_by_lane);
      break;
    case Shuffle::kXor:
      this_block().meet(lane, Op::kShuffleXor, mask, where, shuffle_by_xor);
      break;
    case Shuffle::kDown:
      this_block().meet(lane, Op::kShuffleDown, mask, where, shuffle_down);
      break;
  }
  return warp.out[0][lane.lane];
}

uint32_t ballot(uint32_t mask, bool predicate, Where where) {
  Lane& lane = this_lane();
  lane.warp->in[0][lane.lane] = predicate;
  this_block().meet(lane, Op::kBallot, mask, where, vote);
  return lane.warp->out[0][lane.lane];
}

void exchange_rows(uint32_t (&fragment)[4], const uint32_t (&loaded)[4], const void* row,
                   bool transposed, Where where) {
  Block& block = this_block();
  Lane& lane = this_lane();
  Warp& warp = *lane.warp;
  for (int i = 0; i < 4; ++i) warp.in[i][lane.lane] = loaded[i];
  warp.in[4][lane.lane] = block.shared.offset(row);
  if (transposed) {
    block.meet(lane, Op::kLdmatrixTransposed, kWholeWarp, where, hand_out_columns);
  } else {
    block.meet(lane, Op::kLdmatrix, kWholeWarp, where, hand_out_rows);
  }
  for (int i = 0; i < 4; ++i) fragment[i] = warp.out[i][lane.lane];
}

void mma_m16n8k16(bool bfloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  Where where) {
  Lane& lane = this_lane();
  Warp& warp = *lane.warp;
  for (int i = 0; i < 4; ++i) warp.in[i][lane.lane] = a[i];
  warp.in[4][lane.lane] = b0;
  warp.in[5][lane.lane] = b1;
  for (int i = 0; i < 4; ++i) warp.in[6 + i][lane.lane] = std::bit_cast<uint32_t>(d[i]);
  if (bfloat16) {
    this_block().meet(lane, Op::kMmaBFloat16, kWholeWarp, where, multiply<true>);
  } else {
    this_block().meet(lane, Op::kMmaFloat16, kWholeWarp, where, multiply<false>);
  }
  for (int i = 0; i < 4; ++i) d[i] = std::bit_cast<float>(warp.out[i][lane.lane]);
}

}  // namespace longpretrain::emulation
