#pragma once

// AVX-512 with VNNI; VBMI where the processor has it. A register holds a plane of a block.

#include <immintrin.h>

#if defined(__AVX512VBMI__)
#define CCQ_PATH "avx512-vbmi"
#else
#define CCQ_PATH "avx512"
#endif

typedef struct {
    const ggml_ccq_code * code;
    __m512i               t1[2];   // by h >> 4, the offset added
    __m512i               t2[2];   // by h & 15
    __m512i               t12[2];  // CCQ2, VBMI: both by h >> 2; its second table does not tell the two lowest bits
} ccq_tables;

// entries of a table of 16 that is repeated four times; of an index the low four bits count
static inline __m512i ccq_lookup(__m512i table, __m512i index) {
#if defined(__AVX512VBMI__)
    return _mm512_permutexvar_epi8(index, table);
#else
    return _mm512_shuffle_epi8(table, _mm512_and_si512(index, _mm512_set1_epi8(15)));
#endif
}

static inline ccq_tables ccq_load_tables(const ggml_ccq_code * code, int offset) {
    ccq_tables tables;
    tables.code = code;
    for (int t = 0; t < 2; t++) {
        const __m512i t1    = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) code->t1[t]));
        tables.t1[t]        = _mm512_add_epi8(t1, _mm512_set1_epi8((char) offset));
        tables.t2[t]        = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) code->t2[t]));
        const __m512i first = _mm512_cvtepu8_epi32(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        const __m512i fourth = _mm512_set1_epi32(0x0C080400);
        tables.t12[t] =
            _mm512_add_epi8(ccq_lookup(tables.t1[t], _mm512_mullo_epi32(first, _mm512_set1_epi32(0x01010101))),
                ccq_lookup(tables.t2[t], fourth));
    }
    return tables;
}

// the refinement bits of the 64 steps
static inline __m512i ccq_refinement(const uint8_t * rest, const int e_bits) {
    __m512i e = _mm512_setzero_si512();
    if (e_bits >= 2) {
        const __m512i shifts = _mm512_set_epi32(6, 6, 6, 6, 4, 4, 4, 4, 2, 2, 2, 2, 0, 0, 0, 0);
        const __m512i e2     = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) rest));
        e                    = _mm512_and_si512(_mm512_srlv_epi32(e2, shifts), _mm512_set1_epi8(3));
        rest += 16;
    }
    if (e_bits & 1) {
        int64_t e1;
        memcpy(&e1, rest, sizeof(e1));
        const __m512i shifts = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i bit    = _mm512_and_si512(_mm512_srlv_epi64(_mm512_set1_epi64(e1), shifts), _mm512_set1_epi8(1));
        e                    = _mm512_or_si512(e, _mm512_slli_epi16(bit, e_bits - 1));
    }
    return e;
}

// a block's windows and refinement bits
typedef struct {
    __m512i even;  // the code bytes; their words are the windows that begin at even bytes
    __m512i odd;   // the same from the next byte on
    __m512i e_even;
    __m512i e_odd;
    int     table;
} ccq_block;

static inline ccq_block ccq_load_block(const uint8_t * x, const int e_bits) {
    const __m512i qs = _mm512_loadu_si512(x + 2);
    const __m512i e  = ccq_refinement(x + 66, e_bits);
    return (ccq_block) {
        qs,
        _mm512_alignr_epi8(_mm512_shuffle_i32x4(qs, qs, 0x39), qs, 1),
        _mm512_and_si512(e, _mm512_set1_epi16(0xFF)),
        _mm512_srli_epi16(e, 8),
        x[0] & 1,
    };
}

// plane p of a block, the offset added
static inline __m512i ccq_decode(const ccq_tables * tables, const ccq_block * block, int p, const int e_bits) {
    const __m512i k = _mm512_set1_epi16((short) tables->code->k[p]);
    __m512i       a = _mm512_mullo_epi16(block->even, k);  // h is the high byte of every product
    __m512i       b = _mm512_mullo_epi16(block->odd, k);
    if (e_bits > 0) {
        const __m512i m = _mm512_set1_epi16((short) tables->code->m[p]);
        a               = _mm512_add_epi16(a, _mm512_mullo_epi16(block->e_even, m));
        b               = _mm512_add_epi16(b, _mm512_mullo_epi16(block->e_odd, m));
    }
#if defined(__AVX512VBMI__)
    if (e_bits == 0) {  // h >> 2 of the even bytes, then of the odd ones; two bits above it do not count
        const __m512i from_a = _mm512_set1_epi64(0x003A002A001A000A);
        const __m512i from_b = _mm512_set1_epi64(0x3A002A001A000A00);
        const __m512i h      = _mm512_multishift_epi64_epi8(from_a, a);
        return _mm512_permutexvar_epi8(
            _mm512_mask_multishift_epi64_epi8(h, 0xAAAAAAAAAAAAAAAA, from_b, b), tables->t12[block->table]);
    }
#endif
    const __m512i h = _mm512_or_si512(_mm512_srli_epi16(a, 8), _mm512_and_si512(b, _mm512_set1_epi16((short) 0xFF00)));
    return _mm512_add_epi8(
        ccq_lookup(tables->t1[block->table], _mm512_srli_epi16(h, 4)), ccq_lookup(tables->t2[block->table], h));
}

