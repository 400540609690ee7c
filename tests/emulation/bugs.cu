// Faults of synchronisation and memory as they happen in real kernels, each beside the same kernel
// without it. A part takes 1 to run the faulty kernel and 0 to run the right one, and throws when
// the result is not the right one.
#include <memory>
#include <stdexcept>

#include "program.h"

namespace emulation = longpretrain::emulation;
using longpretrain::cuda::copy_async_16;
using longpretrain::cuda::copy_commit;
using longpretrain::cuda::copy_wait;

namespace {

constexpr int kThreads = 128, kBlocks = 4;

// Exactly as large as said, so that the address sanitizer and valgrind know its ends.
using Memory = std::unique_ptr<int32_t[]>;

Memory allocate(int count) {
  Memory memory(new int32_t[count]);
  for (int i = 0; i < count; ++i) memory[i] = i;
  return memory;
}

void expect(bool right) {
  if (!right) throw std::runtime_error("the result is wrong");
}

template <class Kernel, class... Arguments>
void run(Kernel kernel, size_t shared_bytes, Arguments... arguments) {
  emulation::launch("planted", kernel, dim3(kBlocks), dim3(kThreads), shared_bytes, arguments...);
}

// --- barriers ------------------------------------------------------------------------------------

// A neighbour's number, read before the neighbour may have written it.
__global__ void read_after_write(bool bug, int32_t* out) {
  LONGPRETRAIN_SHARED(shared);
  int32_t* numbers = reinterpret_cast<int32_t*>(shared);
  const int thread = threadIdx.x;
  numbers[thread] = thread;
  if (!bug) __syncthreads();
  out[blockIdx.x * kThreads + thread] = numbers[(thread + 37) % kThreads];
}

// A buffer filled again while others may still read what it held.
__global__ void write_after_read(bool bug, int32_t* out) {
  LONGPRETRAIN_SHARED(shared);
  int32_t* numbers = reinterpret_cast<int32_t*>(shared);
  const int thread = threadIdx.x;
  int32_t sum = 0;
  for (int round = 0; round < 2; ++round) {
    numbers[thread] = thread + 1000 * round;
    __syncthreads();
    sum += numbers[(thread + 37) % kThreads];
    if (!bug) __syncthreads();
  }
  out[blockIdx.x * kThreads + thread] = sum;
}

// Two buffers: the last tile is waited for as if another were on its way behind it.
__global__ void wait_for_too_few(bool bug, const int32_t* in, int32_t* out) {
  LONGPRETRAIN_SHARED(shared);
  constexpr int kTiles = 4;
  const int thread = threadIdx.x;
  const auto load = [&](int tile) {
    copy_async_16(shared + (tile % 2 * kThreads + thread) * 16, in + 4 * (tile * kThreads + thread),
                  true);
    copy_commit();
  };
  load(0);
  int32_t sum = 0;
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile + 1 < kTiles) {
      load(tile + 1);
      copy_wait<1>();
    } else if (bug) {
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    __syncthreads();
    sum += reinterpret_cast<const int32_t*>(shared)[(tile % 2 * kThreads + (thread ^ 1)) * 4];
    __syncthreads();
  }
  copy_wait<0>();
  out[blockIdx.x * kThreads + thread] = sum;
}

// A warp's own piece of shared memory.
__global__ void pass_on_in_warp(bool bug, int32_t* out) {
  LONGPRETRAIN_SHARED(shared);
  const int thread = threadIdx.x, lane = thread % 32;
  int32_t* numbers = reinterpret_cast<int32_t*>(shared) + (thread - lane);
  numbers[lane] = thread;
  if (!bug) __syncwarp();
  out[blockIdx.x * kThreads + thread] = numbers[31 - lane];
}

__global__ void part_at_barrier(bool bug, int32_t* out) {
  if (!bug || threadIdx.x < 64) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = 1;
}

// --- memory --------------------------------------------------------------------------------------

__global__ void overrun_shared(bool bug, int32_t* out) {
  LONGPRETRAIN_SHARED(shared);
  int32_t* numbers = reinterpret_cast<int32_t*>(shared);
  const int thread = threadIdx.x;
  numbers[thread + bug] = thread;
  __syncthreads();
  out[blockIdx.x * kThreads + thread] = numbers[thread + bug];
}

