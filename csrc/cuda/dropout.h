// The random bits of dropout: Philox4x32-10 (Salmon et al., 2011), equal to
// longpretrain/attention/philox.py.
#pragma once

#include "mask.h"

namespace longpretrain::cuda {

constexpr uint32_t kGlobalRow = 1u << 16;  // added to the head number in the row of a global query
constexpr int32_t kSixteen = 16;           // keys of one call of the generator

// `head` with kGlobalRow where it belongs; `query` is a position; the keys are those of the steps
// 16 * sixteen to 16 * sixteen + 15 of the class `residue`.
__device__ __forceinline__ uint4 philox4x32(uint64_t seed, uint32_t head, uint32_t query,
                                            uint32_t residue, uint32_t sixteen) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  constexpr uint32_t kKeyStep0 = 0x9E3779B9, kKeyStep1 = 0xBB67AE85;
  uint32_t c0 = head, c1 = query, c2 = residue, c3 = sixteen;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{c0} * kMultiplier0, product1 = uint64_t{c2} * kMultiplier1;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    key0 += kKeyStep0;
    key1 += kKeyStep1;
  }
  return make_uint4(c0, c1, c2, c3);
}

// Bit i: byte i of the word is at least drop_below, of 4.
__device__ __forceinline__ uint32_t kept_of_word(uint32_t word, uint32_t drop_below) {
  // Bytes in the lower halves of 16 bits: adding what lacks to 256 carries into bit 8.
  const uint32_t lacking = (256 - drop_below) * 0x00010001u;
  const uint32_t even = (word & 0x00ff00ffu) + lacking;
  const uint32_t odd = (word >> 8 & 0x00ff00ffu) + lacking;
  const uint32_t carries = (even >> 8 & 0x00010001u) | (odd >> 7 & 0x00020002u);
  return (carries | carries >> 14) & 15;
}

// Bit i: the weight of key i of the sixteen is kept.
__device__ __forceinline__ uint32_t kept_of_sixteen(const uint4& words, uint32_t drop_below) {
  return kept_of_word(words.x, drop_below) | kept_of_word(words.y, drop_below) << 4 |
         kept_of_word(words.z, drop_below) << 8 | kept_of_word(words.w, drop_below) << 12;
}

// The byte of one key alone, which is named by its position.
__device__ __forceinline__ uint32_t dropout_byte(uint64_t seed, uint32_t head, uint32_t query,
                                                 int32_t key, int32_t dilation) {
  const uint32_t step = static_cast<uint32_t>(key / dilation);
  const uint32_t residue = static_cast<uint32_t>(key % dilation);
  const uint4 words = philox4x32(seed, head, query, residue, step / kSixteen);
  const uint32_t i = step / 4 % 4;
  const uint32_t word = i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
  return word >> (8 * (step % 4)) & 0xff;
}

// Draws for the weights of one head's window: a bit for each of a lane's elements whose weight is
// kept.
struct WindowDropout {
  uint64_t seed;
  uint32_t head, drop_below;
  const ResidueClass& tokens;

  // Rows are the 16 queries from first_query on, columns the 32 keys from first_key on, by their
  // steps. The warp shares the work: a lane draws for one query and 16 keys.
  __device__ __forceinline__ WordBits draw_32(int32_t first_query, int32_t first_key) const {
    const uint32_t lane = fresh_lane_id();
    const int32_t query = tokens.position(first_query + static_cast<int32_t>(lane / 2));
    const uint32_t sixteen = static_cast<uint32_t>(first_key) / kSixteen + lane % 2;
    const uint4 words = philox4x32(seed, head, static_cast<uint32_t>(query),
                                   static_cast<uint32_t>(tokens.residue), sixteen);
    uint32_t kept = kept_of_sixteen(words, drop_below) << (lane % 2 * kSixteen);
    kept |= __shfl_xor_sync(~0u, kept, 1);
    WordBits bits;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      bits.word[x] = __shfl_sync(~0u, kept, 2 * (lane / 4 + 8 * x)) >> (2 * (lane % 4));
    }
    return bits;
  }
};

}  // namespace longpretrain::cuda
