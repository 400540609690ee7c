// What the emulator's runtime offers: to kernels by way of simt.h, and to tests.
//
// The runtime itself is never compiled for the thread sanitizer: only what kernels do with memory
// is to be watched, and only __syncthreads and __syncwarp order it (shuffles, votes, mma and
// ldmatrix do not, as on the device).
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace longpretrain::emulation {

using Where = std::source_location;
using Word = uint32_t __attribute__((may_alias));

// --- the running CUDA thread ---------------------------------------------------------------------
struct Thread {
  uint3 thread_index, block_index;
  dim3 block_size, grid_size;
  char* shared;  // dynamic shared memory of the block
};
extern thread_local constinit Thread* current __attribute__((tls_model("initial-exec")));

enum class Barrier : uint8_t { kPlain, kAnd, kOr };
enum class Shuffle : uint8_t { kLane, kXor, kDown };

bool barrier(Barrier kind, bool predicate, Where where);
void sync_warp(uint32_t mask, Where where);
uint32_t shuffle(Shuffle kind, uint32_t mask, uint32_t value, uint32_t lane, Where where);
uint32_t ballot(uint32_t mask, bool predicate, Where where);

// d += a b for the warp's 16x16 a and 16x8 b, in the fragments of mma.sync.m16n8k16: products are
// exact in fp32 and are added to d in fp32, the first column of a first. Numbers of 16 bits are
// bfloat16 or float16.
void mma_m16n8k16(bool bfloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  Where where = Where::current());

// The two halves of ldmatrix.
const void* shared_row(const void* row, Where where);  // checks the address and counts conflicts
void exchange_rows(uint32_t (&fragment)[4], const uint32_t (&loaded)[4], const void* row,
                   bool transposed, Where where);

struct Copy {
  void* target;
  const void* source;
  bool valid;
};
void begin_copy(void* target, const void* source, bool valid, Where where);
void hide_copy(void* target);
void close_copy_group();
bool next_copy(int pending, Copy* copy);  // false: no more than `pending` groups are left

// An ordinary access to shared memory, told for the count of bank conflicts only: nothing is read.
void note_shared(const void* address, int num_bytes, Where where = Where::current());

// --- memory between parts of shared memory -------------------------------------------------------
// A kernel may leave kGap bytes between the parts of its shared memory (none on the device) and
// close them: a write there is reported at the end of the block, any access by the sanitizers.
constexpr int kGap = 128;
void close_gap(void* start);

// --- 16-bit numbers: to the nearest, ties to even; NaN as the device writes it -------------------
uint16_t bfloat16_bits(float x);
uint16_t float16_bits(float x);
inline float bfloat16_value(uint16_t bits) {
  return __builtin_bit_cast(float, uint32_t{bits} << 16);
}
inline float float16_value(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7fffu, sign = uint32_t{bits & 0x8000u} << 16;
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  const uint32_t normal = (magnitude << 13) + (112u << 23);  // from one bias to the other
  const uint32_t special = 0x7f800000 | magnitude << 13;     // infinity and NaN
  const uint32_t small = __builtin_bit_cast(uint32_t, subnormal);
  const uint32_t wide = magnitude < 0x400 ? small : magnitude < 0x7c00 ? normal : special;
  return __builtin_bit_cast(float, sign | wide);
}
inline uint32_t pack(bool bfloat16, float low, float high) {
  if (bfloat16) return bfloat16_bits(low) | uint32_t{bfloat16_bits(high)} << 16;
  return float16_bits(low) | uint32_t{float16_bits(high)} << 16;
}
inline void unpack(bool bfloat16, uint32_t pair, float* low, float* high) {
  const uint16_t first = static_cast<uint16_t>(pair), second = static_cast<uint16_t>(pair >> 16);
  *low = bfloat16 ? bfloat16_value(first) : float16_value(first);
  *high = bfloat16 ? bfloat16_value(second) : float16_value(second);
}
// ex2.approx.ftz and lg2.approx.ftz, but exact: subnormals are 0.
float exp2_approx(float x);
float log2_approx(float x);

// --- launching -----------------------------------------------------------------------------------
struct Launch {
  const char* kernel;
  dim3 grid, block;
  size_t shared_bytes, parameter_bytes;
  void (*run_thread)(void* arguments);
  void* arguments;
};

// Throws std::runtime_error where cudaLaunchKernel would return an error.
void run_grid(const Launch& launch);

template <class... Parameters>
constexpr size_t parameter_bytes() {
  size_t end = 0;
  ((end = (end + alignof(Parameters) - 1) / alignof(Parameters) * alignof(Parameters) +
          sizeof(Parameters)),
   ...);
  return end;
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "goes to the device as bytes");
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } call{kernel, {static_cast<Parameters>(std::forward<Arguments>(arguments))...}};
  const auto run_thread = [](void* arguments) {
    const Call& call = *static_cast<const Call*>(arguments);
    std::apply(call.kernel, call.parameters);
  };
  run_grid({name, grid, block, shared_bytes, parameter_bytes<Parameters...>(), run_thread, &call});
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Arguments&&... arguments) {
  launch("without a name", kernel, grid, block, shared_bytes,
         std::forward<Arguments>(arguments)...);
}

// --- settings, of the process --------------------------------------------------------------------
// 0: threads and blocks in order. Else a random order of blocks, and in each block of its threads,
// drawn from the seed, the number of the launch since, and the block: OS threads do not matter.
void set_seed(uint64_t seed);  // or LONGPRETRAIN_EMULATION_SEED
// OS threads; 0: all cores up to 16, or one where a sanitizer or valgrind watches.
void set_threads(int threads);  // or LONGPRETRAIN_EMULATION_THREADS
// Dynamic shared memory that a block may have; at first that of sm_80, 163 KiB.
void set_shared_limit(size_t num_bytes);

// --- what was counted ----------------------------------------------------------------------------
struct Counters {
  int64_t launches = 0, blocks = 0;
  int64_t mma = 0, ldmatrix = 0, shuffles = 0;  // by warps; votes are shuffles
  int64_t barriers = 0;                         // by blocks
  int64_t warp_barriers = 0;
  int64_t async_copies = 0, async_bytes = 0;  // by threads; bytes are those read
  // Turns that the banks of shared memory take beyond the fewest possible.
  int64_t ldmatrix_conflicts = 0, async_conflicts = 0, shared_conflicts = 0;
  int64_t shared_accesses = 0;  // by warps, of those told by note_shared
  int64_t switches = 0;         // of fibers
};
Counters counters(const char* kernel = nullptr);  // null: of all kernels
std::string counters_text();                      // a line per kernel: "name mma=1 ldmatrix=2 ..."
void reset_counters();

}  // namespace longpretrain::emulation
