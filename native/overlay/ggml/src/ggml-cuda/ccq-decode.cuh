#pragma once

// Decoding CCQ on a GPU: what one thread does, nothing of ggml-cuda. tests/cuda_emulator.h compiles it for the CPU.
//
// A row is a sequence of units of 256 weights: a block of a native type, half a block of CCQ2_B. A unit is decoded by
// 16 threads. Thread t takes four code bytes and makes 16 weights, four words of four bytes each; word w of thread t
// holds weights 4*ccq_word(t, w) to 4*ccq_word(t, w) + 3 of the unit. A scale belongs to 16 such words.

#include "../ggml-ccq.h"

#define CCQ_UNIT         256 // weights
#define CCQ_UNIT_WORDS   64  // of four weights
#define CCQ_UNIT_THREADS 16

enum ccq_kind { // the native kinds are numbered by their refinement bits
    CCQ_KIND_2    = 0,
    CCQ_KIND_2_25 = 1,
    CCQ_KIND_2_5  = 2,
    CCQ_KIND_2_75 = 3,
    CCQ_KIND_2_B  = 4,
};

// ggml_ccq_codes of ../ggml-ccq.c once more: here they must be constants of the compiler
struct ccq_constants {
    uint32_t k[4], m[4];
    int8_t   t1[2][16], t2[2][16];
};

template <ccq_kind kind> static constexpr __host__ __device__ ccq_constants ccq_get_constants() {
    switch (kind) {
        case CCQ_KIND_2: return {
            { 41823, 13259, 44979, 46863 }, { 0, 0, 0, 0 },
            { { -45, -29, -23, -17, -13, -9, -5, -2, 2, 5, 9, 12, 17, 23, 29, 45 },
              { -50, -25, -19, -11, -8, -6, -3, -1, 1, 4, 8, 9, 12, 18, 27, 51 } },
            { { -5, -5, -5, -5, -1, -1, -1, -1, 1, 1, 1, 1, 5, 5, 5, 5 },
              { -5, -5, -5, -5, -1, -1, -1, -1, 1, 1, 1, 1, 5, 5, 5, 5 } } };
        case CCQ_KIND_2_25: return {
            { 5717, 5527, 39011, 50907 }, { 57369, 30377, 16425, 64797 },
            { { -46, -29, -24, -17, -13, -9, -5, -2, 2, 5, 9, 13, 17, 23, 29, 45 },
              { -52, -25, -19, -11, -8, -6, -3, -1, 1, 4, 8, 9, 12, 18, 27, 52 } },
            { { -6, -4, -4, -3, -3, -2, -2, -1, 0, 1, 2, 2, 4, 4, 4, 8 },
              { -10, -4, -4, -3, -3, -2, -2, -1, 0, 1, 2, 2, 4, 4, 4, 11 } } };
        case CCQ_KIND_2_5: return {
            { 65071, 45485, 60343, 53725 }, { 18957, 48343, 21225, 6591 },
            { { -46, -29, -23, -17, -12, -9, -5, -2, 2, 5, 9, 12, 17, 22, 29, 46 },
              { -51, -25, -19, -11, -8, -6, -3, -1, 1, 4, 8, 9, 12, 18, 27, 52 } },
            { { -7, -6, -4, -3, -3, -1, -1, 0, 0, 1, 1, 2, 2, 5, 7, 6 },
              { -11, -6, -4, -3, -3, -1, -1, 0, 0, 1, 1, 2, 2, 5, 11, 6 } } };
        default: return {
            { 18635, 50727, 32485, 38497 }, { 111, 59539, 36897, 49105 },
            { { -46, -29, -23, -16, -12, -9, -4, -1, 1, 5, 9, 12, 17, 22, 30, 47 },
              { -50, -23, -17, -9, -8, -6, -3, -1, 1, 4, 8, 9, 12, 17, 26, 52 } },
            { { -11, -4, -4, -4, -2, -2, -1, 0, 1, 1, 2, 2, 3, 5, 5, 9 },
              { -12, -4, -4, -4, -2, -2, -1, 0, 1, 1, 2, 2, 3, 5, 5, 11 } } };
    }
}

static constexpr __host__ __device__ uint32_t ccq_pack(const int8_t * b) {
    return (uint32_t) (uint8_t) b[0] | (uint32_t) (uint8_t) b[1] << 8 | (uint32_t) (uint8_t) b[2] << 16 | (uint32_t) (uint8_t) b[3] << 24;
}

