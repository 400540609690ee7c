// What the emulator promises, one small kernel each: test_cuda_emulation.py holds what comes out
// against numpy.
#include <limits>

#include "program.h"

namespace emulation = longpretrain::emulation;
using longpretrain::cuda::BFloat16;
using longpretrain::cuda::Float16;

namespace {

constexpr uint32_t kAll = ~0u;

// --- fragments -----------------------------------------------------------------------------------

// [lane][10]: a, b0, b1, d of one mma each; d is replaced.
template <class T>
__global__ void multiply(uint32_t* registers) {
  uint32_t* own = registers + threadIdx.x * 10;
  uint32_t a[4];
  float d[4];
  for (int i = 0; i < 4; ++i) a[i] = own[i];
  for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(own[6 + i]);
  longpretrain::cuda::mma_m16n8k16<T>(d, a, own[4], own[5]);
  for (int i = 0; i < 4; ++i) own[6 + i] = __float_as_uint(d[i]);
}

// Input: 256 rows of 16 bytes, then the row that each lane names; output: [lane][4].
template <bool kTransposed>
__global__ void load_matrices(const uint32_t* rows, const uint32_t* named, uint32_t* fragments) {
  LONGPRETRAIN_SHARED(shared);
  uint32_t* words = reinterpret_cast<uint32_t*>(shared);
  for (int i = threadIdx.x; i < 1024; i += 32) words[i] = rows[i];
  __syncwarp();
  uint32_t fragment[4];
  longpretrain::cuda::ldmatrix_x4<kTransposed>(fragment, shared + 16 * named[threadIdx.x]);
  for (int i = 0; i < 4; ++i) fragments[threadIdx.x * 4 + i] = fragment[i];
}

// --- collectives ---------------------------------------------------------------------------------

// [lane][9] of one warp whose lower and upper halves part in between.
__global__ void talk(uint32_t* results) {
  const uint32_t lane = threadIdx.x, value = 100 + lane;
  uint32_t* own = results + lane * 9;
  own[0] = __shfl_sync(kAll, value, (lane * 7) % 32);
  own[1] = __shfl_xor_sync(kAll, value, 5);
  own[2] = __shfl_down_sync(kAll, value, 3);
  own[3] = __ballot_sync(kAll, lane % 3 == 0);
  own[4] = __any_sync(kAll, lane == 31);
  own[5] = __all_sync(kAll, lane < 31);
  if (lane < 16) {
    own[6] = __shfl_xor_sync(0x0000ffff, value, 1);
    own[7] = __ballot_sync(0x0000ffff, 1);
  } else {
    own[7] = __ballot_sync(0xffff0000, lane % 2);
    own[6] = __shfl_xor_sync(0xffff0000, value, 2);
  }
  own[8] = static_cast<uint32_t>(__shfl_sync(kAll, -1.5f, 0) * -2.0f);
}

// [thread][4] of two blocks of 64.
__global__ void vote_of_block(uint32_t* results) {
  uint32_t* own = results + (blockIdx.x * blockDim.x + threadIdx.x) * 4;
  own[0] = __syncthreads_and(threadIdx.x < 63) != 0;
  own[1] = __syncthreads_and(threadIdx.x < 64) != 0;
  own[2] = __syncthreads_or(threadIdx.x == 40 && blockIdx.x == 1) != 0;
  own[3] = __syncthreads_or(threadIdx.x == 64) != 0;
}

// --- asynchronous copies and shared memory -------------------------------------------------------

// [moment][group] of one thread: what the three groups' targets hold when two, one and none may
// still be in flight; of a copy that is not valid; and of memory never written.
__global__ void copy_late(const uint32_t* source, uint32_t* seen) {
  LONGPRETRAIN_SHARED(shared);
  const uint32_t* words = reinterpret_cast<const uint32_t*>(shared);
  const auto look = [&](int moment) {
    for (int group = 0; group < 3; ++group) seen[moment * 3 + group] = words[4 * group];
  };
  for (int group = 0; group < 3; ++group) {
    longpretrain::cuda::copy_async_16(shared + 16 * group, source + 4 * group, group != 1);
    longpretrain::cuda::copy_commit();
  }
  look(0);
  longpretrain::cuda::copy_wait<2>();
  look(1);
  longpretrain::cuda::copy_wait<1>();
  look(2);
  longpretrain::cuda::copy_wait<0>();
  look(3);
  seen[12] = words[12];
  __syncwarp();
}

// Conflicts: rows of 128 bytes, of 144, and swizzled; copies by rows of 128; ordinary stores of 4
// bytes at a stride of `stride` words.
__global__ void meet_in_banks(const char* source, int stride) {
  LONGPRETRAIN_SHARED(shared);
  const int lane = threadIdx.x, row = lane % 8, matrix = lane / 8;
  for (int i = lane; i < 512; i += 32) {
    longpretrain::cuda::copy_async_16(shared + 16 * i, source, true);
  }
  longpretrain::cuda::copy_commit();
  longpretrain::cuda::copy_wait<0>();
  __syncthreads();
  uint32_t fragment[4];
  longpretrain::cuda::ldmatrix_x4<false>(fragment, shared + 128 * row + 16 * matrix);
  longpretrain::cuda::ldmatrix_x4<false>(fragment, shared + 144 * row + 16 * matrix);
  longpretrain::cuda::ldmatrix_x4<false>(fragment, shared + 128 * row + 16 * (matrix ^ row));
  longpretrain::cuda::ldmatrix_x4<true>(fragment, shared);  // all lanes one row: no conflict
  emulation::note_shared(shared + 4 * stride * lane, 4);
  __syncthreads();
  longpretrain::cuda::copy_async_16(shared + 256 * lane, source, true);
  longpretrain::cuda::copy_commit();
  longpretrain::cuda::copy_wait<0>();
}

// --- order ---------------------------------------------------------------------------------------

// The order in which the threads of each block, and the blocks, take numbers.
__global__ void draw_numbers(uint32_t* of_threads, uint32_t* of_blocks, uint32_t* next_block) {
  LONGPRETRAIN_SHARED(shared);
  uint32_t* next = reinterpret_cast<uint32_t*>(shared);
  if (threadIdx.x == 0) {
    *next = 0;
    of_blocks[blockIdx.x] = atomicAdd(next_block, 1);
  }
  __syncthreads();
  for (int i = 0; i < 3; ++i) {
    of_threads[(blockIdx.x * blockDim.x + threadIdx.x) * 3 + i] = atomicAdd(next, 1);
    __syncwarp();
  }
}

template <class Kernel, class... Arguments>
void run(Kernel kernel, dim3 grid, int threads, size_t shared_bytes, Arguments... arguments) {
  emulation::launch("kernel_of_a_test", kernel, grid, dim3(threads), shared_bytes, arguments...);
}

template <class T>
void multiply_input() {
  std::vector<uint32_t> registers = read_input<uint32_t>();
  run(multiply<T>, 1, 32, 0, registers.data());
  write_output(registers);
}

}  // namespace

