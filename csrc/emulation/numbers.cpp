// 16-bit numbers and the device's approximations, as cvt.rn, ex2.approx and lg2.approx define them.
#include <bit>
#include <cmath>
#include <limits>

#include "runtime.h"

namespace longpretrain::emulation {
namespace {

constexpr float kSmallestNormal = std::numeric_limits<float>::min();

}  // namespace

uint16_t bfloat16_bits(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t float16_bits(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return sign | 0x7c00;  // half a step above the largest
  if (magnitude < 0x1p-14f) {                       // subnormal: a count of 2**-24
    return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
  }
  const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded >> 13) - (112 << 10));
}

float exp2_approx(float x) {
  if (std::fabs(x) < kSmallestNormal) return 1.0f;
  const float y = std::exp2f(x);
  return y < kSmallestNormal ? 0.0f : y;
}

float log2_approx(float x) {
  return std::fabs(x) < kSmallestNormal ? -std::numeric_limits<float>::infinity() : std::log2f(x);
}

}  // namespace longpretrain::emulation
