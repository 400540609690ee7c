// Small kernels for the interpreter's own tests (../test_ptx_machine.py): what control flow,
// barriers and memories do, and one kernel for each fault that the interpreter must see.
#include <cstdint>

namespace {

struct Table {
  const int* in;
  int* out;
  int numbers[128];
};

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
__device__ __forceinline__ void copy(void* shared, const void* global, int size) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(size)
               : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kGroups) : "memory");
}

// Double buffering, as the kernels do it: what lies behind n reads as zeros. The last group that
// may be missing: 1, or 2 (too weak: the copy that is used may still be in flight).
template <int kMissing>
__device__ void sum_tiles(const float4* in, float* out, int num_tiles, int n) {
  __shared__ __align__(16) float4 tiles[2][32];
  const int t = threadIdx.x;
  const auto load = [&](int tile) {
    const int i = tile * 32 + t;
    if (tile < num_tiles) copy(&tiles[tile % 2][t], in + (i < n ? i : 0), i < n ? 16 : 0);
    commit();
  };
  load(0);
  float sum = 0.0f;
  for (int tile = 0; tile < num_tiles; tile++) {
    load(tile + 1);
    wait<kMissing>();
    __syncthreads();
    const float4 x = tiles[tile % 2][31 - t];
    sum += x.x + 2 * x.y + 3 * x.z + 4 * x.w;
    __syncthreads();
  }
  out[t] = sum;
}

}  // namespace

