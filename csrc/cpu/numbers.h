// Numbers of 16 bits, and rows of them.
#pragma once

#include "plan.h"
#include "simd.h"

namespace longpretrain::LONGPRETRAIN_LEVEL {
namespace {

LONGPRETRAIN_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
LONGPRETRAIN_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

LONGPRETRAIN_INLINE float from_bfloat16(uint16_t x) { return from_bits(uint32_t{x} << 16); }

// To the nearest, ties to even; NaN stays NaN.
LONGPRETRAIN_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

LONGPRETRAIN_INLINE float from_float16(uint16_t x) {
  const uint32_t sign = uint32_t{x & 0x8000u} << 16, magnitude = x & 0x7fffu;
  // Subnormals are multiples of 2**-24. Nothing here is a subnormal float, which some threads may
  // be told to take for 0.
  const uint32_t small = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t normal = (magnitude << 13) + (112u << 23);  // from one bias to the other
  const uint32_t special = 0x7f800000 | (magnitude << 13);   // inf and NaN
  return from_bits(sign | (magnitude < 0x400 ? small : magnitude < 0x7c00 ? normal : special));
}

// To the nearest, ties to even; too large becomes inf.
LONGPRETRAIN_INLINE uint16_t to_float16(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  // Below 2**-14 adding 0.5 rounds to a multiple of 2**-24: what subnormals of float16 are.
  const uint32_t small = bits_of(from_bits(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t half = magnitude >= 0x47800000 ? large : magnitude < 0x38800000 ? small : normal;
  return static_cast<uint16_t>(sign | half);
}

LONGPRETRAIN_INLINE size_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Row n of a head.
LONGPRETRAIN_INLINE char* row_of(const TensorBNHD& x, DType dtype, int64_t b, int64_t n,
                                 int64_t h) {
  const int64_t offset = b * x.stride_B + n * x.stride_N + h * x.stride_H;
  return static_cast<char*>(x.data) + offset * static_cast<int64_t>(size_of(dtype));
}

// Of a few hundred bytes, for which a call of memcpy takes longer than the copy.
LONGPRETRAIN_INLINE void copy_words(void* to, const void* from, int count) {
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Floats words;  // whatever the words stand for
    std::memcpy(&words, source + 4 * i, sizeof words);
    std::memcpy(target + 4 * i, &words, sizeof words);
  }
  for (; i < count; ++i) std::memcpy(target + 4 * i, source + 4 * i, 4);
}

LONGPRETRAIN_CALLED void read_halves(float* to, const void* from, bool bfloat16, int size) {
  const uint16_t* halves = static_cast<const uint16_t*>(from);
  if (bfloat16) {
    for (int i = 0; i < size; ++i) to[i] = from_bfloat16(halves[i]);
  } else {
    for (int i = 0; i < size; ++i) to[i] = from_float16(halves[i]);
  }
}

// `size` numbers become floats, followed by zeros up to `padded` numbers.
LONGPRETRAIN_INLINE void read_row(float* to, const void* from, DType dtype, int size, int padded) {
  if (dtype == DType::kFloat32) {
    copy_words(to, from, size);
  } else {
    read_halves(to, from, dtype == DType::kBFloat16, size);
  }
  for (int i = size; i < padded; ++i) to[i] = 0.0f;
}

// Floats, each times `factor`, become `size` numbers.
LONGPRETRAIN_CALLED void write_row(void* to, const float* from, float factor, DType dtype,
                                   int size) {
  uint16_t* halves = static_cast<uint16_t*>(to);
  if (dtype == DType::kFloat32) {
    float* floats = static_cast<float*>(to);
    for (int i = 0; i < size; ++i) floats[i] = from[i] * factor;
  } else if (dtype == DType::kBFloat16) {
    for (int i = 0; i < size; ++i) halves[i] = to_bfloat16(from[i] * factor);
  } else {
    for (int i = 0; i < size; ++i) halves[i] = to_float16(from[i] * factor);
  }
}

LONGPRETRAIN_INLINE void write_zeros(void* to, DType dtype, int size) {
  std::memset(to, 0, size_of(dtype) * size);
}

}  // namespace
}  // namespace longpretrain::LONGPRETRAIN_LEVEL
