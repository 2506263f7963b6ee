#pragma once

// Products of CCQ rows with rows of Q8_K.

#include "../ggml-ccq.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

// ggml's vec_dot
// clang-format off
void ggml_vec_dot_ccq2_q8_K   (int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
void ggml_vec_dot_ccq2_25_q8_K(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
void ggml_vec_dot_ccq2_5_q8_K (int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
void ggml_vec_dot_ccq2_75_q8_K(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
void ggml_vec_dot_ccq2_b_q8_K (int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
// clang-format on

// The same for n_rows rows, row_bytes apart, of the type with this id; false if it is none of ours. Several rows at a
// time take two thirds of the time.
bool ggml_ccq_dot_rows(int id, int n, float * s, const void * x, size_t row_bytes, int n_rows, const void * y);

// How many rows a thread should take before it takes others: what upstream says, or more for ours, whose read-ahead is
// lost where a thread begins anew. Chunks of 64 rows that two threads take in turns cost 60 % more, of 512 rows 7 %.
int ggml_ccq_chunk_rows(int id, int chunk_rows);

// One block of each of n_rows rows of a native type, for products with many rows of activations: weight i of row r is
// d[r] * scales[r*scale_stride + i/32] * (q[r*q_stride + i] - 128).
void ggml_ccq_unpack_rows(int id, const void * x, size_t row_bytes, int n_rows, float * d, int32_t * scales,
    int scale_stride, uint8_t * q, int q_stride);

// Which of the paths this was compiled with: "avx512-vbmi", "avx512", "avx2", "neon-dotprod", "neon" or "portable".
const char * ggml_ccq_cpu_path(void);

#ifdef __cplusplus
}
#endif
