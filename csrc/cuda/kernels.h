// The kernels' launchers: all that operator.cu calls, in its order. Each does its part for the
// heads and batch rows that the problem names; `stream` is a cudaStream_t.
#pragma once

#include "problem.h"

namespace longpretrain::cuda {

// prepare.cu: the marks of tokens; for the backward pass delta too. Of all heads and rows at once.
void prepare(const Problem& problem, void* stream);
void prepare_backward(const Problem& problem, DType dtype, void* stream);

// forward.cu: out and lse of all rows but those of global tokens.
void window_forward(const Problem& problem, DType dtype, void* stream);

// global_rows.cu: out and lse of the rows of global tokens.
void global_rows(const Problem& problem, DType dtype, void* stream);

// backward_keys.cu, backward_queries.cu: dk and dv of all keys but global tokens, dq of all rows;
// what is written of padding and of the queries' global rows is zeros.
void window_backward_keys(const Problem& problem, DType dtype, void* stream);
void window_backward_queries(const Problem& problem, DType dtype, void* stream);

// global_rows_backward.cu: dq_global, dk_global and dv_global. global_columns.cu: dk and dv of
// global tokens. They use the same scratch memory one after the other.
void global_rows_backward(const Problem& problem, DType dtype, void* stream);
void global_columns_backward(const Problem& problem, DType dtype, void* stream);

}  // namespace longpretrain::cuda
