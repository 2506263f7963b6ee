#pragma once

// The native CCQ types in upstream's tiled matrix products: a block is decoded once for up to 256 rows of activations.
// Included by tiled.cpp.

#include "ccq.h"
#include "ggml.h"
#include "tiled/tiled-kernel.h"

// Template arguments: weights that share a scale; whether there are minimums; what is added to weights; whether to add
// 128 to activations instead of giving them signs (AVX2). Combinations that upstream compiles: a scale of 64 weights is
// given twice.
#if defined(__AVX512VNNI__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define CCQ_TILE 32, false, 128, false
#else
#define CCQ_TILE 32, false, 128, true
#endif

#define CCQ_TILED_UNPACK(NAME, lower)                                                                                  \
    static void tiled_unpack_src0(                                                                                     \
        const block_##lower * rows, int64_t row_stride, int n_rows, tiled_tile_src0 * tile, int num_k) {               \
        for (int slab = 0; slab < num_k; slab++) {                                                                     \
            ggml_ccq_unpack_rows(GGML_TYPE_##NAME, rows + slab, row_stride * sizeof(*rows), n_rows,                    \
                tile->d + slab * TILED_MICRO, tile->scales + 8 * slab, 8 * num_k, tile->q + slab * TILED_TILE_K,       \
                num_k * TILED_TILE_K);                                                                                 \
        }                                                                                                              \
    }

// clang-format off
CCQ_TILED_UNPACK(CCQ2,    ccq2)
CCQ_TILED_UNPACK(CCQ2_25, ccq2_25)
CCQ_TILED_UNPACK(CCQ2_5,  ccq2_5)
CCQ_TILED_UNPACK(CCQ2_75, ccq2_75)
// clang-format on

// clang-format off
// lines of upstream's two switches over types
#define CCQ_TILED_TYPES case GGML_TYPE_CCQ2: case GGML_TYPE_CCQ2_25: case GGML_TYPE_CCQ2_5: case GGML_TYPE_CCQ2_75:

#define CCQ_TILED_DISPATCH(...)                                                                      \
        case GGML_TYPE_CCQ2:    return tiled_matmul_dispatch<block_ccq2,    CCQ_TILE>(__VA_ARGS__); \
        case GGML_TYPE_CCQ2_25: return tiled_matmul_dispatch<block_ccq2_25, CCQ_TILE>(__VA_ARGS__); \
        case GGML_TYPE_CCQ2_5:  return tiled_matmul_dispatch<block_ccq2_5,  CCQ_TILE>(__VA_ARGS__); \
        case GGML_TYPE_CCQ2_75: return tiled_matmul_dispatch<block_ccq2_75, CCQ_TILE>(__VA_ARGS__);
// clang-format on
