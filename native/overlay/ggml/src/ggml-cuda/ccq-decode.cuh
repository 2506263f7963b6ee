#pragma once

// Decoding CCQ on a GPU: what one thread does, nothing of ggml-cuda. tests/support/cuda_emulator.h compiles it for the CPU.
//
// A row is a sequence of units of 256 weights: a block of a native type, half a block of CCQ2_B. A unit is decoded by
// eight threads. Thread t takes eight code bytes and makes 32 weights, eight words of four bytes each; word w of thread t
// holds weights 4*ccq_word(t, w) to 4*ccq_word(t, w) + 3 of the unit. A scale belongs to 64 weights.

#include "../ggml-ccq.h"

#define CCQ_UNIT         256  // weights
#define CCQ_UNIT_WORDS   64   // of four weights
#define CCQ_UNIT_THREADS 8
#define CCQ_THREAD_WORDS 8

enum ccq_kind {  // the native kinds are numbered by their refinement bits
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
            // clang-format off
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
            // clang-format on
    }
}

// A step's product window*k + e*m (mod 2^16) in one multiplication: the high half of (window << 16 | a*e)*mul + add. The
// low half of mul is k; what a*e*k carries into the high half must be a multiple of e, which `a` and `add` see to, and mul's
// high half makes it e*m. `a` is low + 256*high, so that a*e is two bytes for four steps at once.
struct ccq_fused {
    uint32_t low, high;
    uint32_t mul[4], add[4];
    bool     exact;  // for all e
};

template <ccq_kind kind> static constexpr __host__ __device__ ccq_fused ccq_get_fused() {
    const ccq_constants c = ccq_get_constants<kind>();
    ccq_fused           f = { 1, 0, {}, {}, true };
    if (kind == CCQ_KIND_2_75) {
        f.low  = 17;  // the smallest that works
        f.high = 13;
    }
    const uint32_t a       = f.low + 256 * f.high;
    uint32_t       inverse = 1;
    while ((inverse * a & 0xFFFF) != 1) {
        inverse += 2;
    }
    for (int p = 0; p < 4; p++) {
        const uint32_t rest  = a * c.k[p] & 0xFFFF;  // of the carry of one e, nearer to 0 or to 2^16
        f.add[p]             = rest < 0x8000 ? 0 : 0xFFFF;
        const uint32_t carry = (a * c.k[p] >> 16) + (rest < 0x8000 ? 0 : 1);
        f.mul[p]             = c.k[p] + ((c.m[p] - carry) * inverse << 16);
        for (uint32_t e = 0; e < 1u << kind % 4; e++) {
            f.exact = f.exact && (a * e * f.mul[p] + f.add[p]) >> 16 == (e * c.m[p] & 0xFFFF);
        }
    }
    return f;
}

static constexpr __host__ __device__ uint32_t ccq_pack(const int8_t * b) {
    return (uint32_t) (uint8_t) b[0] | (uint32_t) (uint8_t) b[1] << 8 | (uint32_t) (uint8_t) b[2] << 16 |
        (uint32_t) (uint8_t) b[3] << 24;
}

// whether the second table has one value for every four indices: then four bytes are enough for it
template <ccq_kind kind> static constexpr __host__ __device__ bool ccq_t2_is_short() {
    const ccq_constants c = ccq_get_constants<kind>();
    for (int i = 0; i < 32; i++) {
        if (c.t2[i / 16][i % 16] != c.t2[i / 16][i % 16 & 12]) {
            return false;
        }
    }
    return true;
}

template <ccq_kind kind> static constexpr __host__ __device__ int ccq_block_bytes() {
    return kind == CCQ_KIND_2_B ? (int) sizeof(block_ccq2_b) : 66 + 8 * kind;
}

template <ccq_kind kind> static __device__ __forceinline__ int ccq_word(int t, int w) {
    return kind == CCQ_KIND_2_B ? 8 * t + w :
                                  w / 2 * 16 + 2 * t + w % 2;  // a native thread has two words of each plane
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

// Byte i of the result is byte (s >> 4*i & 7) of b:a; where bit 4*i + 3 of s is set, it is that byte's sign, 8 times.
static __device__ __forceinline__ uint32_t ccq_permute(uint32_t a, uint32_t b, uint32_t s) {
#ifdef __CUDACC__
    uint32_t d;  // __byte_perm would clear those bits first
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(s));
    return d;
#else
    return emulated_prmt(a, b, s);
#endif
}

// sums of bytes, no carry from one into the next
static __device__ __forceinline__ uint32_t ccq_add_bytes(uint32_t a, uint32_t b) {
    return ((a & 0x7F7F7F7F) + (b & 0x7F7F7F7F)) ^ ((a ^ b) & 0x80808080);
}

