// Small matrix products, C[m][n] = sum over k of A(m, k) * B[k][n], the only arithmetic that takes
// time. A is read one unit at a time and broadcast, so its strides are free; B and C have rows of
// vectors. A unit is a float, or two bfloat16 neighbours along k multiplied at once (vdpbf16ps).
#pragma once

#include "simd.h"

namespace longpretrain::LONGPRETRAIN_LEVEL {
namespace {

struct Float32 {
  using Unit = float;
  using Vector = Floats;
  static constexpr int kPerUnit = 1;
  LONGPRETRAIN_INLINE Vector load_units(const Unit* p) { return load(p); }
  LONGPRETRAIN_INLINE Vector broadcast(const Unit* p) { return all(*p); }
  LONGPRETRAIN_INLINE Floats add_product(Vector a, Vector b, Floats c) {
    return multiply_add(a, b, c);
  }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
  using Unit = uint32_t;
  using Vector = __m512i;
  static constexpr int kPerUnit = 2;
  LONGPRETRAIN_INLINE Vector load_units(const Unit* p) { return _mm512_loadu_si512(p); }
  LONGPRETRAIN_INLINE Vector broadcast(const Unit* p) {
    return _mm512_set1_epi32(static_cast<int32_t>(*p));
  }
  LONGPRETRAIN_INLINE Floats add_product(Vector a, Vector b, Floats c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// Rows and vectors of C that stay in registers.
#if defined(__AVX512F__)
constexpr int kRows = 8, kVectors = 2;  // 16 of 32 registers
#else
constexpr int kRows = 4, kVectors = 2;  // 8 of 16
#endif
constexpr int kRowMultiple = 8;  // of the rows of C and of the keys of a block, at every level

// Adds the product of kRows rows of A with kCols vectors of B's columns to c.
template <class Arithmetic, int kCols, int kRowStrideA, int kStepA, int kRowStrideB>
LONGPRETRAIN_INLINE void multiply(int num_steps, const typename Arithmetic::Unit* a,
                                  const typename Arithmetic::Unit* b, Floats (&c)[kRows][kCols]) {
  for (int k = 0; k < num_steps; ++k, a += kStepA, b += kRowStrideB) {
    typename Arithmetic::Vector row[kCols];
#pragma GCC unroll 16
    for (int n = 0; n < kCols; ++n) row[n] = Arithmetic::load_units(b + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const typename Arithmetic::Vector unit = Arithmetic::broadcast(a + m * kRowStrideA);
#pragma GCC unroll 16
      for (int n = 0; n < kCols; ++n) c[m][n] = Arithmetic::add_product(unit, row[n], c[m][n]);
    }
  }
}

template <int kCols>
LONGPRETRAIN_INLINE void clear(Floats (&c)[kRows][kCols]) {
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < kCols; ++n) c[m][n] = all(0.0f);
  }
}

// c = the products of kRows rows with kCols vectors of queries, which are transposed:
// [unit][query].
template <class Arithmetic, int kCols, int kUnits, int kQueries>
LONGPRETRAIN_INLINE void products(const typename Arithmetic::Unit* rows,
                                  const typename Arithmetic::Unit* queries,
                                  Floats (&c)[kRows][kCols]) {
  clear(c);
  multiply<Arithmetic, kCols, kUnits, 1, kQueries>(kUnits, rows, queries, c);
}

// C[0:num_rows][0:kColumns] += A * B; C's rows are kColumns long, num_rows a multiple of kRows.
template <class Arithmetic, int kColumns, int kRowStrideA, int kStepA>
__attribute__((noinline)) void add_matrix_product(int num_rows, int num_steps,
                                                  const typename Arithmetic::Unit* a,
                                                  const typename Arithmetic::Unit* b, float* c) {
  constexpr int kStep = kVectors * kLanes;
  static_assert(kColumns % kStep == 0);
  for (int column = 0; column < kColumns; column += kStep) {
    for (int row = 0; row < num_rows; row += kRows) {
      float* corner = c + row * kColumns + column;
      Floats sum[kRows][kVectors];
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
        for (int n = 0; n < kVectors; ++n) sum[m][n] = load(corner + m * kColumns + n * kLanes);
      }
      multiply<Arithmetic, kVectors, kRowStrideA, kStepA, kColumns>(
          num_steps, a + row * kRowStrideA, b + column, sum);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 16
        for (int n = 0; n < kVectors; ++n) store(corner + m * kColumns + n * kLanes, sum[m][n]);
      }
    }
  }
}

}  // namespace
}  // namespace longpretrain::LONGPRETRAIN_LEVEL
