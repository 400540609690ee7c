// Numbers of the call's dtypes as the sanitizers' programs draw them and look at them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../attention.h"

namespace longpretrain {
namespace {

constexpr DType kFloat32 = DType::kFloat32, kBFloat16 = DType::kBFloat16,
                kFloat16 = DType::kFloat16;

inline size_t size_of(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

// Byte i of memory that nobody has written: a NaN in any dtype, and no operation's result. Of
// little-endian machines, as all here.
inline char untouched(size_t i) { return i % 2 == 0 ? '\xa5' : '\x7f'; }

inline bool is_untouched(const char* bytes, size_t num_bytes) {
  bool same = true;
  for (size_t i = 0; i < num_bytes; ++i) same = same && bytes[i] == untouched(i);
  return same;
}
inline void leave_untouched(char* bytes, size_t num_bytes) {
  for (size_t i = 0; i < num_bytes; ++i) bytes[i] = untouched(i);
}

inline bool is_nan(const char* number, DType dtype) {
  if (dtype == kFloat32) {
    float value;
    std::memcpy(&value, number, sizeof value);
    return value != value;
  }
  uint16_t bits;
  std::memcpy(&bits, number, sizeof bits);
  return (bits & 0x7fff) > (dtype == kBFloat16 ? 0x7f80 : 0x7c00);
}

// Sign, one of four exponents and seven bits of mantissa: exact in every dtype, never 0.
inline void put_random(char* number, DType dtype, uint32_t drawn, int exponent) {
  const uint32_t sign = drawn >> 31, mantissa = drawn & 127;
  const uint32_t power = static_cast<uint32_t>(exponent + 12) + (drawn >> 7) % 4;  // of float16
  const uint32_t wide = sign << 31 | (power + 112) << 23 | mantissa << 16;
  const uint32_t half = sign << 15 | power << 10 | mantissa << 3;
  const uint32_t bits = dtype == kFloat32 ? wide : dtype == kBFloat16 ? wide >> 16 : half;
  std::memcpy(number, &bits, size_of(dtype));
}

}  // namespace
}  // namespace longpretrain