extern "C" {

// What is right

__global__ void collatz(const int* in, int* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  long long x = in[i];
  int count = 0;
  while (x != 1) {
    if (x & 1) {
      x = 3 * x + 1;
    } else {
      x /= 2;
    }
    count++;
  }
  out[i] = count;
}

__global__ void shuffle_after_parting(const int* in, int* out) {
  __shared__ int exchanged[64];
  const int t = threadIdx.x, value = in[t];
  int sum = 0;
  for (int k = 0; k < value % 7; k++) {
    if ((k + t) % 3 == 0) {
      sum += k * value;
    } else {
      sum ^= value;
    }
  }
  for (int d = 16; d; d /= 2) sum += __shfl_down_sync(~0u, sum, d);
  if ((t & 31) < 16) {
    sum += __shfl_xor_sync(0xffffu, t, 5);
  } else {
    sum -= __shfl_xor_sync(0xffff0000u, t, 3);
  }
  sum += 1000 * __shfl_sync(~0u, t, 7, 8) + 100000 * __shfl_up_sync(~0u, t, 3);
  exchanged[t] = sum;
  __syncthreads();
  out[t] = exchanged[63 - t] % 1000 + exchanged[(t * 7) & 63] / 13;
}

__global__ void votes(const int* in, int* out) {
  const int t = threadIdx.x, value = in[blockIdx.x * 64 + t];
  int* row = out + (blockIdx.x * 64 + t) * 7;
  row[0] = __syncthreads_and(value > 0);
  row[1] = __syncthreads_or(value > 90);
  row[2] = __syncthreads_count(value > 50);
  row[3] = static_cast<int>(__ballot_sync(~0u, value > 50));
  row[4] = __all_sync(~0u, value > 10);
  row[5] = __any_sync(~0u, value > 95);
  unsigned active = 0;
  if (t % 3 == 0) active = __activemask();
  row[6] = static_cast<int>(active);
}

__global__ void tables(const Table p) {
  __shared__ int from_shared[4];
  const int t = threadIdx.x;
  if (t < 4) from_shared[t] = 100 * t;
  __syncthreads();
  int own[8];
  for (int i = 0; i < 8; i++) own[i] = p.in[t * 8 + i];
  own[p.in[t] & 7] += 5;
  p.out[t] = p.numbers[p.in[t] & 127] + own[(p.in[t] + 1) & 7] * 1000 + from_shared[t & 3];
}

__global__ void count(const int* in, unsigned* counts, int* largest, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  atomicAdd(counts + in[i] % 16, 1u);
  atomicMax(largest, in[i]);
}

__global__ void floats(const float* a, const float* b, float* out) {
  const int i = threadIdx.x, n = blockDim.x;
  const float x = a[i], y = b[i];
  out[i] = exp2f(x);
  out[n + i] = __log2f(fabsf(x));
  out[2 * n + i] = x / y;
  out[3 * n + i] = sqrtf(fabsf(x));
  out[4 * n + i] = fmaxf(x, y) - fminf(x, y);
  out[5 * n + i] = rintf(x * 9.7f);
  out[6 * n + i] = static_cast<float>(static_cast<int>(x * 1e3f)) +
                   static_cast<float>(static_cast<unsigned>(fabsf(y) * 77.0f));
  out[7 * n + i] = __fdividef(x, y) + rsqrtf(fabsf(y)) + floorf(x) + truncf(y);
  out[8 * n + i] = x > y || y != y ? x : copysignf(y, x);
}

__global__ void integers(const unsigned* a, const unsigned* b, unsigned* out) {
  const int i = threadIdx.x, n = blockDim.x;
  const unsigned x = a[i], y = b[i];
  const long long wide = static_cast<long long>(static_cast<int>(x)) * static_cast<int>(y);
  out[i] = __byte_perm(x, y, 0x3715);
  out[n + i] = __brev(x) ^ __clz(y);
  out[2 * n + i] = __popc(x) + __ffs(y);
  out[3 * n + i] = __umulhi(x, y) ^ __mulhi(static_cast<int>(x), static_cast<int>(y));
  out[4 * n + i] = (x >> (y & 31)) ^ (x << (y & 31)) ^ (static_cast<int>(x) >> (y & 31));
  out[5 * n + i] = x % (y | 1) + x / (y | 1);
  out[6 * n + i] = __funnelshift_l(x, y, 7) ^ __funnelshift_r(x, y, y);
  out[7 * n + i] = min(static_cast<int>(x), static_cast<int>(y)) ^ max(x, y);
  out[8 * n + i] = static_cast<unsigned>(wide >> 20) ^ static_cast<unsigned>(wide / 1000003);
  out[9 * n + i] = static_cast<unsigned>(static_cast<signed char>(x)) + static_cast<uint16_t>(y);
}

__global__ void sum_copied(const float4* in, float* out, int num_tiles, int n) {
  sum_tiles<1>(in, out, num_tiles, n);
}

// What is wrong

__global__ void waits_too_weakly(const float4* in, float* out, int num_tiles, int n) {
  sum_tiles<2>(in, out, num_tiles, n);
}
__global__ void overwrites_copy(const float4* in, float* out) {
  __shared__ __align__(16) float4 tile[32];
  copy(&tile[threadIdx.x], in + threadIdx.x, 16);
  tile[threadIdx.x] = in[0];
  wait<0>();
  out[threadIdx.x] = tile[threadIdx.x].x;
}
__global__ void shuffles_with_absent(const int* in, int* out) {
  int value = in[threadIdx.x];
  if (threadIdx.x & 1) value += __shfl_xor_sync(~0u, value, 2);
  out[threadIdx.x] = value;
}
__global__ void parted_at_barrier(const int* in, int* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}
__global__ void leaves_before_barrier(const int* in, int* out) {
  if (threadIdx.x == 40) return;
  __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}
__global__ void exchanges_in_block(const int* in, int* out, int with_barrier) {
  __shared__ int exchanged[64];
  exchanged[threadIdx.x] = in[threadIdx.x];
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = exchanged[63 - threadIdx.x];
}
__global__ void overwrites_in_block(const int* in, int* out, int with_barrier) {
  __shared__ int exchanged[64];
  exchanged[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const int other = exchanged[63 - threadIdx.x];
  if (with_barrier) __syncthreads();
  exchanged[threadIdx.x] = other;
  __syncthreads();
  out[threadIdx.x] = exchanged[threadIdx.x ^ 1];
}
__global__ void exchanges_in_warp(const int* in, int* out, int with_barrier) {
  __shared__ int exchanged[64];
  exchanged[threadIdx.x] = in[threadIdx.x];
  if (with_barrier) __syncwarp();
  out[threadIdx.x] = exchanged[threadIdx.x ^ 31];
}
__global__ void reads_unwritten(const int* in, int* out) {
  __shared__ int some[64];
  if (threadIdx.x != 9) some[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = some[threadIdx.x];
}
__global__ void shared_outside(const int* in, int* out) {
  extern __shared__ int some[];
  some[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = some[threadIdx.x];
}
__global__ void reads_outside(const int* in, int* out) { out[threadIdx.x] = in[threadIdx.x + 1]; }
__global__ void reads_misaligned(const char* in, int* out) {
  out[threadIdx.x] = *reinterpret_cast<const int*>(in + threadIdx.x);
}
__global__ void writes_twice(const int* in, int* out) { out[threadIdx.x / 2] = in[threadIdx.x]; }
__global__ void writes_input(int* in, int* out) {
  in[threadIdx.x] = 1;
  out[threadIdx.x] = 2;
}
__global__ void reads_what_it_writes(const int* in, int* scratch, int* out) {
  scratch[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = scratch[threadIdx.x ^ 1];
}
__global__ void reads_scratch(const int* scratch, int* out) {
  out[threadIdx.x] = scratch[threadIdx.x];
}
__global__ void writes_scratch(const int* in, int* scratch, int n) {
  if (static_cast<int>(threadIdx.x) < n) scratch[threadIdx.x] = in[threadIdx.x];
}
__global__ void divides_by_zero(const int* in, int* out) {
  out[threadIdx.x] = 7 / (in[threadIdx.x] - in[5]);
}
__global__ void sums_floats(const float* in, float* out) { atomicAdd(out, in[threadIdx.x]); }

}  // extern "C"
