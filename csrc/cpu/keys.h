// Keys and values of a head, copied together in the forms that the products want.
//
// Letters: see attention.h; Dp is D filled up with zeros.
#pragma once

#include <type_traits>

#include "gemm.h"
#include "numbers.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace longpretrain::LONGPRETRAIN_LEVEL {
namespace {

using cpu::kSixteen;
using cpu::Plan;
using cpu::Task;

constexpr int kKeyBlock = 64;  // keys scored at once, a multiple of kSixteen and kRowMultiple
constexpr int kRowTile = 16;   // global queries of a tile: usually there are few

LONGPRETRAIN_INLINE int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
LONGPRETRAIN_INLINE int32_t greater(int32_t a, int32_t b) { return a < b ? b : a; }

// Hands out a task's scratch. With a null start it only counts the bytes.
class Arena {
 public:
  explicit Arena(char* start)
      : next_(reinterpret_cast<uintptr_t>(start)), counts_(start == nullptr) {}
  template <class T>
  T* take(size_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    // One spare line, so that arrays of 4 KiB do not all start at the same address modulo 4 KiB.
    next_ += (count * sizeof(T) + 127) & ~size_t{63};
#if defined(__SANITIZE_ADDRESS__)
    // The spare line is nobody's, and what a task has not written is NaN.
    if (!counts_) {
      const size_t num_bytes = count * sizeof(T);
      char* bytes = reinterpret_cast<char*>(taken);
      __asan_unpoison_memory_region(bytes, num_bytes);
      std::memset(bytes, 0xff, num_bytes);
      const char* end = reinterpret_cast<char*>(next_);
      __asan_poison_memory_region(bytes + num_bytes, end - bytes - num_bytes);
    }
#endif
    return taken;
  }
  size_t num_bytes() const { return next_; }
  bool counts() const { return counts_; }

 private:
  uintptr_t next_;
  bool counts_;
};

// The tokens of one residue class, of the keys and values a task attends to.
struct KeyClass {
  const TensorBNHD* k;
  const TensorBNHD* v;
  int64_t b, h;
  int32_t residue, dilation, num_keys;

