// What has no name in C++: tensor-core products, matrix loads from shared memory, asynchronous
// copies, roundings. The only file with inline PTX. Without nvcc the same functions run on the
// emulator of csrc/emulation, and so do the kernels.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define LONGPRETRAIN_SHARED(name) extern __shared__ __align__(128) char name[]
#else
#include "emulation/simt.h"
#endif

namespace longpretrain::cuda {

// The dtypes of a call. A number of 16 bits is a uint16_t, and two of them a uint32_t whose lower
// half comes first.
struct BFloat16 {
  using Storage = uint16_t;
};
struct Float16 {
  using Storage = uint16_t;
};
struct Float32 {
  using Storage = float;
};

template <class T>
constexpr bool kIs16Bit = sizeof(typename T::Storage) == 2;

template <class T>
struct IsBFloat16 {
  static constexpr bool value = false;
};
template <>
struct IsBFloat16<BFloat16> {
  static constexpr bool value = true;
};

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// d += a * b for 16 x 8 numbers d, 16 x 16 a and 16 x 8 b, each spread over the warp. With
// g = lane / 4 and c = 2 * (lane % 4) a lane holds: of d rows g (d[0], d[1]) and g + 8, columns c
// and c + 1; of a rows g (a[0], a[2]) and g + 8, columns c and c + 1 (a[0], a[1]) and 8 further;
// of b rows c and c + 1 (b0) and 8 further (b1), column g.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  if constexpr (IsBFloat16<T>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Four matrices of 8 x 8 numbers of 16 bits. Lane l names the 16 bytes that are row l % 8 of matrix
// l / 8, and receives of matrix i in r[i] row l / 4, columns 2 * (l % 4) and one more; of the
// transposed matrix if so wanted. In the address the bits of `flip` are changed, then `offset`
// bytes are added: several loads can share what comes of it.
template <bool kTransposed>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row,
                                            uint32_t flip = 0, uint32_t offset = 0) {
  const uint32_t address = (shared_address(shared_row) ^ flip) + offset;
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}

// Copies 16 bytes behind the thread's back; not valid: writes zeros and reads nothing.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
  const int num_bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(num_bytes)
               : "memory");
}

__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until the thread's copies have arrived, but for those of the last kGroups groups committed.
template <int kGroups>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kGroups) : "memory");
}

// Two numbers of 16 bits, rounded to the nearest, ties to even.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (IsBFloat16<T>::value) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

template <class T>
__device__ __forceinline__ void unpack(uint32_t pair, float* low, float* high) {
  if constexpr (IsBFloat16<T>::value) {
    *low = __uint_as_float(pair << 16);
    *high = __uint_as_float(pair & 0xffff0000u);
  } else {
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(*low), "=f"(*high)
        : "r"(pair));
  }
}

// Of -inf exactly 0, of 0 exactly 1; the error is below 2 units in the last place.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x * y, rounded even where a sum follows, with which the compiler would make one rounding of two.
__device__ __forceinline__ float multiply_rounded(float x, float y) { return __fmul_rn(x, y); }

// The same number, but the compiler does not know: what follows from it is worked out again where
// it is needed, and no register holds it meanwhile.
template <class Integer>
__device__ __forceinline__ Integer fresh(Integer x) {
  static_assert(sizeof(Integer) == 4);
  asm volatile("" : "+r"(x));
  return x;
}

#else

// `where` is the caller's line: the emulator names it when something is wrong.
template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         emulation::Where where = emulation::Where::current()) {
  emulation::mma_m16n8k16(IsBFloat16<T>::value, d, a, b0, b1, where);
}

template <bool kTransposed>
inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, uint32_t flip = 0,
                        uint32_t offset = 0, emulation::Where where = emulation::Where::current()) {
  const uintptr_t address = (reinterpret_cast<uintptr_t>(shared_row) ^ flip) + offset;
  emulation::ldmatrix_x4(kTransposed, r, reinterpret_cast<const void*>(address), where);
}

inline void copy_async_16(void* shared, const void* global, bool valid,
                          emulation::Where where = emulation::Where::current()) {
  emulation::copy_async_16(shared, global, valid, where);
}
inline void copy_commit() { emulation::copy_commit(); }
template <int kGroups>
inline void copy_wait() {
  emulation::copy_wait(kGroups);
}

template <class T>
inline uint32_t pack(float low, float high) {
  return emulation::pack(IsBFloat16<T>::value, low, high);
}
template <class T>
inline void unpack(uint32_t pair, float* low, float* high) {
  emulation::unpack(IsBFloat16<T>::value, pair, low, high);
}

inline float exp2_approx(float x) { return emulation::exp2_approx(x); }
inline float log2_approx(float x) { return emulation::log2_approx(x); }

inline float multiply_rounded(float x, float y) { return fmaf(x, y, -0.0f); }

template <class Integer>
inline Integer fresh(Integer x) {
  return x;
}

#endif

}  // namespace longpretrain::cuda
