// CCQ in C: the types' constants, and decoding. Encoding is in ggml-ccq-encode.c.
// Same arithmetic, in the same order, as pyllamaernie/quant/ccq.py, so the bytes are equal; build with -ffp-contract=off.

#include "ggml-ccq-impl.h"

#include <float.h>
#include <math.h>

// clang-format off
const ggml_ccq_code ggml_ccq_codes[4] = {
    {
        { 41823, 13259, 44979, 46863 }, { 0, 0, 0, 0 },
        { { -45, -29, -23, -17, -13, -9, -5, -2, 2, 5, 9, 12, 17, 23, 29, 45 },
          { -50, -25, -19, -11, -8, -6, -3, -1, 1, 4, 8, 9, 12, 18, 27, 51 } },
        { { -5, -5, -5, -5, -1, -1, -1, -1, 1, 1, 1, 1, 5, 5, 5, 5 },
          { -5, -5, -5, -5, -1, -1, -1, -1, 1, 1, 1, 1, 5, 5, 5, 5 } }, 0,
    }, {
        { 5717, 5527, 39011, 50907 }, { 57369, 30377, 16425, 64797 },
        { { -46, -29, -24, -17, -13, -9, -5, -2, 2, 5, 9, 13, 17, 23, 29, 45 },
          { -52, -25, -19, -11, -8, -6, -3, -1, 1, 4, 8, 9, 12, 18, 27, 52 } },
        { { -6, -4, -4, -3, -3, -2, -2, -1, 0, 1, 2, 2, 4, 4, 4, 8 },
          { -10, -4, -4, -3, -3, -2, -2, -1, 0, 1, 2, 2, 4, 4, 4, 11 } }, 1,
    }, {
        { 65071, 45485, 60343, 53725 }, { 18957, 48343, 21225, 6591 },
        { { -46, -29, -23, -17, -12, -9, -5, -2, 2, 5, 9, 12, 17, 22, 29, 46 },
          { -51, -25, -19, -11, -8, -6, -3, -1, 1, 4, 8, 9, 12, 18, 27, 52 } },
        { { -7, -6, -4, -3, -3, -1, -1, 0, 0, 1, 1, 2, 2, 5, 7, 6 },
          { -11, -6, -4, -3, -3, -1, -1, 0, 0, 1, 1, 2, 2, 5, 11, 6 } }, 2,
    }, {
        { 18635, 50727, 32485, 38497 }, { 111, 59539, 36897, 49105 },
        { { -46, -29, -23, -16, -12, -9, -4, -1, 1, 5, 9, 12, 17, 22, 30, 47 },
          { -50, -23, -17, -9, -8, -6, -3, -1, 1, 4, 8, 9, 12, 17, 26, 52 } },
        { { -11, -4, -4, -4, -2, -2, -1, 0, 1, 1, 2, 2, 3, 5, 5, 9 },
          { -12, -4, -4, -4, -2, -2, -1, 0, 1, 1, 2, 2, 3, 5, 5, 11 } }, 3,
    },
};
// clang-format on

static void ccq_unpack_e(const ggml_ccq_code * code, const uint8_t * src, uint8_t * e) {
    memset(e, 0, N_STEPS);
    if (code->e_bits >= 2) {
        for (int b = 0; b < N_STEPS; b++) {
            e[b] = (src[b % 16] >> 2 * (b / 16)) & 3;
        }
        src += 16;
    }
    if (code->e_bits & 1) {
        for (int b = 0; b < N_STEPS; b++) {
            e[b] |= ((src[b % 8] >> (b / 8)) & 1) << (code->e_bits - 1);
        }
    }
}

void ggml_ccq_decode(const ggml_ccq_code * code, const uint8_t * src, int64_t n_blocks, float * y) {
    const size_t size = ccq_block_bytes(code);
    uint8_t      e[N_STEPS];
    for (int64_t i = 0; i < n_blocks; i++, src += size, y += QK_CCQ) {
        const float     d  = ccq_scale(src[0]);
        const uint8_t * qs = src + 2;
        ccq_unpack_e(code, qs + N_STEPS, e);
        for (int p = 0; p < 4; p++) {
            const float dl = d * ccq_levels[(src[1] >> 2 * p) & 3];
            for (int b = 0; b < N_STEPS; b++) {
                y[64 * p + b] = (float) ccq_level(code, src[0] & 1, ccq_index(code, p, qs, e, b)) * dl;
            }
        }
    }
}

void dequantize_row_ccq2(const block_ccq2 * x, float * y, int64_t k) {
    ggml_ccq_decode(&ggml_ccq_codes[0], (const uint8_t *) x, k / QK_CCQ, y);
}

void dequantize_row_ccq2_25(const block_ccq2_25 * x, float * y, int64_t k) {
    ggml_ccq_decode(&ggml_ccq_codes[1], (const uint8_t *) x, k / QK_CCQ, y);
}

void dequantize_row_ccq2_5(const block_ccq2_5 * x, float * y, int64_t k) {
    ggml_ccq_decode(&ggml_ccq_codes[2], (const uint8_t *) x, k / QK_CCQ, y);
}

void dequantize_row_ccq2_75(const block_ccq2_75 * x, float * y, int64_t k) {
    ggml_ccq_decode(&ggml_ccq_codes[3], (const uint8_t *) x, k / QK_CCQ, y);
}

static float ccq_read_f32(const uint8_t * p) {
    const uint32_t bits = p[0] | (uint32_t) p[1] << 8 | (uint32_t) p[2] << 16 | (uint32_t) p[3] << 24;
    float          f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

static float ccq_read_bf16(const uint8_t * p) {
    const uint32_t bits = (uint32_t) p[0] << 16 | (uint32_t) p[1] << 24;
    float          f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

void dequantize_row_ccq2_b(const block_ccq2_b * x, float * y, int64_t k) {
    for (int64_t i = 0; i < k / QK_CCQ_B; i++, y += QK_CCQ_B) {
        const float cs  = ccq_read_f32(x[i].code_scale);
        const float zp5 = ccq_read_f32(x[i].code_zp) + 0.5f;
        const float ss  = ccq_read_bf16(x[i].super_bf16);
        for (int j = 0; j < 128; j++) {
            const float    t = floorf(fmaf((float) x[i].qs[j], cs, zp5));
            const unsigned v = fabsf(t) < 1073741824.0f ? (unsigned) (int) t : 0;  // also for NaN
            const int      g = j / 16;
            const float    s = (float) ((x[i].ls[g / 2] >> (g % 2 ? 0 : 4)) & 15) * ss;
            for (int r = 0; r < 4; r++) {
                y[4 * j + r] = (float) ((int) ((v >> (9 - 3 * r)) & 63) - 32) * s;
            }
        }
    }
}

int64_t ggml_ccq_find_bad(const float * x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        if (!(fabsf(x[i]) <= FLT_MAX)) {
            return i;
        }
    }
    return -1;
}

int64_t ggml_ccq2_b_find_bad(const block_ccq2_b * x, int64_t n_blocks) {
    for (int64_t i = 0; i < n_blocks; i++) {
        const float values[3] = { ccq_read_f32(x[i].code_scale), ccq_read_f32(x[i].code_zp),
            ccq_read_bf16(x[i].super_bf16) };
        if (ggml_ccq_find_bad(values, 3) >= 0) {
            return i;
        }
    }
    return -1;
}

int ggml_ccq_validate(int id, const void * data, size_t n_blocks) {
    return id != 116 || ggml_ccq2_b_find_bad(data, (int64_t) n_blocks) < 0;
}