__global__ void overrun_global(bool bug, const int32_t* in, int32_t* out) {
  const int number = blockIdx.x * kThreads + threadIdx.x;
  out[number] = in[number + bug];
}

// A sum over a row of which the last number was never stored.
__global__ void read_unwritten(bool bug, int32_t* out) {
  LONGPRETRAIN_SHARED(shared);
  int32_t* numbers = reinterpret_cast<int32_t*>(shared);
  const int thread = threadIdx.x;
  if (!bug || thread < kThreads - 1) numbers[thread] = 1;
  __syncthreads();
  int32_t sum = 0;
  for (int i = 0; i < kThreads; ++i) sum += numbers[i];
  out[blockIdx.x * kThreads + thread] = sum;
}

__global__ void add_up_blocks(bool bug, int32_t* out) {
  if (threadIdx.x != 0) return;
  if (bug) {
    out[0] += 1;
  } else {
    atomicAdd(out, 1);
  }
}

// Each block its own number; with the bug all blocks one.
__global__ void write_as_another(bool bug, int32_t* out) {
  if (threadIdx.x == 0) out[bug ? 0 : blockIdx.x] = blockIdx.x;
}

bool is_bug(const Numbers& arguments) { return arguments.at(0) != 0; }

template <class Kernel, class Right>
void run_and_expect(Kernel kernel, bool bug, Right right) {
  const Memory out = allocate(kBlocks * kThreads);
  run(kernel, kThreads * 4, bug, out.get());
  for (int i = 0; i < kBlocks * kThreads; ++i) expect(out[i] == right(i % kThreads));
}

}  // namespace

LONGPRETRAIN_PART(missing_barrier_before_read) {
  run_and_expect(read_after_write, is_bug(arguments), [](int i) { return (i + 37) % kThreads; });
}

LONGPRETRAIN_PART(missing_barrier_before_write) {
  run_and_expect(write_after_read, is_bug(arguments),
                 [](int i) { return 2 * ((i + 37) % kThreads) + 1000; });
}

LONGPRETRAIN_PART(weak_wait) {
  const Memory in = allocate(16 * kThreads), out = allocate(kBlocks * kThreads);
  run(wait_for_too_few, 2 * kThreads * 16, is_bug(arguments), in.get(), out.get());
  for (int i = 0; i < kBlocks * kThreads; ++i) {
    expect(out[i] == 4 * (4 * (i % kThreads ^ 1)) + 4 * kThreads * (0 + 1 + 2 + 3));
  }
}

LONGPRETRAIN_PART(missing_warp_barrier) {
  run_and_expect(pass_on_in_warp, is_bug(arguments), [](int i) { return i ^ 31; });
}

LONGPRETRAIN_PART(divergent_barrier) {
  run_and_expect(part_at_barrier, is_bug(arguments), [](int) { return 1; });
}

LONGPRETRAIN_PART(shared_overrun) {
  run_and_expect(overrun_shared, is_bug(arguments), [](int i) { return i; });
}

LONGPRETRAIN_PART(global_overrun) {
  const Memory in = allocate(kBlocks * kThreads), out = allocate(kBlocks * kThreads);
  run(overrun_global, 0, is_bug(arguments), in.get(), out.get());
  expect(out[5] == 5 + is_bug(arguments));
}

LONGPRETRAIN_PART(uninitialised_shared) {
  run_and_expect(read_unwritten, is_bug(arguments), [](int) { return kThreads; });
}

LONGPRETRAIN_PART(unordered_sum_of_blocks) {
  const Memory out = allocate(1);
  run(add_up_blocks, 0, is_bug(arguments), out.get());
  expect(out[0] == kBlocks);
}

LONGPRETRAIN_PART(unordered_write_of_blocks) {
  const Memory out = allocate(kBlocks);
  run(write_as_another, 0, is_bug(arguments), out.get());
  expect(out[0] == (is_bug(arguments) ? kBlocks - 1 : 0));
}