  int64_t position(int32_t step) const { return residue + int64_t{step} * dilation; }
  int32_t first_step_from(int32_t position) const {
    return position <= residue ? 0 : (position - residue + dilation - 1) / dilation;
  }
  int32_t last_step_to(int32_t position) const { return (position - residue) / dilation; }
};

KeyClass key_class(const AttentionParams& p, const TensorBNHD& k, const TensorBNHD& v,
                   const Task& task, int64_t residue) {
  const int64_t dilation = p.dilation_H[task.h];
  const int64_t num_keys = residue < p.M ? cpu::ceil_div(p.M - residue, dilation) : 0;
  return {&k, &v, task.b, task.h, static_cast<int32_t>(residue),
          // A dilation beyond the sequence leaves one token to a class, like any other such.
          static_cast<int32_t>(dilation < p.M ? dilation : p.M), static_cast<int32_t>(num_keys)};
}

// Rows of `size` bfloat16 numbers, two by two: pair i holds number i of both.
LONGPRETRAIN_INLINE void interleave(uint32_t* pairs, const uint32_t* first, const uint32_t* second,
                                    int size) {
  for (int i = 0; i < size / 2; ++i) {
    pairs[2 * i] = (first[i] & 0xffff) | (second[i] << 16);
    pairs[2 * i + 1] = (first[i] >> 16) | (second[i] & 0xffff0000);
  }
}

// Zeros without a source.
template <class Unit>
LONGPRETRAIN_INLINE void read_units(Unit* to, const char* from, DType dtype, int size, int padded) {
  if constexpr (std::is_same_v<Unit, float>) {
    if (from != nullptr) return read_row(to, from, dtype, size, padded);
    std::memset(to, 0, sizeof(float) * padded);
  } else {  // pairs of bfloat16: as they lie in memory
    const int given = from == nullptr ? 0 : size;
    copy_words(to, from, given / 2);
    for (int i = given / 2; i < padded / 2; ++i) to[i] = 0;
    if (given % 2 != 0) std::memcpy(to + given / 2, from + 2 * (given - 1), 2);
  }
}

LONGPRETRAIN_INLINE void prefetch_row(const TensorBNHD& x, const AttentionParams& p, int64_t b,
                                      int64_t n, int64_t h) {
  const char* row = row_of(x, p.dtype, b, n, h);
  const int64_t num_bytes = p.D * static_cast<int64_t>(size_of(p.dtype));
  for (int64_t byte = 0; byte < num_bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
}

// For writing.
LONGPRETRAIN_INLINE void claim_row(const TensorBNHD& x, const AttentionParams& p, int64_t b,
                                   int64_t n, int64_t h) {
  const char* row = row_of(x, p.dtype, b, n, h);
  const int64_t num_bytes = p.D * static_cast<int64_t>(size_of(p.dtype));
  for (int64_t byte = 0; byte < num_bytes; byte += 64) __builtin_prefetch(row + byte, 1, 2);
}

// Rows of a head lie too far apart for the processor to fetch them ahead by itself.
LONGPRETRAIN_INLINE void prefetch_keys(const AttentionParams& p, const KeyClass& keys,
                                       int32_t first, int32_t end) {
  for (int32_t step = first; step < smaller(end, keys.num_keys); ++step) {
    prefetch_row(*keys.k, p, keys.b, keys.position(step), keys.h);
    prefetch_row(*keys.v, p, keys.b, keys.position(step), keys.h);
  }
}

// Keys and values copied one after another, since rows of a head lie KiBs apart. The copies have
// the forms that the products want: `rows` for A, and for B `pairs` (for floats the same thing), in
// which two neighbouring keys are interleaved.
template <class Arithmetic, int Dp>
struct Keys {
  using Unit = typename Arithmetic::Unit;
  static constexpr int kPerUnit = Arithmetic::kPerUnit, kUnits = Dp / kPerUnit;

  Unit *k_rows, *k_pairs, *v_rows, *v_pairs;
  float *dk, *dv;     // null in the forward pass
  int32_t* number;    // of the key, which a query's bounds are about; -1: out of reach for all
  int32_t* num_dead;  // how many rows before this one are out of reach
  int32_t count = 0;

  Keys(Arena& arena, int64_t capacity, bool backward) {
    k_rows = arena.take<Unit>(capacity * kUnits);
    v_rows = arena.take<Unit>((kPerUnit == 1 || backward ? capacity : 2) * kUnits);
    k_pairs = kPerUnit == 1 || !backward ? k_rows : arena.take<Unit>(capacity * kUnits);
    v_pairs = kPerUnit == 1 || backward ? v_rows : arena.take<Unit>(capacity * kUnits);
    dk = backward ? arena.take<float>(capacity * Dp) : nullptr;
    dv = backward ? arena.take<float>(capacity * Dp) : nullptr;
    number = arena.take<int32_t>(capacity);
    num_dead = arena.take<int32_t>(capacity + 1);
  }

  void start() {
    count = 0;
    num_dead[0] = 0;
  }

  void append(const char* k, const char* v, DType dtype, int head_size, int32_t key_number) {
    const int64_t row = count++;
    const bool backward = dk != nullptr;
    const int64_t v_row = kPerUnit == 1 || backward ? row : row % 2;
    read_units(k_rows + row * kUnits, k, dtype, head_size, Dp);
    read_units(v_rows + v_row * kUnits, v, dtype, head_size, Dp);
    number[row] = key_number;
    num_dead[row + 1] = num_dead[row] + (key_number < 0);
    if (backward) {
      for (int d = 0; d < Dp; d += kLanes) {
        store(dk + row * Dp + d, all(0.0f));
        store(dv + row * Dp + d, all(0.0f));
      }
    }
    if constexpr (kPerUnit == 2) {
      if (row % 2 == 0) return;
      const Unit* rows = backward ? k_rows + (row - 1) * kUnits : v_rows;
      Unit* pairs = (backward ? k_pairs : v_pairs) + row / 2 * Dp;
      interleave(pairs, rows, rows + kUnits, Dp);
    }
  }

  void append_nothing(int32_t up_to) {
    while (count < up_to) append(nullptr, nullptr, DType::kFloat32, 0, -1);
  }

  static constexpr int32_t kAhead = 16;  // rows on their way while one is copied

  // Step by step of a class; a key that has one of these flags is out of reach.
  void append_steps(const Plan& plan, const KeyClass& keys, int32_t first, int32_t end,
                    uint8_t dead, bool number_is_position) {
    const AttentionParams& p = *plan.params;
    const uint8_t* flags_M = plan.flags_BM + keys.b * p.M;
    for (int32_t step = first; step < end; ++step) {
      prefetch_keys(p, keys, step + kAhead, step + kAhead + 1);
      if (step >= keys.num_keys) {
        append(nullptr, nullptr, p.dtype, 0, -1);
        continue;
      }
      const int64_t position = keys.position(step);
      if ((flags_M[position] & dead) != 0) {  // what stands there may be no number
        append(nullptr, nullptr, p.dtype, 0, -1);
        continue;
      }
      append(row_of(*keys.k, p.dtype, keys.b, position, keys.h),
             row_of(*keys.v, p.dtype, keys.b, position, keys.h), p.dtype, static_cast<int>(p.D),
             number_is_position ? static_cast<int32_t>(position) : step);
    }
  }

  bool all_dead(int32_t first, int32_t size) const {
    return num_dead[first + size] - num_dead[first] == size;
  }
  bool any_dead(int32_t first, int32_t size) const {
    return num_dead[first + size] != num_dead[first];
  }
};

}  // namespace
}  // namespace longpretrain::LONGPRETRAIN_LEVEL
