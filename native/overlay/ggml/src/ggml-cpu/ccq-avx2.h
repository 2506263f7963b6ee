#pragma once

// AVX2. A plane of a block is two registers.

#include <immintrin.h>

#define CCQ_PATH "avx2"

typedef struct {
    const ggml_ccq_code * code;
    __m256i               t1[2];  // by h >> 4, the offset added
    __m256i               t2[2];  // by h & 15
} ccq_tables;

static inline ccq_tables ccq_load_tables(const ggml_ccq_code * code, int offset) {
    ccq_tables tables;
    tables.code = code;
    for (int t = 0; t < 2; t++) {
        const __m256i t1 = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) code->t1[t]));
        tables.t1[t]     = _mm256_add_epi8(t1, _mm256_set1_epi8((char) offset));
        tables.t2[t]     = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) code->t2[t]));
    }
    return tables;
}

// the refinement bits of the 64 steps
static inline void ccq_refinement(const uint8_t * rest, const int e_bits, __m256i e[2]) {
    e[0] = e[1] = _mm256_setzero_si256();
    if (e_bits >= 2) {
        const __m256i e2 = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) rest));
        e[0] = _mm256_and_si256(_mm256_srlv_epi32(e2, _mm256_set_epi32(2, 2, 2, 2, 0, 0, 0, 0)), _mm256_set1_epi8(3));
        e[1] = _mm256_and_si256(_mm256_srlv_epi32(e2, _mm256_set_epi32(6, 6, 6, 6, 4, 4, 4, 4)), _mm256_set1_epi8(3));
        rest += 16;
    }
    if (e_bits & 1) {
        int64_t bits;
        memcpy(&bits, rest, sizeof(bits));
        const __m256i e1 = _mm256_set1_epi64x(bits);
        for (int half = 0; half < 2; half++) {
            const __m256i shifts = _mm256_add_epi64(_mm256_set_epi64x(3, 2, 1, 0), _mm256_set1_epi64x(4 * half));
            const __m256i bit    = _mm256_and_si256(_mm256_srlv_epi64(e1, shifts), _mm256_set1_epi8(1));
            e[half]              = _mm256_or_si256(e[half], _mm256_slli_epi16(bit, e_bits - 1));
        }
    }
}

// a block's windows and refinement bits
typedef struct {
    __m256i even[2];  // the code bytes; their words are the windows that begin at even bytes
    __m256i odd[2];   // the same from the next byte on
    __m256i e[2];
    __m256i t1;
    __m256i t2;
} ccq_block;

static inline ccq_block ccq_load_block(const ccq_tables * tables, const uint8_t * x, const int e_bits) {
    const __m256i first  = _mm256_loadu_si256((const __m256i *) (x + 2));
    const __m256i second = _mm256_loadu_si256((const __m256i *) (x + 34));
    ccq_block     block  = {
        { first, second },
        { _mm256_alignr_epi8(_mm256_permute2x128_si256(first, second, 0x21), first, 1),
            _mm256_alignr_epi8(_mm256_permute2x128_si256(second, first, 0x21), second, 1) },
        { _mm256_setzero_si256(), _mm256_setzero_si256() },
        tables->t1[x[0] & 1],
        tables->t2[x[0] & 1],
    };
    ccq_refinement(x + 66, e_bits, block.e);
    return block;
}

// 32 weights of a block, the offset added: half of a plane
static inline __m256i ccq_decode(
    const ccq_tables * tables, const ccq_block * block, int p, int half, const int e_bits) {
    const __m256i low4 = _mm256_set1_epi8(15);
    const __m256i high = _mm256_set1_epi16((short) 0xFF00);
    const __m256i k    = _mm256_set1_epi16((short) tables->code->k[p]);
    const __m256i m    = _mm256_set1_epi16((short) tables->code->m[p]);
    __m256i       a    = _mm256_mullo_epi16(block->even[half], k);  // h is the high byte of every product
    __m256i       b    = _mm256_mullo_epi16(block->odd[half], k);
    if (e_bits > 0) {
        a = _mm256_add_epi16(a, _mm256_mullo_epi16(_mm256_andnot_si256(high, block->e[half]), m));
        b = _mm256_add_epi16(b, _mm256_mullo_epi16(_mm256_srli_epi16(block->e[half], 8), m));
    }
    const __m256i h = _mm256_or_si256(_mm256_srli_epi16(a, 8), _mm256_and_si256(b, high));
    return _mm256_add_epi8(_mm256_shuffle_epi8(block->t1, _mm256_and_si256(_mm256_srli_epi16(h, 4), low4)),
        _mm256_shuffle_epi8(block->t2, _mm256_and_si256(h, low4)));
}

