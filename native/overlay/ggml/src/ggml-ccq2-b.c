// Encoding Baidu's code with one code_scale for all blocks: good enough for tests. Checkpoints in it are imported.

#include "ggml-ccq-impl.h"

#include <float.h>
#include <math.h>

#define CCQ_B_SCALE 120.0f                             // the best single code_scale for Gaussian weights
#define CCQ_B_ZERO  (16384.0f - 127.5f * CCQ_B_SCALE)  // centres the words

static void ccq2_b_best(
    const int8_t (*codes)[4], const float * x, const float * w, float scale, uint8_t * qs, double * xy, double * yy) {
    *xy = 0;
    *yy = 0;
    for (int j = 0; j < 16; j++) {
        float low = FLT_MAX;
        for (int q = 0; q < 256; q++) {
            float error = 0;
            for (int r = 0; r < 4; r++) {
                const float v = scale * (float) codes[q][r];
                error += w[4 * j + r] * (v * (v - 2.0f * x[4 * j + r]));
            }
            if (error < low) {
                low   = error;
                qs[j] = (uint8_t) q;
            }
        }
        for (int r = 0; r < 4; r++) {
            const double y = codes[qs[j]][r];
            *xy += (double) w[4 * j + r] * (double) x[4 * j + r] * y;
            *yy += (double) w[4 * j + r] * y * y;
        }
    }
}

static void ccq2_b_encode_block(const int8_t (*codes)[4], const float * x, const float * w, block_ccq2_b * block) {
    float scale[8];
    float largest = 0;
    for (int g = 0; g < 8; g++) {
        double xy;
        double yy;
        double xx = 0;
        for (int i = 0; i < 64; i++) {
            xx += (double) x[64 * g + i] * (double) x[64 * g + i];
        }
        scale[g] = (float) (0.06 * sqrt(xx / 64));
        ccq2_b_best(codes, x + 64 * g, w + 64 * g, scale[g], block->qs + 16 * g, &xy, &yy);
        scale[g] = yy > 0 && xy > 0 ? (float) (xy / yy) : 0.0f;
        largest  = scale[g] > largest ? scale[g] : largest;
    }
    uint32_t    bits;
    const float unit = largest / 15.0f;
    memcpy(&bits, &unit, sizeof(bits));
    bits = (bits + 0x8000) & 0xFFFF0000;
    float super;
    memcpy(&super, &bits, sizeof(super));
    block->super_bf16[0] = (uint8_t) (bits >> 16);
    block->super_bf16[1] = (uint8_t) (bits >> 24);
    memset(block->ls, 0, sizeof(block->ls));
    for (int g = 0; g < 8; g++) {
        double      xy;
        double      yy;
        const float ratio = super > 0 ? scale[g] / super + 0.5f : 0.0f;
        const int   local = ratio < 15.0f ? (int) ratio : 15;
        block->ls[g / 2] |= (uint8_t) (local << (g % 2 ? 0 : 4));
        ccq2_b_best(codes, x + 64 * g, w + 64 * g, (float) local * super, block->qs + 16 * g, &xy, &yy);
    }
}

size_t quantize_ccq2_b(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    const float scale = CCQ_B_SCALE;
    const float zero  = CCQ_B_ZERO;
    int8_t      codes[256][4];
    for (int q = 0; q < 256; q++) {
        const int v = (int) floorf(fmaf((float) q, scale, zero + 0.5f));
        for (int r = 0; r < 4; r++) {
            codes[q][r] = (int8_t) (((v >> (9 - 3 * r)) & 63) - 32);
        }
    }
    block_ccq2_b * out = dst;
    float          cx[QK_CCQ_B];
    float          cw[QK_CCQ_B];
    for (int64_t i = 0; i < nrows * (n_per_row / QK_CCQ_B); i++, out++) {
        const int64_t first = i % (n_per_row / QK_CCQ_B) * QK_CCQ_B;
        for (int half = 0; half < 2; half++) {
            ggml_ccq_clean(src + QK_CCQ_B * i + QK_CCQ * half, imatrix ? imatrix + first + QK_CCQ * half : NULL,
                cx + QK_CCQ * half, cw + QK_CCQ * half);
        }
        memcpy(out->code_scale, &scale, sizeof(scale));
        memcpy(out->code_zp, &zero, sizeof(zero));
        ccq2_b_encode_block((const int8_t (*)[4]) codes, cx, cw, out);
    }
    return (size_t) (nrows * (n_per_row / QK_CCQ_B)) * sizeof(block_ccq2_b);
}

void quantize_row_ccq2_b_ref(const float * x, void * y, int64_t k) {
    quantize_ccq2_b(x, y, 1, k, NULL);
}
