// Which tokens a block of a window kernel takes, asked of any block of a grid too large to run.
#include "cuda/problem.h"
#include "program.h"

namespace emulation = longpretrain::emulation;
using longpretrain::cuda::Problem;
using longpretrain::cuda::WindowBlock;

namespace {

// found: the block's first step, the end of its class, and the positions of two of its steps.
__global__ void ask(const Problem p, uint32_t block, int32_t tile_steps, int32_t* found) {
  if (threadIdx.x != 0) return;
  blockIdx.x = block;
  const WindowBlock mine(p, tile_steps, false);
  found[0] = mine.first_step;
  found[1] = mine.tokens.end_query;
  found[2] = mine.tokens.position(mine.first_step);
  found[3] = mine.tokens.position(mine.first_step + tile_steps - 1);
}

// Arguments: tokens, dilation, block, steps of a tile.
LONGPRETRAIN_PART(block_of_window) {
  Problem p{};
  p.B = p.H = p.num_b = p.num_heads = 1;
  p.N = p.M = static_cast<int32_t>(arguments[0]);
  p.dilation[0] = static_cast<int32_t>(arguments[1]);
  std::vector<int32_t> found(4);
  emulation::launch("ask", ask, dim3(1), dim3(32), 0, p, static_cast<uint32_t>(arguments[2]),
                    static_cast<int32_t>(arguments[3]), found.data());
  write_output(found);
}

}  // namespace
