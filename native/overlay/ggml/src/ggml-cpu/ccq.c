// Products of CCQ rows with Q8_K rows. Every path adds the same integers and then the same floats in the same order, so
// all give the same bits; build with -ffp-contract=off. The path is chosen by the compiler's target.

#include "ccq.h"

#include <math.h>
#include <string.h>

#define N_GROUP 8  // rows that a path takes at a time

// upstream's block_q8_K
typedef struct {
    float   d;
    int8_t  qs[QK_CCQ];
    int16_t bsums[QK_CCQ / 16];  // sums of 16 values each
} ccq_q8_k;
CCQ_STATIC_ASSERT(sizeof(ccq_q8_k) == 292, "wrong size of a Q8_K block");

// the parameters of half a CCQ2_B block: 256 weights that share them
typedef struct {
    float           code_scale;
    float           zero;      // code_zp + 0.5
    const uint8_t * qs;        // 64 codes
    int             local[4];  // scales of 64 weights each
} ccq2_b_half;

static const int ccq_level[4] = { 13, 15, 17, 21 };  // of a plane, in sixteenths

// the block's scale over 16
static inline float ccq_scale16(uint8_t d) {
    const uint32_t bits = d < 2 ? 0 : ((uint32_t) (d & 254) << 19) + (103u << 23);
    float          scale;
    memcpy(&scale, &bits, sizeof(scale));
    return scale;
}

// A path defines
//   ccq_tables, ccq_load_tables: a type's tables in registers, the first one with an offset added to it
//   ccq_store_block: 256 weights in units of the plane's level plus that offset
//   ccq_dot_group:   up to N_GROUP rows of a native type with one row of activations
//   ccq2_b_dot:      integer part of half a block of CCQ2_B
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
#include "ccq-avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "ccq-avx2.h"
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include "ccq-neon.h"
#else
#include "ccq-portable.h"
#endif

const char * ggml_ccq_cpu_path(void) {
    return CCQ_PATH;
}

// ---------------------------------------------------------------- native types

static inline void ccq_dot_rows(
    int n, float * s, const uint8_t * x, size_t row_bytes, int n_rows, const ccq_q8_k * y, const int e_bits) {
    const ccq_tables tables = ccq_load_tables(&ggml_ccq_codes[e_bits], 64);
    for (int r = 0; r < n_rows; r += N_GROUP) {
        const int n_group = n_rows - r < N_GROUP ? n_rows - r : N_GROUP;
        ccq_dot_group(&tables, n, s + r, x + r * row_bytes, row_bytes, n_group, y, e_bits);
    }
}

static inline void ccq_unpack_rows(const uint8_t * x, size_t row_bytes, int n_rows, float * d, int32_t * scales,
    int scale_stride, uint8_t * q, int q_stride, const int e_bits) {
    const ccq_tables tables = ccq_load_tables(&ggml_ccq_codes[e_bits], 128);
    for (int r = 0; r < n_rows; r++, x += row_bytes) {
        d[r] = ccq_scale16(x[0]);
        for (int i = 0; i < 8; i++) {
            scales[r * scale_stride + i] = ccq_level[x[1] >> 2 * (i / 2) & 3];
        }
        ccq_store_block(&tables, x, e_bits, q + r * q_stride);
    }
}

// ---------------------------------------------------------------- CCQ2_B

static void ccq2_b_dot_row(int n, float * s, const block_ccq2_b * x, const ccq_q8_k * y) {
    float sum = 0;
    for (int i = 0; i < n / QK_CCQ_B; i++) {
        ccq2_b_half half;
        uint16_t    bf16;
        memcpy(&half.code_scale, x[i].code_scale, sizeof(half.code_scale));
        memcpy(&half.zero, x[i].code_zp, sizeof(half.zero));
        memcpy(&bf16, x[i].super_bf16, sizeof(bf16));
        half.zero += 0.5f;
        const uint32_t bits = (uint32_t) bf16 << 16;
        float          super;
        memcpy(&super, &bits, sizeof(super));
        for (int h = 0; h < 2; h++) {
            half.qs = x[i].qs + 64 * h;
            for (int g = 0; g < 4; g++) {
                half.local[g] = x[i].ls[2 * h + g / 2] >> (g % 2 ? 0 : 4) & 15;
            }
            sum += super * y[2 * i + h].d * (float) ccq2_b_dot(&half, &y[2 * i + h]);
        }
    }
    *s = sum;
}

// ---------------------------------------------------------------- entries

bool ggml_ccq_dot_rows(int id, int n, float * s, const void * x, size_t row_bytes, int n_rows, const void * y) {
    switch (id) {
        case 112: ccq_dot_rows(n, s, x, row_bytes, n_rows, y, 0); return true;
        case 113: ccq_dot_rows(n, s, x, row_bytes, n_rows, y, 1); return true;
        case 114: ccq_dot_rows(n, s, x, row_bytes, n_rows, y, 2); return true;
        case 115: ccq_dot_rows(n, s, x, row_bytes, n_rows, y, 3); return true;
        case 116:
            for (int r = 0; r < n_rows; r++) {
                ccq2_b_dot_row(n, s + r, (const block_ccq2_b *) ((const char *) x + r * row_bytes), y);
            }
            return true;
        default: return false;
    }
}

int ggml_ccq_chunk_rows(int id, int chunk_rows) {
    return id >= 112 && id <= 116 ? 512 : chunk_rows;
}

void ggml_ccq_unpack_rows(int id, const void * x, size_t row_bytes, int n_rows, float * d, int32_t * scales,
    int scale_stride, uint8_t * q, int q_stride) {
    switch (id) {
        case 112: ccq_unpack_rows(x, row_bytes, n_rows, d, scales, scale_stride, q, q_stride, 0); break;
        case 113: ccq_unpack_rows(x, row_bytes, n_rows, d, scales, scale_stride, q, q_stride, 1); break;
        case 114: ccq_unpack_rows(x, row_bytes, n_rows, d, scales, scale_stride, q, q_stride, 2); break;
        case 115: ccq_unpack_rows(x, row_bytes, n_rows, d, scales, scale_stride, q, q_stride, 3); break;
    }
}

#define CCQ_VEC_DOT(name, id)                                                                                          \
    void ggml_vec_dot_##name##_q8_K(                                                                                   \
        int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc) {                \
        (void) bs;                                                                                                     \
        (void) bx;                                                                                                     \
        (void) by;                                                                                                     \
        (void) nrc;                                                                                                    \
        ggml_ccq_dot_rows(id, n, s, vx, 0, 1, vy);                                                                     \
    }

CCQ_VEC_DOT(ccq2, 112)
CCQ_VEC_DOT(ccq2_25, 113)
CCQ_VEC_DOT(ccq2_5, 114)
CCQ_VEC_DOT(ccq2_75, 115)
CCQ_VEC_DOT(ccq2_b, 116)
