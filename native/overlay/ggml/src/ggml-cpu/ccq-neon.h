#pragma once

// NEON of 64-bit ARM; its dot product instructions where the target has them. A register holds 16 steps of a plane.

#include <arm_neon.h>

#if defined(__ARM_FEATURE_DOTPROD)
#define CCQ_PATH "neon-dotprod"
#else
#define CCQ_PATH "neon"
#endif

typedef struct {
    const ggml_ccq_code * code;
    int8x16_t             t1[2];  // by h >> 4
    int8x16_t             t2[2];  // by h & 15
    uint8x16_t            offset;
} ccq_tables;

static inline ccq_tables ccq_load_tables(const ggml_ccq_code * code, int offset) {
    return (ccq_tables) {
        code,
        { vld1q_s8(code->t1[0]), vld1q_s8(code->t1[1]) },
        { vld1q_s8(code->t2[0]), vld1q_s8(code->t2[1]) },
        vdupq_n_u8((uint8_t) offset),
    };
}

// the refinement bits of steps 16*i to 16*i + 15
static inline uint8x16_t ccq_refinement(const uint8_t * rest, int i, const int e_bits) {
    uint8x16_t e = vdupq_n_u8(0);
    if (e_bits >= 2) {
        e = vandq_u8(vshlq_u8(vld1q_u8(rest), vdupq_n_s8((int8_t) (-2 * i))), vdupq_n_u8(3));
        rest += 16;
    }
    if (e_bits & 1) {
        const int8x16_t  shifts = vcombine_s8(vdup_n_s8((int8_t) (-2 * i)), vdup_n_s8((int8_t) (-2 * i - 1)));
        const uint8x16_t bit    = vandq_u8(vshlq_u8(vcombine_u8(vld1_u8(rest), vld1_u8(rest)), shifts), vdupq_n_u8(1));
        e                       = vorrq_u8(e, vshlq_u8(bit, vdupq_n_s8((int8_t) (e_bits - 1))));
    }
    return e;
}

// steps 16*i to 16*i + 15 of the four planes
static inline void ccq_decode(const ccq_tables * tables, const uint8_t * x, int i, const int e_bits, int8x16_t y[4]) {
    const uint8_t *  qs   = x + 2;
    const uint8x16_t here = vld1q_u8(qs + 16 * i);
    const uint8x16_t then = vextq_u8(here, vld1q_u8(qs + 16 * (i + 1) % 64), 1);
    const uint8x16_t e    = ccq_refinement(x + 66, i, e_bits);
    const uint16x8_t e16  = vreinterpretq_u16_u8(e);
    for (int p = 0; p < 4; p++) {
        uint16x8_t a = vmulq_n_u16(vreinterpretq_u16_u8(here), tables->code->k[p]);  // windows that begin at even bytes
        uint16x8_t b = vmulq_n_u16(vreinterpretq_u16_u8(then), tables->code->k[p]);
        if (e_bits > 0) {
            a = vmlaq_n_u16(a, vandq_u16(e16, vdupq_n_u16(255)), tables->code->m[p]);
            b = vmlaq_n_u16(b, vshrq_n_u16(e16, 8), tables->code->m[p]);
        }
        const uint8x16_t h = vtrn2q_u8(vreinterpretq_u8_u16(a), vreinterpretq_u8_u16(b));  // their high bytes in turn
        y[p]               = vaddq_s8(vqtbl1q_s8(tables->t1[x[0] & 1], vshrq_n_u8(h, 4)),
            vqtbl1q_s8(tables->t2[x[0] & 1], vandq_u8(h, vdupq_n_u8(15))));
    }
}

static inline void ccq_store_block(const ccq_tables * tables, const uint8_t * x, const int e_bits, uint8_t * q) {
    for (int i = 0; i < 4; i++) {
        int8x16_t y[4];
        ccq_decode(tables, x, i, e_bits, y);
        for (int p = 0; p < 4; p++) {
            vst1q_u8(q + 64 * p + 16 * i, vaddq_u8(vreinterpretq_u8_s8(y[p]), tables->offset));
        }
    }
}

