// What the kernels want to know of a call's tokens before they start: who is padding, who global,
// where the documents end; and for the backward pass the sum that every gradient of a score needs.
//
// Letters: see ../attention.h.
#include "kernels.h"
#include "launch.h"

namespace longpretrain::cuda {
namespace {

constexpr int32_t kThreads = 256;

// The first of the numbers [first, end), which never fall, that is at least (or more than)
// `wanted`; `end` if there is none. Numbers in another order give some place from `first` to `end`.
template <bool kMore>
__device__ __forceinline__ int32_t find(const int64_t* document_M, int32_t first, int32_t end,
                                        int64_t wanted) {
  while (first < end) {
    const int32_t middle = first + (end - first) / 2;
    const int64_t number = document_M[middle];
    if (kMore ? number > wanted : number >= wanted) {
      end = middle;
    } else {
      first = middle + 1;
    }
  }
  return first;
}

__device__ __forceinline__ bool is_named_before(const int64_t* index_G, int32_t g) {
  bool named = false;
  for (int32_t i = 0; i < g; ++i) named |= index_G[i] == index_G[g];
  return named;
}

// A block takes kThreads tokens, and the slots that name one of them. Slots without a token in the
// sequence go to the first block.
__global__ void __launch_bounds__(kThreads) prepare_tokens(const Problem p) {
  LONGPRETRAIN_SHARED(shared);
  uint8_t* flags = reinterpret_cast<uint8_t*>(shared);  // [kThreads]
  const int32_t blocks_of_row = ceil_div(p.M, kThreads);
  const int32_t b = static_cast<int32_t>(blockIdx.x) / blocks_of_row;
  const int32_t first = static_cast<int32_t>(blockIdx.x) % blocks_of_row * kThreads;
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  const int32_t position = first + thread;
  const int64_t row = p.token(b, 0);

  const bool is_token = position < p.M;
  const bool is_padding = is_token && p.padding_BM != nullptr && p.padding_BM[row + position] != 0;
  flags[thread] = is_padding ? kPadding : 0;
  __syncthreads();

  const int64_t* index_G = p.global_index_BG + int64_t{b} * p.G;
  for (int32_t g = thread; g < p.G; g += kThreads) {
    const int64_t named = index_G[g];
    const bool is_inside = named >= 0 && named < p.M;
    if (is_inside ? named < first || named >= first + kThreads : first > 0) continue;
    // In this order one thread alone looks at a token's flag, the one that may change it.
    const bool is_live =
        is_inside && !is_named_before(index_G, g) && flags[named - first] != kPadding;
    if (is_live) flags[named - first] = kGlobal;
    p.slot_position_BG[int64_t{b} * p.G + g] = is_live ? static_cast<int32_t>(named) : -1;
  }
  __syncthreads();

  if (!is_token) return;
  p.flags_BM[row + position] = flags[thread];
  if (p.document_BM != nullptr) {
    const int64_t* document_M = p.document_BM + row;
    const int64_t own = document_M[position];
    p.document_begin_BM[row + position] = find<false>(document_M, 0, position, own);
    p.document_end_BM[row + position] = find<true>(document_M, position + 1, p.M, own);
  }
}

// Threads that read a row of D numbers, 16 bytes each.
template <class T>
__host__ __device__ constexpr int32_t lanes_of_row(int32_t head_size) {
  return head_size * static_cast<int32_t>(sizeof(typename T::Storage)) / 16;
}

// delta = sum of dout * out over the numbers of a head.
template <class T, int D>
__global__ void __launch_bounds__(kThreads) sum_rows(const Problem p) {
  constexpr int32_t kLanes = lanes_of_row<T>(D);
  const int64_t number = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kLanes;
  const int32_t first = static_cast<int32_t>(threadIdx.x) % kLanes * (D / kLanes);
  const bool is_row = number < int64_t{p.B} * p.N * p.H;
  const int64_t row = is_row ? number : 0;
  const int32_t h = static_cast<int32_t>(row % p.H);
  const int64_t token = row / p.H;
  const int32_t b = static_cast<int32_t>(token / p.N), n = static_cast<int32_t>(token % p.N);

  const uint4 x =
      *reinterpret_cast<const uint4*>(head_of<T>(p.out, b, h) + n * p.out.stride_N + first);
  const uint4 y =
      *reinterpret_cast<const uint4*>(head_of<T>(p.dout, b, h) + n * p.dout.stride_N + first);
  const uint32_t words[2][4] = {{x.x, x.y, x.z, x.w}, {y.x, y.y, y.z, y.w}};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kIs16Bit<T>) {
      float low[2], high[2];
      for (int k = 0; k < 2; ++k) unpack<T>(words[k][i], &low[k], &high[k]);
      sum = fmaf(low[0], low[1], sum);
      sum = fmaf(high[0], high[1], sum);
    } else {
      sum = fmaf(__uint_as_float(words[0][i]), __uint_as_float(words[1][i]), sum);
    }
  }
#pragma unroll
  for (int32_t other = kLanes / 2; other > 0; other /= 2) {
    sum += __shfl_xor_sync(~0u, sum, other);
  }
  if (is_row && first == 0) p.delta_BNH[row] = sum;
}

}  // namespace

void prepare(const Problem& problem, void* stream) {
  const int64_t num_blocks = int64_t{problem.B} * ceil_div(problem.M, kThreads);
  const dim3 grid(static_cast<unsigned>(num_blocks));
  launch("prepare_tokens", prepare_tokens, grid, kThreads, kThreads, stream, problem);
}

void prepare_backward(const Problem& problem, DType dtype, void* stream) {
  prepare(problem, stream);
  with_types(dtype, problem.D, [&](auto type, auto size) {
    using T = decltype(type);
    constexpr int32_t kLanes = lanes_of_row<T>(size.value);
    const int64_t num_threads = int64_t{problem.B} * problem.N * problem.H * kLanes;
    const dim3 grid(static_cast<unsigned>((num_threads + kThreads - 1) / kThreads));
    launch("sum_rows", sum_rows<T, size.value>, grid, kThreads, 0, stream, problem);
  });
}

}  // namespace longpretrain::cuda
