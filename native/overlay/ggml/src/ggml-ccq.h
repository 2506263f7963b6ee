#pragma once

// CCQ: convolutional-code quantization, 2.0625 to 2.8125 bits per weight, and Baidu's 2-bit code without loss.
// pyllamaernie/quant/ccq.py defines the formats; this is the same in C. Needs nothing of ggml.

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#define CCQ_STATIC_ASSERT static_assert
#else
#define CCQ_STATIC_ASSERT _Static_assert
#endif

#define QK_CCQ   256  // weights of a block: four planes of 64, weight 64*p + b belongs to code byte b
#define QK_CCQ_B 512

typedef struct {
    uint8_t d;       // bit 0: table; bits 1..7: scale u, 0 is zero, else 2^((u >> 3) - 20) * (1 + (u & 7)/8)
    uint8_t l;       // bits 2p..2p+1: level index of plane p
    uint8_t qs[64];  // byte b and the next one (63 is followed by 0) are the 16-bit window of step b
} block_ccq2;
CCQ_STATIC_ASSERT(sizeof(block_ccq2) == 66, "wrong size of block_ccq2");

typedef struct {
    uint8_t d;
    uint8_t l;
    uint8_t qs[64];
    uint8_t e1[8];  // byte j, bit i: refinement bit of step 8*i + j
} block_ccq2_25;
CCQ_STATIC_ASSERT(sizeof(block_ccq2_25) == 74, "wrong size of block_ccq2_25");

typedef struct {
    uint8_t d;
    uint8_t l;
    uint8_t qs[64];
    uint8_t e2[16];  // byte j, bits 2i..2i+1: refinement bits of step 16*i + j
} block_ccq2_5;
CCQ_STATIC_ASSERT(sizeof(block_ccq2_5) == 82, "wrong size of block_ccq2_5");

typedef struct {
    uint8_t d;
    uint8_t l;
    uint8_t qs[64];
    uint8_t e2[16];  // refinement bits 0 and 1, as in block_ccq2_5
    uint8_t e1[8];   // refinement bit 2, as in block_ccq2_25
} block_ccq2_75;
CCQ_STATIC_ASSERT(sizeof(block_ccq2_75) == 90, "wrong size of block_ccq2_75");

typedef struct {
    uint8_t code_scale[4];  // f32, little endian
    uint8_t code_zp[4];     // f32, little endian
    uint8_t super_bf16[2];  // bf16, little endian
    uint8_t ls[4];          // local scales: byte j holds group 2j (high nibble) and 2j+1 (low nibble) of 64 weights
    uint8_t qs[128];        // byte j codes weights 4j..4j+3
} block_ccq2_b;
CCQ_STATIC_ASSERT(sizeof(block_ccq2_b) == 142, "wrong size of block_ccq2_b");

// What tells one native type from another.
typedef struct {
    uint16_t k[4];       // multiplier of plane p, odd
    uint16_t m[4];       // multiplier of the refinement bits
    int8_t   t1[2][16];  // level = t1[table][h >> 4] + t2[table][h & 15]; table 1 has the longer tails
    int8_t   t2[2][16];
    int32_t  e_bits;  // refinement bits of a step: 0..3
} ggml_ccq_code;

extern const ggml_ccq_code ggml_ccq_codes[4];  // ccq2, ccq2_25, ccq2_5, ccq2_75

// clang-format off
void dequantize_row_ccq2   (const block_ccq2    * x, float * y, int64_t k);
void dequantize_row_ccq2_25(const block_ccq2_25 * x, float * y, int64_t k);
void dequantize_row_ccq2_5 (const block_ccq2_5  * x, float * y, int64_t k);
void dequantize_row_ccq2_75(const block_ccq2_75 * x, float * y, int64_t k);
void dequantize_row_ccq2_b (const block_ccq2_b  * x, float * y, int64_t k);

// Bytes written. imatrix: n_per_row importances or NULL. No input ends the process: what is not finite counts for
// nothing and decodes to something finite; a caller that must refuse it asks ggml_ccq_find_bad first.
size_t quantize_ccq2   (const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
size_t quantize_ccq2_25(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
size_t quantize_ccq2_5 (const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
size_t quantize_ccq2_75(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix);

// Baidu's code with one code_scale for all blocks: good enough for tests; checkpoints in it are imported, not encoded.
size_t quantize_ccq2_b (const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix);

void quantize_row_ccq2_ref   (const float * x, void * y, int64_t k);
void quantize_row_ccq2_25_ref(const float * x, void * y, int64_t k);
void quantize_row_ccq2_5_ref (const float * x, void * y, int64_t k);
void quantize_row_ccq2_75_ref(const float * x, void * y, int64_t k);
void quantize_row_ccq2_b_ref (const float * x, void * y, int64_t k);
// clang-format on

// For ggml_validate_row_data: whether blocks of the type with this id hold only finite numbers.
int ggml_ccq_validate(int id, const void * data, size_t n_blocks);

// Index of the first value that is NaN or infinite, -1 if there is none.
int64_t ggml_ccq_find_bad(const float * x, int64_t n);

// Index of the first block of a row whose numbers are not finite, -1 if there is none. The native types have none.
int64_t ggml_ccq2_b_find_bad(const block_ccq2_b * x, int64_t n_blocks);

// One type given by its constants, for the search of constants and the tests: n_blocks of 256 weights.
// weights: as many importances, or NULL. beam: states kept while scales are searched, 1..256, a sixth of them at first; the
// last passes keep all (half of them where a step has eight refinements).
void ggml_ccq_encode(
    const ggml_ccq_code * code, const float * x, const float * weights, int64_t n_blocks, int beam, uint8_t * dst);
void ggml_ccq_decode(const ggml_ccq_code * code, const uint8_t * src, int64_t n_blocks, float * y);

// Summed squared error of the best tail-biting path of every block when plane p is gain[p] times its levels of table 0.
// index (n_blocks * 256, or NULL) receives h of every weight. For the search of constants.
double ggml_ccq_code_error(
    const ggml_ccq_code * code, const float * x, int64_t n_blocks, const float gain[4], int beam, uint8_t * index);

#ifdef __cplusplus
}
#endif
