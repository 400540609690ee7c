// The random bits of dropout: Philox4x32-10 (Salmon et al., 2011), one lane a query, equal to
// longpretrain/attention/philox.py.
#pragma once

#include "simd.h"

namespace longpretrain::LONGPRETRAIN_LEVEL {
namespace {

constexpr uint32_t kGlobalRow = 1u << 16;  // added to the head number in the row of a global query
constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kKeyStep0 = 0x9E3779B9, kKeyStep1 = 0xBB67AE85;

// What names sixteen keys of one query, but for the query itself.
struct Counter {
  uint32_t head, residue, sixteen;
  uint64_t seed;
};

// The four words drawn for each of kLanes queries.
#if defined(__AVX512F__) || defined(__AVX2__)

#if defined(__AVX512F__)
LONGPRETRAIN_INLINE Ints times(Ints a, Ints b) { return _mm512_mul_epu32(a, b); }
LONGPRETRAIN_INLINE Ints upper(Ints x) { return _mm512_srli_epi64(x, 32); }
LONGPRETRAIN_INLINE Ints mixed(Ints a, Ints b, Ints c) {
  return _mm512_ternarylogic_epi64(a, b, c, 0x96);  // a ^ b ^ c
}
LONGPRETRAIN_INLINE Ints join(Ints even, Ints odd) {
  return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}
#else
LONGPRETRAIN_INLINE Ints times(Ints a, Ints b) { return _mm256_mul_epu32(a, b); }
LONGPRETRAIN_INLINE Ints upper(Ints x) { return _mm256_srli_epi64(x, 32); }
LONGPRETRAIN_INLINE Ints mixed(Ints a, Ints b, Ints c) {
  return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}
LONGPRETRAIN_INLINE Ints join(Ints even, Ints odd) {
  return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
#endif

LONGPRETRAIN_CALLED void draw(Ints words[4], Ints query, const Counter& counter) {
  // Products have 64 bits, so even and odd lanes take turns. Only the lower half of a 64-bit lane
  // is ever multiplied: what stands in the upper one does not matter.
  Ints c[2][4];
  for (int odd = 0; odd < 2; ++odd) {
    c[odd][0] = all(static_cast<int32_t>(counter.head));
    c[odd][1] = odd ? upper(query) : query;
    c[odd][2] = all(static_cast<int32_t>(counter.residue));
    c[odd][3] = all(static_cast<int32_t>(counter.sixteen));
  }
  uint32_t key0 = static_cast<uint32_t>(counter.seed);
  uint32_t key1 = static_cast<uint32_t>(counter.seed >> 32);
  const Ints multiplier0 = all(static_cast<int32_t>(kMultiplier0));
  const Ints multiplier1 = all(static_cast<int32_t>(kMultiplier1));
  for (int round = 0; round < 10; ++round, key0 += kKeyStep0, key1 += kKeyStep1) {
    const Ints k0 = all(static_cast<int32_t>(key0)), k1 = all(static_cast<int32_t>(key1));
    for (auto& x : c) {
      const Ints product0 = times(x[0], multiplier0), product1 = times(x[2], multiplier1);
      x[0] = mixed(upper(product1), x[1], k0);
      x[2] = mixed(upper(product0), x[3], k1);
      x[1] = product1;
      x[3] = product0;
    }
  }
  for (int i = 0; i < 4; ++i) words[i] = join(c[0][i], c[1][i]);
}

#else

LONGPRETRAIN_CALLED void draw(Ints words[4], Ints query, const Counter& counter) {
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t c0 = counter.head, c1 = static_cast<uint32_t>(query[lane]);
    uint32_t c2 = counter.residue, c3 = counter.sixteen;
    uint32_t key0 = static_cast<uint32_t>(counter.seed);
    uint32_t key1 = static_cast<uint32_t>(counter.seed >> 32);
    for (int round = 0; round < 10; ++round, key0 += kKeyStep0, key1 += kKeyStep1) {
      const uint64_t product0 = uint64_t{c0} * kMultiplier0, product1 = uint64_t{c2} * kMultiplier1;
      c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
      c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
      c1 = static_cast<uint32_t>(product1);
      c3 = static_cast<uint32_t>(product0);
    }
    const uint32_t drawn[4] = {c0, c1, c2, c3};
    for (int i = 0; i < 4; ++i) words[i][lane] = static_cast<int32_t>(drawn[i]);
  }
}

#endif

// Where byte kByte (0 to 3) of each word is at least `drop_below`.
template <int kByte>
LONGPRETRAIN_INLINE Mask survives(Ints word, int32_t drop_below) {
#if defined(__AVX512F__)
  // The bytes below cannot change the order, since the other side has zeros there.
  const Ints shifted = _mm512_slli_epi32(word, 24 - 8 * kByte);
  return _mm512_cmpge_epu32_mask(shifted, all(static_cast<int32_t>(uint32_t(drop_below) << 24)));
#elif defined(__AVX2__)
  const Ints byte = _mm256_and_si256(_mm256_srli_epi32(word, 8 * kByte), all(0xff));
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(byte, all(drop_below - 1)));
#else
  return ((word >> (8 * kByte)) & 0xff) >= drop_below;
#endif
}

}  // namespace
}  // namespace longpretrain::LONGPRETRAIN_LEVEL
