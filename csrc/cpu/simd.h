// One vector of floats of the instruction set this file is compiled for, and what can be done to
// it.
//
// A lane is a query: softmax runs over keys, so no kernel ever combines lanes. The plain version is
// C++ with the vector types that GCC and Clang have on every processor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef LONGPRETRAIN_LEVEL
#error "LONGPRETRAIN_LEVEL names the instruction set: see CMakeLists.txt"
#endif

#define LONGPRETRAIN_INLINE static inline __attribute__((always_inline))
// For what is called in many places and takes longer than a call: it halves the time to compile.
#define LONGPRETRAIN_CALLED [[maybe_unused]] static __attribute__((noinline))

namespace longpretrain::LONGPRETRAIN_LEVEL {
namespace {  // compiled once per level: nothing here may be shared between them

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using Floats = __m512;
using Ints = __m512i;
using Mask = __mmask16;
struct StoredMask {
  uint16_t bits;
};

LONGPRETRAIN_INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
LONGPRETRAIN_INLINE void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
LONGPRETRAIN_INLINE Floats all(float x) { return _mm512_set1_ps(x); }
LONGPRETRAIN_INLINE Ints load(const int32_t* p) { return _mm512_loadu_si512(p); }
LONGPRETRAIN_INLINE Ints all(int32_t x) { return _mm512_set1_epi32(x); }
LONGPRETRAIN_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return _mm512_fmadd_ps(a, b, c);
}
// NaN in x stays NaN.
LONGPRETRAIN_INLINE Floats larger(Floats a, Floats x) { return _mm512_max_ps(a, x); }
LONGPRETRAIN_INLINE Floats lesser(Floats a, Floats x) { return _mm512_min_ps(a, x); }
LONGPRETRAIN_INLINE Mask within(Ints x, Ints low, Ints high) {
  return _mm512_mask_cmple_epi32_mask(_mm512_cmpge_epi32_mask(x, low), x, high);
}
LONGPRETRAIN_INLINE Floats keep_where(Mask mask, Floats x) { return _mm512_maskz_mov_ps(mask, x); }
LONGPRETRAIN_INLINE Floats select(Mask mask, Floats yes, Floats no) {
  return _mm512_mask_blend_ps(mask, no, yes);
}
LONGPRETRAIN_INLINE void put(StoredMask* p, Mask mask) { p->bits = mask; }
LONGPRETRAIN_INLINE Mask get(const StoredMask* p) { return p->bits; }

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using Floats = __m256;
using Ints = __m256i;
using Mask = __m256;  // a lane is all ones or all zeros
struct StoredMask {
  int32_t lanes[8];
};

LONGPRETRAIN_INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
LONGPRETRAIN_INLINE void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
LONGPRETRAIN_INLINE Floats all(float x) { return _mm256_set1_ps(x); }
LONGPRETRAIN_INLINE Ints load(const int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
LONGPRETRAIN_INLINE Ints all(int32_t x) { return _mm256_set1_epi32(x); }
LONGPRETRAIN_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return _mm256_fmadd_ps(a, b, c);
}
// NaN in x stays NaN.
LONGPRETRAIN_INLINE Floats larger(Floats a, Floats x) { return _mm256_max_ps(a, x); }
LONGPRETRAIN_INLINE Floats lesser(Floats a, Floats x) { return _mm256_min_ps(a, x); }
LONGPRETRAIN_INLINE Mask within(Ints x, Ints low, Ints high) {
  const Ints outside = _mm256_or_si256(_mm256_cmpgt_epi32(low, x), _mm256_cmpgt_epi32(x, high));
  return _mm256_castsi256_ps(_mm256_xor_si256(outside, _mm256_set1_epi32(-1)));
}
LONGPRETRAIN_INLINE Floats keep_where(Mask mask, Floats x) { return _mm256_and_ps(mask, x); }
LONGPRETRAIN_INLINE Floats select(Mask mask, Floats yes, Floats no) {
  return _mm256_blendv_ps(no, yes, mask);
}
LONGPRETRAIN_INLINE void put(StoredMask* p, Mask mask) {
  _mm256_storeu_ps(reinterpret_cast<float*>(p->lanes), mask);
}
LONGPRETRAIN_INLINE Mask get(const StoredMask* p) {
  return _mm256_loadu_ps(reinterpret_cast<const float*>(p->lanes));
}

#else

constexpr int kLanes = 4;
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
using Mask = Ints;  // a lane is -1 or 0
struct StoredMask {
  int32_t lanes[4];
};

LONGPRETRAIN_INLINE Floats load(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
LONGPRETRAIN_INLINE void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }
LONGPRETRAIN_INLINE Floats all(float x) { return Floats{x, x, x, x}; }
LONGPRETRAIN_INLINE Ints load(const int32_t* p) {
  Ints x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
LONGPRETRAIN_INLINE Ints all(int32_t x) { return Ints{x, x, x, x}; }
LONGPRETRAIN_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
LONGPRETRAIN_INLINE Floats select(Mask mask, Floats yes, Floats no) {
  Ints y, n;
  std::memcpy(&y, &yes, sizeof y);
  std::memcpy(&n, &no, sizeof n);
  const Ints bits = (y & mask) | (n & ~mask);
  Floats x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
// NaN in x stays NaN.
LONGPRETRAIN_INLINE Floats larger(Floats a, Floats x) { return select(a > x, a, x); }
LONGPRETRAIN_INLINE Floats lesser(Floats a, Floats x) { return select(a < x, a, x); }
LONGPRETRAIN_INLINE Mask within(Ints x, Ints low, Ints high) { return (x >= low) & (x <= high); }
LONGPRETRAIN_INLINE Floats keep_where(Mask mask, Floats x) { return select(mask, x, all(0.0f)); }
LONGPRETRAIN_INLINE void put(StoredMask* p, Mask mask) {
  std::memcpy(p->lanes, &mask, sizeof mask);
}
LONGPRETRAIN_INLINE Mask get(const StoredMask* p) { return load(p->lanes); }

#endif

// 2**part for a part of 0 to 1: the best polynomial of its degree that is exact at 0, off by less
// than 2e-7 of the result.
LONGPRETRAIN_INLINE Floats exp2_of_part(Floats part) {
  Floats y = all(1.86713017e-3f);
  y = multiply_add(y, part, all(9.01702978e-3f));
  y = multiply_add(y, part, all(5.57999127e-2f));
  y = multiply_add(y, part, all(2.40164444e-1f));
  y = multiply_add(y, part, all(6.93151295e-1f));
  y = multiply_add(y, part, all(1.0f));
  return y;
}

// 2**x, off by less than 3e-7 of it; 0 far below (AVX-512: -150, else -127) and for -inf. Far above
// it is +inf (AVX-512, from 128 on), or more than 1e37 (from 125 on).
#if defined(__AVX512F__)
LONGPRETRAIN_INLINE Floats exp2(Floats x) {
  // x minus the next whole number below, and 0 for infinities.
  const Floats part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp2_of_part(part), x);  // times 2 to the next whole number below x
}
#elif defined(__AVX2__)
LONGPRETRAIN_INLINE Floats exp2(Floats x) {
  x = _mm256_min_ps(all(125.0f), larger(all(-127.0f), x));
  // Adding 1.5 * 2**23 rounds to a whole number, which is then found in the lowest bits: here to
  // one that is at most 1 below x.
  const Floats shift = all(12582912.0f + 127.0f);
  const Floats shifted = _mm256_add_ps(_mm256_sub_ps(x, all(0.5f)), shift);
  const Floats part = _mm256_sub_ps(x, _mm256_sub_ps(shifted, shift));
  const Ints power = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  return _mm256_mul_ps(exp2_of_part(part), _mm256_castsi256_ps(power));
}
#else
LONGPRETRAIN_INLINE Floats exp2(Floats x) {
  x = select(x > all(125.0f), all(125.0f), larger(all(-127.0f), x));
  // Adding 1.5 * 2**23 rounds to a whole number, which is then found in the lowest bits: here to
  // one that is at most 1 below x.
  const Floats shift = all(12582912.0f + 127.0f);
  const Floats shifted = (x - all(0.5f)) + shift;
  const Floats part = x - (shifted - shift);
  uint32_t bits[4];
  std::memcpy(bits, &shifted, sizeof bits);
  for (uint32_t& lane : bits) lane <<= 23;
  Floats power;
  std::memcpy(&power, bits, sizeof power);
  return exp2_of_part(part) * power;
}
#endif

// Sum of x[i] * y[i], in an order that does not depend on n's remainder: n is a multiple of 16.
LONGPRETRAIN_INLINE float dot(const float* x, const float* y, int n) {
  Floats sum = all(0.0f);
  for (int i = 0; i < n; i += kLanes) sum = multiply_add(load(x + i), load(y + i), sum);
  float lanes[kLanes];
  store(lanes, sum);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

}  // namespace
}  // namespace longpretrain::LONGPRETRAIN_LEVEL
