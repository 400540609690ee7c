#include <algorithm>
#include <cfloat>
#include <cmath>

#include "problem.h"

namespace longpretrain::cuda {

dim3 window_grid(const Problem& problem, int32_t tile_steps, bool of_keys) {
  int64_t most = 0;
  for (int32_t i = 0; i < problem.num_heads; ++i) {
    const int32_t d = problem.dilation[i];
    const int32_t first = of_keys ? 0 : problem.q_offset / d / tile_steps;
    const int32_t end = ceil_div(of_keys ? problem.M : problem.q_offset + problem.N, d);
    most = std::max(most, int64_t{d} * (ceil_div(end, tile_steps) - first));
  }
  return dim3(static_cast<unsigned>(most), static_cast<unsigned>(problem.num_heads),
              static_cast<unsigned>(problem.num_b));
}

Problem make_problem(const AttentionParams& params, const Workspace& workspace) {
  constexpr float kLog2E = 1.44269504f;
  Problem p{};
  p.q = params.q;
  p.k = params.k;
  p.v = params.v;
  p.q_global = params.q_global;
  p.k_global = params.k_global;
  p.v_global = params.v_global;
  p.out = params.out;
  p.lse_BNH = params.lse_BNH;
  p.B = static_cast<int32_t>(params.B);
  p.N = static_cast<int32_t>(params.N);
  p.M = static_cast<int32_t>(params.M);
  p.H = static_cast<int32_t>(params.H);
  p.D = static_cast<int32_t>(params.D);
  p.G = static_cast<int32_t>(params.G);
  p.q_offset = static_cast<int32_t>(params.q_offset);
  p.window = static_cast<int32_t>(std::min(params.one_sided_window, params.M));
  p.causal = params.causal;
  p.scale = params.scale;
  // With the smallest number for a scale of 0 a masked score stays -inf, and all others become 0.
  p.log2_scale = std::max(std::fabs(params.scale) * kLog2E, FLT_MIN);
  p.sign = params.scale < 0.0f ? -1.0f : 1.0f;
  p.drop_below = params.drop_below;
  p.kept_scale = 256.0f / static_cast<float>(256 - params.drop_below);
  p.padding_BM = params.padding_BM;
  p.document_BM = params.document_BM;
  p.global_index_BG = params.global_index_BG;
  p.dropout_seed_B = params.dropout_seed_B;
  p.flags_BM = workspace.flags_BM;
  p.slot_position_BG = workspace.slot_position_BG;
  p.document_begin_BM = workspace.document_begin_BM;
  p.document_end_BM = workspace.document_end_BM;
  p.delta_BNH = workspace.delta_BNH;
  p.partials = workspace.partials;
  return p;
}

Problem make_problem(const AttentionBackwardParams& params, const Workspace& workspace) {
  Problem p = make_problem(static_cast<const AttentionParams&>(params), workspace);
  p.dout = params.dout;
  p.dq = params.dq;
  p.dk = params.dk;
  p.dv = params.dv;
  p.dq_global = params.dq_global;
  p.dk_global = params.dk_global;
  p.dv_global = params.dv_global;
  return p;
}

}  // namespace longpretrain::cuda
