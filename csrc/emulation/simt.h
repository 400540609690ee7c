// CUDA C++ as the kernels use it, for g++: the same sources run on the CPU, for tests only.
//
// Each CUDA thread is a fiber; blocks and threads run in a seeded random order; whatever CUDA
// leaves open is made to hurt: shared memory starts as NaN, an asynchronous copy leaves NaN in
// place until it is waited for, and a kernel that breaks a rule of CUDA ends the process with a
// sentence naming the kernel, the file and the line. There is no more here than the kernels need:
// another intrinsic is a compile error, to be added on purpose. Nor is there anything to make the
// host wait for the device, or to allocate there: host code that does would not compile.
//
// csrc/cuda/ptx.h includes this file when the compiler is not nvcc.
#pragma once

#include <math.h>

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

#define LONGPRETRAIN_SHARED(name) char* name = longpretrain::emulation::current->shared

#define threadIdx (longpretrain::emulation::current->thread_index)
#define blockIdx (longpretrain::emulation::current->block_index)
#define blockDim (longpretrain::emulation::current->block_size)
#define gridDim (longpretrain::emulation::current->grid_size)

using std::max;
using std::min;

// --- vectors -------------------------------------------------------------------------------------
#define LONGPRETRAIN_VECTORS(type, name)                           \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };         \
  struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };   \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
LONGPRETRAIN_VECTORS(int, int)
LONGPRETRAIN_VECTORS(unsigned, uint)
LONGPRETRAIN_VECTORS(float, float)
#undef LONGPRETRAIN_VECTORS

// --- numbers -------------------------------------------------------------------------------------
inline uint32_t __float_as_uint(float x) { return __builtin_bit_cast(uint32_t, x); }
inline int32_t __float_as_int(float x) { return __builtin_bit_cast(int32_t, x); }
inline float __uint_as_float(uint32_t x) { return __builtin_bit_cast(float, x); }
inline float __int_as_float(int32_t x) { return __builtin_bit_cast(float, x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int32_t x) { return __builtin_ffs(x); }
inline int __clz(int32_t x) { return x == 0 ? 32 : __builtin_clz(static_cast<uint32_t>(x)); }
// Byte i of the result is byte (selector >> 4 i) % 8 of the eight bytes of x, then y.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (nibble & 7)) & 0xff;
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;  // the sign, spread
    picked |= byte << 8 * i;
  }
  return picked;
}

// --- memory --------------------------------------------------------------------------------------
template <class T>
inline T __ldg(const T* pointer) {
  return *pointer;
}

// Relaxed, as on the device; returns what was there before.
template <class T>
inline T atomicAdd(T* pointer, std::type_identity_t<T> value) {
  T before;
  __atomic_load(pointer, &before, __ATOMIC_RELAXED);
  for (T after = before + value; !__atomic_compare_exchange(pointer, &before, &after, false,
                                                            __ATOMIC_RELAXED, __ATOMIC_RELAXED);) {
    after = before + value;
  }
  return before;
}

// --- barriers and collectives --------------------------------------------------------------------
inline void __syncthreads(
    longpretrain::emulation::Where where = longpretrain::emulation::Where::current()) {
  longpretrain::emulation::barrier(longpretrain::emulation::Barrier::kPlain, true, where);
}
inline int __syncthreads_and(int predicate, longpretrain::emulation::Where where =
                                                longpretrain::emulation::Where::current()) {
  using longpretrain::emulation::Barrier;
  return longpretrain::emulation::barrier(Barrier::kAnd, predicate != 0, where);
}
inline int __syncthreads_or(int predicate, longpretrain::emulation::Where where =
                                               longpretrain::emulation::Where::current()) {
  using longpretrain::emulation::Barrier;
  return longpretrain::emulation::barrier(Barrier::kOr, predicate != 0, where);
}
inline void __syncwarp(uint32_t mask = ~0u, longpretrain::emulation::Where where =
                                                longpretrain::emulation::Where::current()) {
  longpretrain::emulation::sync_warp(mask, where);
}

#define LONGPRETRAIN_SHUFFLE(intrinsic, kind)                                                   \
  template <class T>                                                                            \
  inline T intrinsic(                                                                           \
      uint32_t mask, T value, uint32_t lane,                                                    \
      longpretrain::emulation::Where where = longpretrain::emulation::Where::current()) {       \
    static_assert(sizeof(T) == 4, "numbers of 4 bytes");                                        \
    return __builtin_bit_cast(                                                                  \
        T, longpretrain::emulation::shuffle(longpretrain::emulation::Shuffle::kind, mask,       \
                                            __builtin_bit_cast(uint32_t, value), lane, where)); \
  }
LONGPRETRAIN_SHUFFLE(__shfl_sync, kLane)
LONGPRETRAIN_SHUFFLE(__shfl_xor_sync, kXor)
LONGPRETRAIN_SHUFFLE(__shfl_down_sync, kDown)
#undef LONGPRETRAIN_SHUFFLE

inline uint32_t __ballot_sync(
    uint32_t mask, int predicate,
    longpretrain::emulation::Where where = longpretrain::emulation::Where::current()) {
  return longpretrain::emulation::ballot(mask, predicate != 0, where);
}
inline int __any_sync(
    uint32_t mask, int predicate,
    longpretrain::emulation::Where where = longpretrain::emulation::Where::current()) {
  return longpretrain::emulation::ballot(mask, predicate != 0, where) != 0;
}
inline int __all_sync(
    uint32_t mask, int predicate,
    longpretrain::emulation::Where where = longpretrain::emulation::Where::current()) {
  return longpretrain::emulation::ballot(mask, predicate != 0, where) == mask;
}

// --- what csrc/cuda/ptx.h builds its host bodies from --------------------------------------------
namespace longpretrain::emulation {

// Each lane gives the address of one row of 16 bytes: lanes 0 to 7 those of the first 8x8 matrix,
// and so on. The row is read here, in the kernel's own code, where sanitizers see it.
inline void ldmatrix_x4(bool transposed, uint32_t (&fragment)[4], const void* row,
                        Where where = Where::current()) {
  const Word* words = static_cast<const Word*>(shared_row(row, where));
  const uint32_t loaded[4] = {words[0], words[1], words[2], words[3]};
  exchange_rows(fragment, loaded, row, transposed, where);
}

// From global to shared memory, or 16 zeros when not `valid` (then `source` is not read). What
// stands at `target` until it is waited for is NaN of any dtype.
inline void copy_async_16(void* target, const void* source, bool valid,
                          Where where = Where::current()) {
  begin_copy(target, source, valid, where);
  for (int i = 0; i < 4; ++i) static_cast<Word*>(target)[i] = ~0u;
  hide_copy(target);
}
inline void copy_commit() { close_copy_group(); }

// Until at most `pending` of the thread's groups are in flight.
inline void copy_wait(int pending) {
  for (Copy copy; next_copy(pending, &copy);) {
    for (int i = 0; i < 4; ++i) {
      static_cast<Word*>(copy.target)[i] =
          copy.valid ? static_cast<const Word*>(copy.source)[i] : 0;
    }
  }
}

}  // namespace longpretrain::emulation
