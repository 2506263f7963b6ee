#pragma once

// Plain C, as the formats are written down.

#define CCQ_PATH "portable"

typedef struct {
    const ggml_ccq_code * code;
    int                   offset;
} ccq_tables;

static inline ccq_tables ccq_load_tables(const ggml_ccq_code * code, int offset) {
    return (ccq_tables) { code, offset };
}

static inline void ccq_store_block(const ccq_tables * tables, const uint8_t * x, const int e_bits, uint8_t * q) {
    const ggml_ccq_code * code = tables->code;
    const uint8_t *       qs   = x + 2;
    const uint8_t *       rest = x + 66;
    const int8_t *        t1   = code->t1[x[0] & 1];
    const int8_t *        t2   = code->t2[x[0] & 1];
    for (int b = 0; b < 64; b++) {
        unsigned e = 0;
        if (e_bits >= 2) {
            e = (rest[b % 16] >> 2 * (b / 16)) & 3;
        }
        if (e_bits & 1) {
            e |= (unsigned) ((rest[16 * (e_bits / 2) + b % 8] >> (b / 8)) & 1) << (e_bits - 1);
        }
        const unsigned window = qs[b] | (unsigned) qs[(b + 1) % 64] << 8;
        for (int p = 0; p < 4; p++) {
            const unsigned h = ((window * code->k[p] + e * code->m[p]) & 0xFFFF) >> 8;
            q[64 * p + b]    = (uint8_t) (t1[h >> 4] + t2[h & 15] + tables->offset);
        }
    }
}

static inline void ccq_dot_group(const ccq_tables * tables, int n, float * s, const uint8_t * x, size_t row_bytes,
    int n_rows, const ccq_q8_k * y, const int e_bits) {
    const size_t size = 66 + 8 * (size_t) e_bits;
    for (int r = 0; r < n_rows; r++) {
        const uint8_t * block = x + r * row_bytes;
        s[r]                  = 0;
        for (int i = 0; i < n / QK_CCQ; i++, block += size) {
            uint8_t q[QK_CCQ];
            ccq_store_block(tables, block, e_bits, q);
            int32_t total = 0;
            for (int p = 0; p < 4; p++) {
                int32_t plane = 0;
                for (int b = 0; b < 64; b++) {
                    plane += (q[64 * p + b] - tables->offset) * y[i].qs[64 * p + b];
                }
                total += ccq_level[block[1] >> 2 * p & 3] * plane;
            }
            s[r] += ccq_scale16(block[0]) * y[i].d * (float) total;
        }
    }
}

static inline int32_t ccq2_b_dot(const ccq2_b_half * x, const ccq_q8_k * y) {
    int32_t total = 0;
    for (int g = 0; g < 4; g++) {
        int32_t group = 0;
        for (int j = 0; j < 16; j++) {
            const float    t = floorf(fmaf((float) x->qs[16 * g + j], x->code_scale, x->zero));
            const unsigned v = fabsf(t) < 1073741824.0f ? (unsigned) (int) t : 0;
            for (int r = 0; r < 4; r++) {
                group += ((int) ((v >> (9 - 3 * r)) & 63) - 32) * y->qs[64 * g + 4 * j + r];
            }
        }
        total += group * x->local[g];
    }
    return total;
}