// whether the second table has one value for every four indices: then four bytes are enough for it
template <ccq_kind kind> static constexpr __host__ __device__ bool ccq_t2_is_short() {
    const ccq_constants c = ccq_get_constants<kind>();
    for (int i = 0; i < 32; i++) {
        if (c.t2[i/16][i % 16] != c.t2[i/16][i % 16 & 12]) {
            return false;
        }
    }
    return true;
}

template <ccq_kind kind> static constexpr __host__ __device__ int ccq_block_bytes() {
    return kind == CCQ_KIND_2_B ? (int) sizeof(block_ccq2_b) : 66 + 8*kind;
}

template <ccq_kind kind> static __device__ __forceinline__ int ccq_word(int t, int w) {
    return kind == CCQ_KIND_2_B ? 4*t + w : 16*w + t; // a native thread has four words 64 weights apart
}

// two bytes; blocks have an even size and no other alignment
static __device__ __forceinline__ uint32_t ccq_load_u16(const uint8_t * p) {
    return *(const uint16_t *) p;
}

static __device__ __forceinline__ uint32_t ccq_load_u32(const uint8_t * p) {
    return ccq_load_u16(p) | ccq_load_u16(p + 2) << 16;
}

static __device__ __forceinline__ float ccq_as_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

// byte i of the result is byte (s >> 4*i & 7) of b:a; bits 4*i + 3 of s must be 0
static __device__ __forceinline__ uint32_t ccq_permute(uint32_t a, uint32_t b, uint32_t s) {
#ifdef __CUDA_ARCH__
    uint32_t d; // __byte_perm would clear those bits once more
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(s));
    return d;
#else
    return __byte_perm(a, b, s);
#endif
}

// sums of bytes, no carry from one into the next
static __device__ __forceinline__ uint32_t ccq_add_bytes(uint32_t a, uint32_t b) {
    return ((a & 0x7F7F7F7F) + (b & 0x7F7F7F7F)) ^ ((a ^ b) & 0x80808080);
}

// eight look-ups in a table of 16 bytes: nibble i of z gives byte i of the two results
static __device__ __forceinline__ void ccq_look_up_16(const uint32_t (&table)[4], uint32_t z, uint32_t & low, uint32_t & high) {
    const uint32_t index = z & 0x77777777;
    const uint32_t half  = (z >> 1 & 0x44444444) | 0x32103210; // the fourth bit chooses the half of the table
    low  = ccq_permute(ccq_permute(table[0], table[1], index),       ccq_permute(table[2], table[3], index),       half);
    high = ccq_permute(ccq_permute(table[0], table[1], index >> 16), ccq_permute(table[2], table[3], index >> 16), half >> 16);
}

// Levels of the weights of thread t of a block of a native type: level = t1 + t2, byte by byte; word p is of plane p.
template <ccq_kind kind>
static __device__ __forceinline__ void ccq_decode_native(const uint8_t * block, int t, uint32_t (&t1)[4], uint32_t (&t2)[4]) {
    constexpr ccq_constants c = ccq_get_constants<kind>();
    constexpr int n_bits = kind; // refinement bits of a step

    const bool table = block[0] & 1;
    uint32_t table1[4];
    uint32_t table2[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        table1[i] = table ? ccq_pack(c.t1[1] + 4*i) : ccq_pack(c.t1[0] + 4*i);
        table2[i] = table ? ccq_pack(c.t2[1] + 4*i) : ccq_pack(c.t2[0] + 4*i);
    }
    constexpr int8_t short0[4] = { c.t2[0][0], c.t2[0][4], c.t2[0][8], c.t2[0][12] };
    constexpr int8_t short1[4] = { c.t2[1][0], c.t2[1][4], c.t2[1][8], c.t2[1][12] };
    const uint32_t table2_short = table ? ccq_pack(short1) : ccq_pack(short0);

    // windows of the four steps, in the low half of a word; what is above does not reach the sixteen bits that count
    const uint32_t code = ccq_load_u32(block + 2 + 4*t);
    const uint32_t next = block[2 + ((4*t + 4) & 63)];
    const uint32_t window[4] = { code, code >> 8, code >> 16, code >> 24 | next << 8 };

    uint32_t e = 0; // refinement bits, a byte each
    if constexpr (n_bits >= 2) {
        e = ccq_load_u32(block + 66 + (4*t & 15)) >> 2*(t/4) & 0x03030303;
    }
    if constexpr (n_bits & 1) {
        e |= (ccq_load_u32(block + 66 + 16*(n_bits/2) + (4*t & 7)) >> t/2 & 0x01010101) << (n_bits - 1);
    }

#pragma unroll
    for (int p = 0; p < 4; p += 2) {
        uint32_t h[8]; // of two planes, in the second byte
#pragma unroll
        for (int i = 0; i < 8; i++) {
            h[i] = window[i & 3]*c.k[p + i/4];
            if (n_bits > 0) {
                h[i] += (e >> 8*(i & 3) & 7)*c.m[p + i/4];
            }
        }
        // even steps and odd ones apart, so that their nibbles interleave to the order of the weights
        const uint32_t even = ccq_permute(ccq_permute(h[0], h[2], 0x0051), ccq_permute(h[4], h[6], 0x0051), 0x5410);
        const uint32_t odd  = ccq_permute(ccq_permute(h[1], h[3], 0x0051), ccq_permute(h[5], h[7], 0x0051), 0x5410);

        ccq_look_up_16(table1, (even >> 4 & 0x0F0F0F0F) | (odd & 0xF0F0F0F0), t1[p], t1[p + 1]);
        const uint32_t z = (even & 0x0F0F0F0F) | (odd << 4 & 0xF0F0F0F0);
        if (ccq_t2_is_short<kind>()) {
            const uint32_t index = z >> 2 & 0x33333333;
            t2[p]     = ccq_permute(table2_short, 0, index);
            t2[p + 1] = ccq_permute(table2_short, 0, index >> 16);
        } else {
            ccq_look_up_16(table2, z, t2[p], t2[p + 1]);
        }
    }
}

