// What one call of the operator hands to a backend, and the backends' entry points.
//
// Plain structs of raw pointers: this file and all kernels know no torch. The operator itself is
// defined by longpretrain/attention/reference.py; bindings.cpp fills these structs.
//
// Letters: B batch row, N query, M key, H head, D number of a head, G slot of a global token.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace longpretrain {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

// [B, N, H, D] of the call's dtype. Strides count elements; the numbers of a head lie side by side.
struct TensorBNHD {
  void* data = nullptr;
  int64_t stride_B = 0, stride_N = 0, stride_H = 0;
};

struct AttentionParams {
  DType dtype = DType::kFloat32;
  int64_t B = 0;
  int64_t N = 0;  // rows of q
  int64_t M = 0;  // keys; q's row i sits at the key position q_offset + i
  int64_t H = 0, D = 0;
  int64_t G = 0;  // slots of global tokens; 0: there are none and the *_global tensors are null
  int64_t q_offset = 0;
  int64_t one_sided_window = 0;         // in steps of the head's dilation
  const int64_t* dilation_H = nullptr;  // on the host, each at least 1
  bool causal = false;
  float scale = 1.0f;      // of the scores; may be negative
  int32_t drop_below = 0;  // a weight is dropped when its byte is below; 0 to 255

  TensorBNHD q, k, v;                       // q: N rows; k and v: M rows
  TensorBNHD q_global, k_global, v_global;  // G, M and M rows
  TensorBNHD out;                           // N rows
  float* lse_BNH = nullptr;  // natural log-sum-exp, contiguous; +inf: row without keys

  // Contiguous; null when the caller gave none.
  const uint8_t* padding_BM = nullptr;       // other than 0: padding
  const int64_t* document_BM = nullptr;      // never falls along a row
  const int64_t* global_index_BG = nullptr;  // key position, or -1 in an unused slot
  const int64_t* dropout_seed_B = nullptr;
};

// `out` and `lse_BNH` are inputs here. All gradients are written in full, none is read.
struct AttentionBackwardParams : AttentionParams {
  TensorBNHD dout;                             // N rows
  TensorBNHD dq, dk, dv;                       // N, M, M rows
  TensorBNHD dq_global, dk_global, dv_global;  // G, M, M rows; null data when G == 0
};

// Runs body(context, task) once for each task in [0, num_tasks), in any order, possibly at once,
// and returns when all have run. The CPU kernels bring no threads of their own.
using ParallelFor = void (*)(int64_t num_tasks, void (*body)(void* context, int64_t task),
                             void* context);

// Instruction sets the CPU kernels are compiled for; kPlain is C++ without intrinsics.
enum class CpuLevel : int32_t { kPlain, kAvx2, kAvx512, kAvx512Bf16 };

// The level in use: the best compiled one that the processor has, at most the one named by the
// environment variable LONGPRETRAIN_CPU_LEVEL (plain, avx2, avx512, avx512_bf16) if that is set.
CpuLevel cpu_level();
bool cpu_level_compiled(CpuLevel level);
bool cpu_level_runs(CpuLevel level);  // whether this processor has what it needs
const char* cpu_level_name(CpuLevel level);

constexpr int64_t kLargestHeadSize = 128;      // of the CPU kernels; those for CUDA: 32, 64 or 128
constexpr int64_t kLargestSequence = 1 << 29;  // keys: positions are int32 inside

// Throw std::bad_alloc when there is no memory for scratch; invariants are the caller's.
void attention_forward_cpu(const AttentionParams& params, ParallelFor parallel_for);
void attention_backward_cpu(const AttentionBackwardParams& params, ParallelFor parallel_for);

// Put the kernels on a stream (a cudaStream_t) of the current device, and return. All pointers but
// dilation_H are of that device; bases and strides of [B, N, H, D] tensors are multiples of 16
// bytes. The workspace, aligned to 256 bytes, belongs to the kernels until the stream has done
// them. No value is refused: a slot whose global_index_BG is out of range or named before is taken
// for an unused one. Throw std::runtime_error when a launch fails.
size_t cuda_workspace_bytes(const AttentionParams& params, bool backward);
void attention_forward_cuda(const AttentionParams& params, void* workspace, void* stream);
void attention_backward_cuda(const AttentionBackwardParams& params, void* workspace, void* stream);

// Why the current device cannot run them, in words; empty when it can.
std::string cuda_why_not();
// The chips they were compiled for, or "emulated".
std::string cuda_kernels();

}  // namespace longpretrain
