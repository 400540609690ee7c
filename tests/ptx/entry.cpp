// The operator's entry points for ctypes (calls.py).
#include <exception>
#include <string>

#include "attention.h"
#include "cuda/workspace.h"

using longpretrain::AttentionBackwardParams;
using longpretrain::AttentionParams;

extern "C" {

size_t bytes_of_params(bool backward) {
  return backward ? sizeof(AttentionBackwardParams) : sizeof(AttentionParams);
}

// Fills in where each part of the workspace lies (null: there is none), and returns its size.
size_t workspace_parts(const AttentionParams* params, bool backward, void* memory, void** parts) {
  const auto found = longpretrain::cuda::lay_out(*params, backward, memory);
  parts[0] = found.flags_BM;
  parts[1] = found.document_begin_BM;
  parts[2] = found.document_end_BM;
  parts[3] = found.delta_BNH;
  parts[4] = found.slot_position_BG;
  parts[5] = found.partials;
  return found.num_bytes;
}

// What went wrong, or null.
const char* call(const AttentionParams* params, bool backward, void* workspace) {
  static std::string what;
  try {
    if (backward) {
      longpretrain::attention_backward_cuda(*static_cast<const AttentionBackwardParams*>(params),
                                            workspace, nullptr);
    } else {
      longpretrain::attention_forward_cuda(*params, workspace, nullptr);
    }
    return nullptr;
  } catch (const std::exception& error) {
    what = error.what();
    return what.c_str();
  }
}

}  // extern "C"
