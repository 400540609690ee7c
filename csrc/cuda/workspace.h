// The scratch memory of a call on the device: what lies in it and where. Host code.
//
// Letters: see ../attention.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../attention.h"

namespace longpretrain::cuda {

constexpr int32_t kSlotTile = 16;   // slots of global tokens that a block takes together
constexpr int32_t kTokenTile = 64;  // tokens that it reads at once

// The tokens of a sequence in `count` chunks of `size`, a multiple of kTokenTile.
struct Chunks {
  int32_t size, count;
};

// Work on global tokens runs over whole sequences: blocks share one, and their partial results are
// summed up afterwards. More blocks fill the device, fewer leave less to store and sum up. Never a
// function of the batch: a sequence gives the same bits in any batch.
Chunks chunks_of_global_rows(int64_t M, int64_t H, int64_t G);           // of keys
Chunks chunks_of_global_rows_backward(int64_t M, int64_t H, int64_t G);  // of keys
Chunks chunks_of_global_columns(int64_t N, int64_t H, int64_t G);        // of queries

struct Workspace {
  size_t num_bytes = 0;
  uint8_t* flags_BM = nullptr;
  int32_t* slot_position_BG = nullptr;                               // null without global tokens
  int32_t *document_begin_BM = nullptr, *document_end_BM = nullptr;  // null without documents
  float* delta_BNH = nullptr;                                        // null in the forward pass
  float* partials = nullptr;  // of work on global tokens; null without
};

// `memory` is aligned to 256 bytes. With a null one only num_bytes means something.
Workspace lay_out(const AttentionParams& params, bool backward, void* memory);

}  // namespace longpretrain::cuda