// Eight look-ups in a table of 16 bytes. The indices are the high nibbles of the bytes of `even` and `odd` in turn; z has
// the low three bits of each, a nibble each, and the sign of the byte chooses the half of the table.
static __device__ __forceinline__ void ccq_look_up_16(
    const uint32_t (&table)[4], uint32_t z, uint32_t even, uint32_t odd, uint32_t & first, uint32_t & last) {
    const uint32_t upper_first = ccq_permute(even, odd, 0xD9C8);
    const uint32_t upper_last  = ccq_permute(even, odd, 0xFBEA);
    first = (ccq_permute(table[0], table[1], z) & ~upper_first) | (ccq_permute(table[2], table[3], z) & upper_first);
    z >>= 16;
    last = (ccq_permute(table[0], table[1], z) & ~upper_last) | (ccq_permute(table[2], table[3], z) & upper_last);
}

// Levels of the weights of thread t of a block of a native type: level = t1 + t2, byte by byte. Words 2p and 2p + 1 are of
// plane p. `head` is the first two bytes.
template <ccq_kind kind>
static __device__ __forceinline__ void ccq_decode_native(
    const uint8_t * block, uint32_t head, int t, uint32_t (&t1)[CCQ_THREAD_WORDS], uint32_t (&t2)[CCQ_THREAD_WORDS]) {
    constexpr ccq_constants c      = ccq_get_constants<kind>();
    constexpr ccq_fused     f      = ccq_get_fused<kind>();
    constexpr int           n_bits = kind;  // refinement bits of a step
    static_assert(f.exact, "a step needs two multiplications");

    const bool table = head & 1;
    uint32_t   table1[4];
    uint32_t   table2[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        table1[i] = table ? ccq_pack(c.t1[1] + 4 * i) : ccq_pack(c.t1[0] + 4 * i);
        table2[i] = table ? ccq_pack(c.t2[1] + 4 * i) : ccq_pack(c.t2[0] + 4 * i);
    }
    constexpr int8_t short0[4]    = { c.t2[0][0], c.t2[0][4], c.t2[0][8], c.t2[0][12] };
    constexpr int8_t short1[4]    = { c.t2[1][0], c.t2[1][4], c.t2[1][8], c.t2[1][12] };
    const uint32_t   table2_short = table ? ccq_pack(short1) : ccq_pack(short0);

    const uint32_t code0 = ccq_load_u32(block + 2 + 8 * t);
    const uint32_t code1 = ccq_load_u32(block + 6 + 8 * t);
    const uint32_t next  = block[2 + ((8 * t + 8) & 63)];

    uint32_t window[8];  // of the eight steps: in the low half without refinement bits, else in the high half above a*e
    if constexpr (n_bits == 0) {  // what is above the low half does not reach the sixteen bits that count
        window[0] = code0;
        window[1] = code0 >> 8;
        window[2] = code0 >> 16;
        window[3] = ccq_permute(code0, code1, 0x0043);
        window[4] = code1;
        window[5] = code1 >> 8;
        window[6] = code1 >> 16;
        window[7] = code1 >> 24 | next << 8;
    } else {
        uint32_t e[2] = { 0, 0 };  // refinement bits, a byte each
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if constexpr (n_bits >= 2) {
                e[i] = ccq_load_u32(block + 66 + (8 * t & 15) + 4 * i) >> t / 2 * 2 & 0x03030303;
            }
            if constexpr (n_bits & 1) {
                e[i] |= (ccq_load_u32(block + 66 + 16 * (n_bits / 2) + 4 * i) >> t & 0x01010101) << (n_bits - 1);
            }
            const uint32_t code  = i == 0 ? code0 : code1;
            const uint32_t after = i == 0 ? ccq_permute(code0, code1, 0x4321) : code1 >> 8 | next << 24;
            const uint32_t e01   = ccq_permute(e[i] * f.low, e[i] * f.high, 0x5140);
            const uint32_t e23   = ccq_permute(e[i] * f.low, e[i] * f.high, 0x7362);
            window[4 * i + 0]    = ccq_permute(e01, code, 0x5410);
            window[4 * i + 1]    = ccq_permute(e01, code, 0x6532);
            window[4 * i + 2]    = ccq_permute(e23, code, 0x7610);
            window[4 * i + 3]    = ccq_permute(e23, after, 0x7632);
        }
    }
    constexpr uint32_t pick = n_bits == 0 ? 0x0051 : 0x0073;  // the bytes with h of two products

