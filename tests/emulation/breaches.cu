// Kernels and launches that break a rule of CUDA in a way that the emulator itself must notice.
#include "program.h"

namespace emulation = longpretrain::emulation;

namespace {

constexpr uint32_t kAll = ~0u;

template <class Kernel>
void run(Kernel kernel, size_t shared_bytes = 256) {
  emulation::launch("breaking_kernel", kernel, dim3(2), dim3(64), shared_bytes);
}

__global__ void nothing() {}

struct Large {
  char bytes[4097];
};
__global__ void take_large(Large) {}

}  // namespace

LONGPRETRAIN_PART(two_barriers) {
  run(+[] {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  });
}

LONGPRETRAIN_PART(barrier_of_some) {
  run(+[] {
    if (threadIdx.x < 32) __syncthreads();
  });
}

LONGPRETRAIN_PART(two_kinds_of_barrier) {
  run(+[] {
    if (threadIdx.x < 32) {
      __syncthreads_and(1);
    } else {
      __syncthreads_or(1);
    }
  });
}

LONGPRETRAIN_PART(deadlock) {
  run(+[] {
    if (threadIdx.x % 32 < 16) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  });
}

LONGPRETRAIN_PART(two_collectives) {
  run(+[] {
    if (threadIdx.x % 32 < 16) {
      __shfl_xor_sync(kAll, 1, 1);
    } else {
      __ballot_sync(kAll, 1);
    }
  });
}

LONGPRETRAIN_PART(two_masks) {
  run(+[] { __syncwarp(threadIdx.x % 32 < 16 ? kAll : 0xffff0000); });
}

LONGPRETRAIN_PART(not_in_mask) {
  run(+[] { __syncwarp(0x0000ffff); });
}

LONGPRETRAIN_PART(waits_for_ended) {
  run(+[] {
    if (threadIdx.x % 32 == 7) return;
    __syncwarp();
  });
}

LONGPRETRAIN_PART(shuffle_from_outside) {
  run(+[] {
    if (threadIdx.x % 32 < 16) __shfl_sync(0x0000ffff, 1, 20);
  });
}

LONGPRETRAIN_PART(copy_in_flight) {
  run(+[] {
    alignas(16) static char source[16];
    LONGPRETRAIN_SHARED(shared);
    longpretrain::cuda::copy_async_16(shared, source, threadIdx.x == 0);
    longpretrain::cuda::copy_commit();
    if (threadIdx.x != 0) longpretrain::cuda::copy_wait<0>();
  });
}

LONGPRETRAIN_PART(copy_not_committed) {
  run(+[] {
    LONGPRETRAIN_SHARED(shared);
    longpretrain::cuda::copy_async_16(shared, nullptr, false);
    longpretrain::cuda::copy_wait<0>();
  });
}

LONGPRETRAIN_PART(copy_to_odd_place) {
  run(+[] {
    LONGPRETRAIN_SHARED(shared);
    longpretrain::cuda::copy_async_16(shared + 8, nullptr, false);
  });
}

LONGPRETRAIN_PART(copy_past_the_end) {
  run(+[] {
    LONGPRETRAIN_SHARED(shared);
    longpretrain::cuda::copy_async_16(shared + 256, nullptr, false);
  });
}

LONGPRETRAIN_PART(ldmatrix_past_the_end) {
  run(+[] {
    LONGPRETRAIN_SHARED(shared);
    uint32_t fragment[4];
    longpretrain::cuda::ldmatrix_x4<false>(fragment, shared + 16 * threadIdx.x);
  });
}

LONGPRETRAIN_PART(write_into_gap) {
  run(+[] {
    LONGPRETRAIN_SHARED(shared);
    emulation::close_gap(shared + 128);
    __syncthreads();
    if (threadIdx.x == 5) shared[128] = 0;
  });
}

LONGPRETRAIN_PART(write_past_the_end) {
  run(+[] {
    LONGPRETRAIN_SHARED(shared);
    if (threadIdx.x == 5) shared[256] = 0;
  });
}

LONGPRETRAIN_PART(too_much_shared) { run(nothing, (163 << 10) + 1); }

LONGPRETRAIN_PART(as_much_shared_as_there_is) { run(nothing, 163 << 10); }

LONGPRETRAIN_PART(too_many_parameters) {
  emulation::launch("breaking_kernel", take_large, dim3(1), dim3(32), 0, Large{});
}

LONGPRETRAIN_PART(too_many_threads) {
  emulation::launch("breaking_kernel", nothing, dim3(1), dim3(1056), 0);
}

LONGPRETRAIN_PART(half_a_warp) {
  emulation::launch("breaking_kernel", nothing, dim3(1), dim3(48), 0);
}

LONGPRETRAIN_PART(no_blocks) {
  emulation::launch("breaking_kernel", nothing, dim3(1, 0), dim3(32), 0);
}

LONGPRETRAIN_PART(too_many_rows_of_blocks) {
  emulation::launch("breaking_kernel", nothing, dim3(1, 65536), dim3(32), 0);
}
