// How one call is cut into tasks, worked out once at the start of the call.
//
// The keys and queries of one head with dilation d fall into d residue classes, position % d; each
// class is an undilated problem whose t-th token sits at position residue + t * d. A class is cut
// into chunks of queries. Everything here depends on the call alone, never on threads: that is what
// makes results equal bit for bit for any number of them.
//
// These structs are plain data because the kernels that read them are compiled once for every
// instruction set: a standard container used there could end up, compiled for AVX-512, in code that
// runs everywhere.
//
// Letters: see attention.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../attention.h"

namespace longpretrain::cpu {

enum class Work : int32_t {
  kWindow,         // a chunk of queries and the keys of their windows, global keys included
  kGlobalRows,     // the global queries of one batch row and head, and all keys
  kGlobalColumns,  // sums up what the chunks found for the gradients of the global keys
};

struct Task {
  Work work;
  int32_t b, h;
  // kWindow: the queries [first_query, end_query), counted in steps, of some residue classes,
  // worked through one after the other. Numbers outside of a class are cut off.
  int32_t first_residue, end_residue;
  int32_t first_query, end_query;
  // Backward: keys near a chunk's end receive gradients from the next chunk too. Even chunks run
  // first and leave their share in a buffer, odd ones add theirs to it. -1: no neighbour there.
  int32_t left_edge, right_edge;
  int32_t phase;
  // Backward: where the gradients of the global keys go, and in kGlobalColumns which to add up.
  int32_t first_partial, end_partial;
};

constexpr uint8_t kPadding = 1, kGlobal = 2;  // flags of a token; a global token is no padding

struct Plan {
  const AttentionParams* params;
  const AttentionBackwardParams* backward;  // null in the forward pass
  int32_t window;                           // steps; at most the number of keys
  float kept_scale;                         // of weights that dropout keeps
  const uint8_t* flags_BM;
  // First position of a token's document, and one past its last; null without documents.
  const int32_t *document_begin_BM, *document_end_BM;
  // The global tokens of batch row b are those numbered slot_begin_B[b] to slot_begin_B[b + 1].
  const int32_t *slot_begin_B, *slot_number, *slot_position;
  int32_t most_slots;     // of any batch row
  int32_t longest_chunk;  // queries
  int32_t padded_head_size;
  // Scratch of the backward pass, shared by tasks (floats; Dp is the padded head size):
  float* edges;     // [edge][dk, dv][2 * window][Dp]
  float* partials;  // [partial][dk, dv][most_slots][Dp]

  int32_t slots_of(int64_t b) const { return slot_begin_B[b + 1] - slot_begin_B[b]; }
  float* edge(int32_t number) const {
    return edges + int64_t{number} * 4 * window * padded_head_size;
  }
  float* partial(int32_t number) const {
    return partials + int64_t{number} * 2 * most_slots * padded_head_size;
  }
};

constexpr int32_t kChunk = 2048;    // queries of a chunk, at least
constexpr int32_t kQueryTile = 32;  // chunks are multiples of it
constexpr int32_t kSixteen = 16;    // keys of one call of the random generator

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t multiple) { return ceil_div(a, multiple) * multiple; }

// Scratch of the running thread, kept from call to call so that its pages stay mapped.
// Uninitialised, aligned to 64 bytes; one at a time per thread.
char* thread_scratch(size_t num_bytes);

}  // namespace longpretrain::cpu

// The kernels of each instruction set run single tasks.
#define LONGPRETRAIN_DECLARE_LEVEL(level)                           \
  namespace longpretrain::level {                                   \
  void forward_task(const cpu::Plan& plan, const cpu::Task& task);  \
  void backward_task(const cpu::Plan& plan, const cpu::Task& task); \
  }
LONGPRETRAIN_DECLARE_LEVEL(plain)
LONGPRETRAIN_DECLARE_LEVEL(avx2)
LONGPRETRAIN_DECLARE_LEVEL(avx512)
LONGPRETRAIN_DECLARE_LEVEL(avx512_bf16)
#undef LONGPRETRAIN_DECLARE_LEVEL