#pragma unroll
    for (int p = 0; p < 4; p++) {
        uint32_t h[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            h[i] = n_bits == 0 ? window[i] * c.k[p] : window[i] * f.mul[p] + f.add[p];
        }
        // even steps and odd ones apart, so that their nibbles interleave to the order of the weights
        const uint32_t even = ccq_permute(ccq_permute(h[0], h[2], pick), ccq_permute(h[4], h[6], pick), 0x5410);
        const uint32_t odd  = ccq_permute(ccq_permute(h[1], h[3], pick), ccq_permute(h[5], h[7], pick), 0x5410);

        ccq_look_up_16(table1, (even >> 4 & 0x07070707) | (odd & 0x70707070), even, odd, t1[2 * p], t1[2 * p + 1]);
        if (ccq_t2_is_short<kind>()) {
            const uint32_t z = (even >> 2 & 0x03030303) | (odd << 2 & 0x30303030);
            t2[2 * p]        = ccq_permute(table2_short, 0, z);
            t2[2 * p + 1]    = ccq_permute(table2_short, 0, z >> 16);
        } else {
            const uint32_t z = (even & 0x07070707) | (odd << 4 & 0x70707070);
            ccq_look_up_16(table2, z, even << 4, odd << 4, t2[2 * p], t2[2 * p + 1]);
        }
    }
}

// Levels of the weights of thread t of half a block of CCQ2_B.
static __device__ __forceinline__ void ccq_decode_b(
    const uint8_t * block, int half, int t, uint32_t (&level)[CCQ_THREAD_WORDS]) {
    const float code_scale = ccq_as_float(ccq_load_u32(block));
    const float zp5        = ccq_as_float(ccq_load_u32(block + 4)) + 0.5f;
#pragma unroll
    for (int w = 0; w < CCQ_THREAD_WORDS; w += 2) {
        const uint32_t codes = ccq_load_u16(block + 14 + 64 * half + 8 * t + w);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float    f      = floorf(fmaf((float) (codes >> 8 * i & 255), code_scale, zp5));
            const uint32_t v      = fabsf(f) < 1073741824.0f ? (uint32_t) (int) f : 0;  // also for NaN
            const uint32_t fields = (v >> 9 & 0x3F) | (v << 2 & 0x3F00) | (v << 13 & 0x3F0000) | (v << 24 & 0x3F000000);
            level[w + i]          = (fields + 0x60606060) ^ 0x80808080;  // less 32, byte by byte
        }
    }
}

// The scale of weights 64*g to 64*g + 63 of a unit is ccq_scale() times level g of ccq_scale_levels(): a byte each, the
// levels of the planes in sixteenths, or the local scales.
template <ccq_kind kind> static __device__ __forceinline__ float ccq_scale(const uint8_t * block, uint32_t head) {
    if constexpr (kind == CCQ_KIND_2_B) {
        return ccq_as_float(ccq_load_u16(block + 8) << 16);
    } else {
        return (head & 254) == 0 ? 0.0f : ccq_as_float(((head & 254) << 19) + (103u << 23));
    }
}

template <ccq_kind kind> static __device__ __forceinline__ uint32_t ccq_scale_levels(
    const uint8_t * block, uint32_t head, int half) {
    if constexpr (kind == CCQ_KIND_2_B) {
        const uint32_t l = ccq_load_u16(block + 10 + 2 * half);  // the even group is in the high nibble
        return (l >> 4 & 0x0F) | (l & 0x0F) << 8 | (l << 4 & 0x0F0000) | (l & 0x0F00) << 16;
    } else {
        uint32_t l = head >> 8;
        l          = (l | l << 4) & 0x0F0F;
        l          = (l | l << 2) & 0x3333;
        return ccq_permute(0x15110F0D, 0, l);  // 13, 15, 17, 21
    }
}

static __device__ __forceinline__ int ccq_byte(uint32_t word, int i) {
    return (int) ccq_permute(word, 0, 0x4440 + i);
}

template <ccq_kind kind> static __device__ __forceinline__ const uint8_t * ccq_block(const uint8_t * row, int unit) {
    return row + (int64_t) (kind == CCQ_KIND_2_B ? unit / 2 : unit) * ccq_block_bytes<kind>();
}

// What a thread knows of a unit.
struct ccq_thread_weights {
    uint32_t level[CCQ_THREAD_WORDS];
    uint32_t scale_levels;
    float    scale;
};

template <ccq_kind kind>
static __device__ __forceinline__ void ccq_decode(const uint8_t * row, int unit, int t, ccq_thread_weights & x) {
    const uint8_t * block = ccq_block<kind>(row, unit);
    const uint32_t  head  = ccq_load_u16(block);
    if constexpr (kind == CCQ_KIND_2_B) {
        ccq_decode_b(block, unit & 1, t, x.level);
    } else {
        uint32_t t2[CCQ_THREAD_WORDS];
        ccq_decode_native<kind>(block, head, t, x.level, t2);
#pragma unroll
        for (int w = 0; w < CCQ_THREAD_WORDS; w++) {
            x.level[w] = ccq_add_bytes(x.level[w], t2[w]);
        }
    }
    x.scale_levels = ccq_scale_levels<kind>(block, head, unit & 1);
    x.scale        = ccq_scale<kind>(block, head);
}