static inline void ccq_store_block(const ccq_tables * tables, const uint8_t * x, const int e_bits, uint8_t * q) {
    const ccq_block block = ccq_load_block(x, e_bits);
    for (int p = 0; p < 4; p++) {
        _mm512_storeu_si512(q + 64 * p, ccq_decode(tables, &block, p, e_bits));
    }
}

// the sums of the lanes of eight registers
static inline __m256i ccq_sums(const __m512i v[8]) {
    __m512i t[4];
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_add_epi32(
            _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
    }
    for (int i = 0; i < 2; i++) {
        t[i] = _mm512_add_epi32(
            _mm512_unpacklo_epi64(t[2 * i], t[2 * i + 1]), _mm512_unpackhi_epi64(t[2 * i], t[2 * i + 1]));
    }
    const __m512i w = _mm512_add_epi32(_mm512_shuffle_i32x4(t[0], t[1], 0x88), _mm512_shuffle_i32x4(t[0], t[1], 0xDD));
    const __m256i a = _mm512_castsi512_si256(w);
    const __m256i b = _mm512_extracti64x4_epi64(w, 1);
    return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

// the dot product of a block with its activations, weights times the levels of their planes
static inline __m512i ccq_dot_block(
    const ccq_tables * tables, const uint8_t * x, const ccq_q8_k * y, const int32_t * level, const int e_bits) {
    const ccq_block block = ccq_load_block(x, e_bits);
    __m512i         dot   = _mm512_setzero_si512();
    for (int p = 0; p < 4; p++) {  // at most 2*127*128 in 16 bits: it cannot saturate
        const __m512i u        = ccq_decode(tables, &block, p, e_bits);
        const __m512i products = _mm512_maddubs_epi16(u, _mm512_loadu_si512(y->qs + 64 * p));
        dot                    = _mm512_dpwssd_epi32(dot, products, _mm512_set1_epi32(level[N_GROUP * p]));
    }
    return dot;
}

typedef __m512i ccq_lanes;
#include "ccq-x86.h"

static inline int32_t ccq2_b_dot(const ccq2_b_half * x, const ccq_q8_k * y) {
    const __m512 scale = _mm512_set1_ps(x->code_scale);
    const __m512 zero  = _mm512_set1_ps(x->zero);
    __m512i      sum   = _mm512_setzero_si512();
    for (int g = 0; g < 4; g++) {
        const __m512i   code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) (x->qs + 16 * g)));
        const __m512    t    = _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), scale, zero);
        const __mmask16 ok   = _mm512_cmp_ps_mask(_mm512_abs_ps(t), _mm512_set1_ps(1073741824.0f), _CMP_LT_OQ);
        const __m512i   v    = _mm512_maskz_cvt_roundps_epi32(ok, t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        // the fields of a word become the bytes of a lane
        const __m512i f01 =
            _mm512_mask_blend_epi8(0x2222222222222222, _mm512_srli_epi32(v, 9), _mm512_slli_epi32(v, 2));
        const __m512i f23 =
            _mm512_mask_blend_epi8(0x8888888888888888, _mm512_slli_epi32(v, 13), _mm512_slli_epi32(v, 24));
        const __m512i u = _mm512_and_si512(_mm512_mask_blend_epi16(0xAAAAAAAA, f01, f23), _mm512_set1_epi8(63));
        sum             = _mm512_dpwssd_epi32(
            sum, _mm512_maddubs_epi16(u, _mm512_loadu_si512(y->qs + 64 * g)), _mm512_set1_epi16((short) x->local[g]));
    }
    return _mm512_reduce_add_epi32(sum) - 32 * ccq2_b_extra(x, y);
}