LONGPRETRAIN_PART(mma_bf16) { multiply_input<BFloat16>(); }
LONGPRETRAIN_PART(mma_fp16) { multiply_input<Float16>(); }

LONGPRETRAIN_PART(ldmatrix) {
  const std::vector<uint32_t> input = read_input<uint32_t>();
  std::vector<uint32_t> fragments(128);
  run(arguments[0] != 0 ? load_matrices<true> : load_matrices<false>, 1, 32, 4096, input.data(),
      input.data() + 1024, fragments.data());
  write_output(fragments);
}

LONGPRETRAIN_PART(collectives) {
  std::vector<uint32_t> results(32 * 9);
  run(talk, 1, 32, 0, results.data());
  write_output(results);
}

LONGPRETRAIN_PART(votes) {
  std::vector<uint32_t> results(128 * 4);
  run(vote_of_block, 2, 64, 0, results.data());
  write_output(results);
}

LONGPRETRAIN_PART(copies) {
  alignas(16) uint32_t source[12];
  for (uint32_t i = 0; i < 12; ++i) source[i] = 1000 + i;
  std::vector<uint32_t> seen(13 * 32);
  run(copy_late, 1, 32, 64, static_cast<const uint32_t*>(source), seen.data());
  seen.resize(13);
  write_output(seen);
}

LONGPRETRAIN_PART(conflicts) {
  alignas(16) char source[16] = {};
  run(meet_in_banks, 1, 32, 8192, static_cast<const char*>(source), int(arguments[0]));
  std::puts(emulation::counters_text().c_str());
}

LONGPRETRAIN_PART(order) {
  constexpr int kBlocks = 8, kThreads = 128;
  uint32_t next_block = 0;
  std::vector<uint32_t> numbers(kBlocks * kThreads * 3 + kBlocks);
  run(draw_numbers, kBlocks, kThreads, 4, numbers.data(), numbers.data() + kBlocks * kThreads * 3,
      &next_block);
  write_output(numbers);
}

// fp32 in; per number pack<BFloat16>, pack<Float16>, unpack of the latter, exp2 and log2.
LONGPRETRAIN_PART(numbers) {
  std::vector<uint32_t> results;
  for (const float x : read_input<float>()) {
    float low, high;
    const uint32_t half = longpretrain::cuda::pack<Float16>(x, -x);
    longpretrain::cuda::unpack<Float16>(half, &low, &high);
    for (const uint32_t bits :
         {longpretrain::cuda::pack<BFloat16>(x, -x), half, __float_as_uint(low),
          __float_as_uint(high), __float_as_uint(longpretrain::cuda::exp2_approx(x)),
          __float_as_uint(longpretrain::cuda::log2_approx(x))}) {
      results.push_back(bits);
    }
  }
  write_output(results);
}