// Levels of the 16 weights of thread t of half a block of CCQ2_B.
static __device__ __forceinline__ void ccq_decode_b(const uint8_t * block, int half, int t, uint32_t (&level)[4]) {
    const float    code_scale = ccq_as_float(ccq_load_u32(block));
    const float    zp5        = ccq_as_float(ccq_load_u32(block + 4)) + 0.5f;
    const uint32_t codes      = ccq_load_u32(block + 14 + 64*half + 4*t);
#pragma unroll
    for (int w = 0; w < 4; w++) {
        const float    f = floorf(fmaf((float) (codes >> 8*w & 255), code_scale, zp5));
        const uint32_t v = fabsf(f) < 1073741824.0f ? (uint32_t) (int) f : 0; // also for NaN
        const uint32_t fields = (v >> 9 & 0x3F) | (v << 2 & 0x3F00) | (v << 13 & 0x3F0000) | (v << 24 & 0x3F000000);
        level[w] = (fields + 0x60606060) ^ 0x80808080; // less 32, byte by byte
    }
}

// The scale of weights 64*g to 64*g + 63 of a unit.
template <ccq_kind kind> static __device__ __forceinline__ float ccq_scale(const uint8_t * block, int half, int g) {
    if (kind == CCQ_KIND_2_B) {
        const uint32_t local = block[10 + 2*half + g/2] >> (g & 1 ? 0 : 4) & 15;
        return (float) local*ccq_as_float(ccq_load_u16(block + 8) << 16);
    }
    const uint32_t d     = block[0];
    const uint32_t level = 0x15110F0D >> 8*(block[1] >> 2*g & 3) & 255; // 13, 15, 17, 21, in sixteenths
    return (float) level*(d < 2 ? 0.0f : ccq_as_float(((d & 254) << 19) + (103u << 23)));
}

static __device__ __forceinline__ int ccq_block_of(ccq_kind kind, int unit) {
    return kind == CCQ_KIND_2_B ? unit/2 : unit;
}

// The 16 weights of thread t of a unit of a row: four words of levels.
template <ccq_kind kind>
static __device__ __forceinline__ const uint8_t * ccq_decode(const uint8_t * row, int unit, int t, uint32_t (&level)[4]) {
    const uint8_t * block = row + (int64_t) ccq_block_of(kind, unit)*ccq_block_bytes<kind>();
    if constexpr (kind == CCQ_KIND_2_B) {
        ccq_decode_b(block, unit & 1, t, level);
    } else {
        uint32_t t2[4];
        ccq_decode_native<kind>(block, t, level, t2);
#pragma unroll
        for (int w = 0; w < 4; w++) {
            level[w] = ccq_add_bytes(level[w], t2[w]);
        }
    }
    return block;
}
