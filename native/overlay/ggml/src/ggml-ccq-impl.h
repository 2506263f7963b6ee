#pragma once

// What the C sources of CCQ share: the numbers of a block, its path, and the search's tables. Nobody else includes it.

#include "ggml-ccq.h"

#include <string.h>

#define N_STEPS  64
#define N_STATES 256
#ifndef CCQ_E_BITS_MAX  // bench/settled/ccq_trials.py wants one more
#define CCQ_E_BITS_MAX 3
#endif

static const float ccq_levels[4] = { 13 / 16.0f, 15 / 16.0f, 17 / 16.0f, 21 / 16.0f };

static inline float ccq_scale(uint8_t d) {
    if (d < 2) {
        return 0.0f;
    }
    const uint32_t bits = ((uint32_t) (d & 254) << 19) + (107u << 23);
    float          scale;
    memcpy(&scale, &bits, sizeof(scale));
    return scale;
}

static inline size_t ccq_block_bytes(const ggml_ccq_code * code) {
    return 2 + N_STEPS + 8 * (size_t) code->e_bits;
}

static inline unsigned ccq_index(const ggml_ccq_code * code, int p, const uint8_t * qs, const uint8_t * e, int b) {
    const unsigned window = qs[b] | (unsigned) qs[(b + 1) % N_STEPS] << 8;
    return ((window * code->k[p] + (unsigned) e[b] * code->m[p]) & 0xFFFF) >> 8;
}

static inline int ccq_level(const ggml_ccq_code * code, int table, unsigned h) {
    return code->t1[table][h >> 4] + code->t2[table][h & 15];
}

// what a search knows of a type
typedef struct {
    const ggml_ccq_code * code;
    int                   n_rows;             // 256 << e_bits
    float                 sigma[2];           // root mean square of the levels of a table
    float                 y[2][4][N_STATES];  // levels of a table and plane, in the order of rotation
    uint8_t               start[N_STATES << CCQ_E_BITS_MAX][4];  // where a row starts
} ccq_trellis;

typedef struct {
    uint8_t d;
    uint8_t level[4];
    uint8_t qs[N_STEPS];
    uint8_t e[N_STEPS];
} ccq_path;

void ggml_ccq_trellis_init(ccq_trellis * t, const ggml_ccq_code * code);

// The best path for the table (bit 0 of path->d) and for planes that are gain[p] times its levels; beam: states kept.
void ggml_ccq_search(
    const ccq_trellis * t, const float * x, const float * w, const float * gain, int beam, ccq_path * path);

// 256 weights as a search takes them: finite values, importances of at most 1; all equal if none is positive.
void ggml_ccq_clean(const float * x, const float * weights, float * cx, float * cw);