// adds 16 products of weights of at most 64 with activations
static inline int32x4_t ccq_dot_16(int32x4_t sum, int8x16_t y, int8x16_t q) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sum, y, q);
#else
    return vpadalq_s16(sum, vmlal_high_s8(vmull_s8(vget_low_s8(y), vget_low_s8(q)), y, q));
#endif
}

static inline void ccq_dot_group(const ccq_tables * tables, int n, float * s, const uint8_t * x, size_t row_bytes,
    int n_rows, const ccq_q8_k * y, const int e_bits) {
    const size_t size = 66 + 8 * (size_t) e_bits;
    for (int r = 0; r < n_rows; r++) {
        const uint8_t * block = x + r * row_bytes;
        s[r]                  = 0;
        for (int i = 0; i < n / QK_CCQ; i++, block += size) {
            int32x4_t plane[4] = { vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0) };
            for (int j = 0; j < 4; j++) {
                int8x16_t u[4];
                ccq_decode(tables, block, j, e_bits, u);
                for (int p = 0; p < 4; p++) {
                    plane[p] = ccq_dot_16(plane[p], u[p], vld1q_s8(y[i].qs + 64 * p + 16 * j));
                }
            }
            int32x4_t total = vdupq_n_s32(0);
            for (int p = 0; p < 4; p++) {
                total = vmlaq_n_s32(total, plane[p], ccq_level[block[1] >> 2 * p & 3]);
            }
            s[r] += ccq_scale16(block[0]) * y[i].d * (float) vaddvq_s32(total);
        }
    }
}

static inline int32_t ccq2_b_dot(const ccq2_b_half * x, const ccq_q8_k * y) {
    const float32x4_t scale = vdupq_n_f32(x->code_scale);
    const float32x4_t zero  = vdupq_n_f32(x->zero);
    int32x4_t         total = vdupq_n_s32(0);
    for (int g = 0; g < 4; g++) {
        const uint8x16_t qs       = vld1q_u8(x->qs + 16 * g);
        const uint16x8_t qs_lo    = vmovl_u8(vget_low_u8(qs));
        const uint16x8_t qs_hi    = vmovl_high_u8(qs);
        const uint32x4_t codes[4] = {
            vmovl_u16(vget_low_u16(qs_lo)),
            vmovl_high_u16(qs_lo),
            vmovl_u16(vget_low_u16(qs_hi)),
            vmovl_high_u16(qs_hi),
        };
        int32x4_t group = vdupq_n_s32(0);
        for (int j = 0; j < 4; j++) {
            const float32x4_t t  = vfmaq_f32(zero, vcvtq_f32_u32(codes[j]), scale);
            const uint32x4_t  ok = vcaltq_f32(t, vdupq_n_f32(1073741824.0f));
            const uint32x4_t  v  = vandq_u32(vreinterpretq_u32_s32(vcvtmq_s32_f32(t)), ok);
            // the fields of a word become the bytes of a lane
            const uint32x4_t f01 = vsliq_n_u32(vandq_u32(vshrq_n_u32(v, 9), vdupq_n_u32(63)), vshrq_n_u32(v, 6), 8);
            const uint32x4_t f23 = vsliq_n_u32(vandq_u32(vshrq_n_u32(v, 3), vdupq_n_u32(63)), v, 8);
            const uint8x16_t u   = vandq_u8(
                vreinterpretq_u8_u32(vsliq_n_u32(vandq_u32(f01, vdupq_n_u32(0xFFFF)), f23, 16)), vdupq_n_u8(63));
            group =
                ccq_dot_16(group, vreinterpretq_s8_u8(vsubq_u8(u, vdupq_n_u8(32))), vld1q_s8(y->qs + 64 * g + 16 * j));
        }
        total = vmlaq_n_s32(total, group, x->local[g]);
    }
    return vaddvq_s32(total);
}