static inline void ccq_store_block(const ccq_tables * tables, const uint8_t * x, const int e_bits, uint8_t * q) {
    const ccq_block block = ccq_load_block(tables, x, e_bits);
    for (int i = 0; i < 8; i++) {
        _mm256_storeu_si256((__m256i *) (q + 32 * i), ccq_decode(tables, &block, i / 2, i % 2, e_bits));
    }
}

// the sums of the lanes of eight registers
static inline __m256i ccq_sums(const __m256i v[8]) {
    const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
}

// the dot product of a block with its activations, weights times the levels of their planes
static inline __m256i ccq_dot_block(
    const ccq_tables * tables, const uint8_t * x, const ccq_q8_k * y, const int32_t * level, const int e_bits) {
    const ccq_block block = ccq_load_block(tables, x, e_bits);
    __m256i         dot   = _mm256_setzero_si256();
    for (int i = 0; i < 8; i++) {  // at most 2*127*128 in 16 bits: it cannot saturate
        const __m256i u        = ccq_decode(tables, &block, i / 2, i % 2, e_bits);
        const __m256i products = _mm256_maddubs_epi16(u, _mm256_loadu_si256((const __m256i *) (y->qs + 32 * i)));
        dot = _mm256_add_epi32(dot, _mm256_madd_epi16(products, _mm256_set1_epi32(level[N_GROUP * (i / 2)])));
    }
    return dot;
}

typedef __m256i ccq_lanes;
#include "ccq-x86.h"

static inline int32_t ccq2_b_dot(const ccq2_b_half * x, const ccq_q8_k * y) {
    const __m256 scale = _mm256_set1_ps(x->code_scale);
    const __m256 zero  = _mm256_set1_ps(x->zero);
    const __m256 sign  = _mm256_set1_ps(-0.0f);
    __m256i      sum   = _mm256_setzero_si256();
    for (int i = 0; i < 8; i++) {
        const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) (x->qs + 8 * i)));
        const __m256  t    = _mm256_floor_ps(_mm256_fmadd_ps(_mm256_cvtepi32_ps(code), scale, zero));
        const __m256  ok   = _mm256_cmp_ps(_mm256_andnot_ps(sign, t), _mm256_set1_ps(1073741824.0f), _CMP_LT_OQ);
        const __m256i v    = _mm256_and_si256(_mm256_cvtps_epi32(t), _mm256_castps_si256(ok));
        // the fields of a word become the bytes of a lane
        const __m256i f0       = _mm256_and_si256(_mm256_srli_epi32(v, 9), _mm256_set1_epi32(0x3F));
        const __m256i f1       = _mm256_and_si256(_mm256_slli_epi32(v, 2), _mm256_set1_epi32(0x3F00));
        const __m256i f2       = _mm256_and_si256(_mm256_slli_epi32(v, 13), _mm256_set1_epi32(0x3F0000));
        const __m256i f3       = _mm256_and_si256(_mm256_slli_epi32(v, 24), _mm256_set1_epi32(0x3F000000));
        const __m256i u        = _mm256_or_si256(_mm256_or_si256(f0, f1), _mm256_or_si256(f2, f3));
        const __m256i products = _mm256_maddubs_epi16(u, _mm256_loadu_si256((const __m256i *) (y->qs + 32 * i)));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(products, _mm256_set1_epi16((short) x->local[i / 2])));
    }
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    half         = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    half         = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xB1));
    return _mm_cvtsi128_si32(half) - 32 * ccq2_b_extra(x, y);
}
