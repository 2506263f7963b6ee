#pragma once

// Kernels of the CCQ types. Whoever includes this has included common.cuh, convert.cuh and mma.cuh before, or the
// stand-ins of tests/cuda_emulator.h.

#include "ccq-decode.cuh"

// ---------------------------------------------------------------- to floats

#define CCQ_DEQUANTIZE_THREADS 256

// One thread decodes 16 weights of a row of n_units units.
template <ccq_kind kind, typename dst_t>
static __device__ __forceinline__ void ccq_dequantize_16(const uint8_t * row, int unit, int t, dst_t * dst) {
    uint32_t level[4];
    const uint8_t * block = ccq_decode<kind>(row, unit, t, level);
#pragma unroll
    for (int w = 0; w < 4; w++) {
        const int   word  = ccq_word<kind>(t, w);
        const float scale = ccq_scale<kind>(block, unit & 1, word/16);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            dst[4*word + i] = ggml_cuda_cast<dst_t>((float) (int8_t) (level[w] >> 8*i)*scale);
        }
    }
}

template <ccq_kind kind, typename dst_t>
static __global__ void ccq_dequantize(const uint8_t * x, dst_t * y, const int64_t n_units) {
    const int64_t i = (int64_t) blockIdx.x*CCQ_DEQUANTIZE_THREADS + threadIdx.x;
    const int64_t unit = i/CCQ_UNIT_THREADS;
    if (unit >= n_units) {
        return;
    }
    // blocks from the first one on, so that the unit's number fits an int
    const int64_t first = unit & ~(int64_t) 1;
    const uint8_t * row = x + (kind == CCQ_KIND_2_B ? first/2 : first)*ccq_block_bytes<kind>();
    ccq_dequantize_16<kind>(row, (int) (unit & 1), (int) (i % CCQ_UNIT_THREADS), y + unit*CCQ_UNIT);
}

struct ccq_get_rows_args {
    int     n_units;                                            // of a row
    int64_t ne11, ne12;                                         // of the row numbers
    int64_t nb01, nb02, nb03;                                   // of x, in bytes
    int64_t s10, s11, s12;                                      // of the row numbers
    int64_t s1, s2, s3;                                         // of dst
};

template <ccq_kind kind, typename dst_t>
static __global__ void ccq_get_rows(const uint8_t * x, const int32_t * rows, dst_t * dst, const ccq_get_rows_args args) {
    const int i = blockIdx.y*CCQ_DEQUANTIZE_THREADS + threadIdx.x;
    const int unit = i/CCQ_UNIT_THREADS;
    if (unit >= args.n_units) {
        return;
    }
    const int64_t i10 = blockIdx.x;
    for (int64_t z = blockIdx.z; z < args.ne11*args.ne12; z += gridDim.z) {
        const int64_t i11 = z/args.ne12;
        const int64_t i12 = z % args.ne12;
        const int64_t i01 = rows[i10*args.s10 + i11*args.s11 + i12*args.s12];
        const uint8_t * row = x + i01*args.nb01 + i11*args.nb02 + i12*args.nb03;
        ccq_dequantize_16<kind>(row, unit, i % CCQ_UNIT_THREADS, dst + i10*args.s1 + i11*args.s2 + i12*args.s3 + unit*CCQ_UNIT);
    }
}

// ---------------------------------------------------------------- matrix times up to eight vectors

#define CCQ_VEC_WARPS     4 // of a thread block; each has rows of its own
#define CCQ_VEC_ROWS      2 // of a warp
#define CCQ_VEC_COLS_MAX  8

// Rows of x are numbered within a channel, columns of y and dst as well; a channel is a matrix. Strides of x count bytes,
// of y blocks, of dst floats. With ids, a channel of dst is one of the experts a token has chosen and a sample is a token.
struct ccq_mul_mat_args {
    int     n_units;         // of a row of x
    int     n_rows;          // of x
    int     n_cols;          // of y
    int     n_channels_y;
    int     channel_ratio;   // channels of y for one of x
    int     sample_ratio;
    int64_t row_x, channel_x, sample_x;
    int64_t col_y, channel_y, sample_y;
    int64_t col_dst, channel_dst, sample_dst;
    int64_t stride_ids;      // from one token to the next
};

// Products of the 16 weights of a thread with those of a column: y + 8*unit are the column's blocks that belong to the unit.
template <ccq_kind kind>
static __device__ __forceinline__ float ccq_dot_16(
        const uint8_t * block, int half, int t, const uint32_t (&t1)[4], const uint32_t (&t2)[4], const int (&q)[4], const float (&d)[4]) {
    if constexpr (kind == CCQ_KIND_2_B) {
        int sum = 0;
#pragma unroll
        for (int w = 0; w < 4; w++) {
            sum = ggml_cuda_dp4a((int) t1[w], q[w], sum);
        }
        return ccq_scale<kind>(block, half, t/4)*(d[0]*(float) sum);
    } else {
        float total = 0.0f;
#pragma unroll
        for (int p = 0; p < 4; p++) {
            const int sum = ggml_cuda_dp4a((int) t2[p], q[p], ggml_cuda_dp4a((int) t1[p], q[p], 0));
            total += ccq_scale<kind>(block, half, p)*(d[p]*(float) sum);
        }
        return total;
    }
}

template <ccq_kind kind, int n_cols>
__launch_bounds__(CCQ_VEC_WARPS*32, 1)
static __global__ void ccq_mul_mat_vec(
        const uint8_t * x, const block_q8_1 * y, const int32_t * ids, float * dst, const ccq_mul_mat_args args) {
    const int row0 = (blockIdx.x*CCQ_VEC_WARPS + threadIdx.y)*CCQ_VEC_ROWS;
    if (row0 >= args.n_rows) {
        return; // the whole warp
    }
    const int channel = blockIdx.y;
    const int sample  = blockIdx.z;
    const int64_t channel_x = ids ? ids[sample*args.stride_ids + channel] : channel/args.channel_ratio;
    const int64_t sample_x  = ids ? 0 : sample/args.sample_ratio;
    const int64_t channel_y = ids ? channel % args.n_channels_y : channel;

    x   += channel_x*args.channel_x + sample_x*args.sample_x;
    y   += channel_y*args.channel_y + sample*args.sample_y;
    dst += channel*args.channel_dst + sample*args.sample_dst + row0;

    const int t = threadIdx.x % CCQ_UNIT_THREADS;
    float sums[n_cols][CCQ_VEC_ROWS] = {{ 0.0f }};

    for (int unit = threadIdx.x/CCQ_UNIT_THREADS; unit < args.n_units; unit += 32/CCQ_UNIT_THREADS) {
        const uint8_t * block[CCQ_VEC_ROWS];
        uint32_t t1[CCQ_VEC_ROWS][4];
        uint32_t t2[CCQ_VEC_ROWS][4];
#pragma unroll
        for (int r = 0; r < CCQ_VEC_ROWS; r++) {
            const int row = row0 + r < args.n_rows ? row0 + r : row0; // the last row twice, rather than a branch
            block[r] = x + row*args.row_x + (int64_t) ccq_block_of(kind, unit)*ccq_block_bytes<kind>();
            if constexpr (kind == CCQ_KIND_2_B) {
                ccq_decode_b(block[r], unit & 1, t, t1[r]);
            } else {
                ccq_decode_native<kind>(block[r], t, t1[r], t2[r]);
            }
        }
#pragma unroll
        for (int c = 0; c < n_cols; c++) {
            const block_q8_1 * yc = y + c*args.col_y + 8*unit;
            int   q[4];
            float d[4];
#pragma unroll
            for (int w = 0; w < 4; w++) {
                const int word = ccq_word<kind>(t, w);
                q[w] = ((const int *) yc[word/8].qs)[word % 8];
                d[w] = __low2float(yc[word/8].ds);
            }
#pragma unroll
            for (int r = 0; r < CCQ_VEC_ROWS; r++) {
                sums[c][r] += ccq_dot_16<kind>(block[r], unit & 1, t, t1[r], t2[r], q, d);
            }
        }
    }

#pragma unroll
    for (int c = 0; c < n_cols; c++) {
#pragma unroll
        for (int r = 0; r < CCQ_VEC_ROWS; r++) {
            const float sum = warp_reduce_sum<32>(sums[c][r]);
            if (threadIdx.x == 0 && row0 + r < args.n_rows) {
                dst[c*args.col_dst + r] = sum;
            }
        }
    }
}

// ---------------------------------------------------------------- matrix times matrix, by tiles of bytes

#define CCQ_TILE_ROWS    64 // of x
#define CCQ_TILE_COLS    64 // of y
#define CCQ_TILE_STRIDE  (CCQ_UNIT_WORDS + 4) // of a row of a tile, in words: the eight rows of a fragment hit all banks
#define CCQ_TILE_WARPS   8  // 4 of 16 rows by 2 of 32 columns
#define CCQ_TILE_THREADS (32*CCQ_TILE_WARPS)

// One unit of all rows of x and of all columns of y goes through shared memory as bytes, with a float for 64 weights and
// one for 32 activations. Without ids a z of the grid is a matrix; with them it is an expert e, whose columns are numbers
// bounds[e] to bounds[e + 1] of a list: from[i] is the column of y that number i reads, to[i] the one of dst.
template <ccq_kind kind>
__launch_bounds__(CCQ_TILE_THREADS, 2)
static __global__ void ccq_mul_mat_tiles(
        const uint8_t * x, const block_q8_1 * y, const int32_t * bounds, const int32_t * from, const int32_t * to, float * dst,
        const ccq_mul_mat_args args) {
#if defined(TURING_MMA_AVAILABLE)
    using namespace ggml_cuda_mma;
    typedef tile<16, 8, int> tile_x;
    typedef tile< 8, 8, int> tile_y;
    typedef tile<16, 8, int> tile_dst;

    __shared__ __align__(16) int x_words[CCQ_TILE_ROWS*CCQ_TILE_STRIDE];
    __shared__ __align__(16) int y_words[CCQ_TILE_COLS*CCQ_TILE_STRIDE];
    __shared__ float x_scales[CCQ_TILE_ROWS*4];
    __shared__ float y_scales[CCQ_TILE_COLS*8];

    const int row0 = blockIdx.x*CCQ_TILE_ROWS;
    const int col0 = blockIdx.y*CCQ_TILE_COLS;
    int n_cols = args.n_cols;
    if (bounds) {
        const int first = bounds[blockIdx.z];
        n_cols = bounds[blockIdx.z + 1] - first;
        from  += first;
        to    += first;
        x     += blockIdx.z*args.channel_x;
    } else {
        const int channel = blockIdx.z % args.n_channels_y;
        const int sample  = blockIdx.z / args.n_channels_y;
        x   += channel/args.channel_ratio*args.channel_x + sample/args.sample_ratio*args.sample_x;
        y   += channel*args.channel_y   + sample*args.sample_y;
        dst += channel*args.channel_dst + sample*args.sample_dst;
    }
    if (col0 >= n_cols) {
        return; // the whole thread block
    }

    const int thread   = 32*threadIdx.y + threadIdx.x;
    const int row_warp = threadIdx.y % 4 * 16;
    const int col_warp = threadIdx.y / 4 * 32;
    float sums[4][tile_dst::ne] = {{ 0.0f }};

    for (int unit = 0; unit < args.n_units; unit++) {
        for (int i = thread; i < CCQ_TILE_ROWS*CCQ_UNIT_THREADS; i += CCQ_TILE_THREADS) {
            const int row = i/CCQ_UNIT_THREADS;
            const int t   = i % CCQ_UNIT_THREADS;
            uint32_t level[4];
            const uint8_t * row_x = x + (row0 + row < args.n_rows ? row0 + row : row0)*args.row_x;
            const uint8_t * block = ccq_decode<kind>(row_x, unit, t, level);
#pragma unroll
            for (int w = 0; w < 4; w++) {
                x_words[row*CCQ_TILE_STRIDE + ccq_word<kind>(t, w)] = (int) level[w];
            }
            if (t < 4) {
                x_scales[4*row + t] = ccq_scale<kind>(block, unit & 1, t);
            }
        }
        for (int i = thread; i < CCQ_TILE_COLS*CCQ_UNIT_WORDS; i += CCQ_TILE_THREADS) {
            const int col  = i/CCQ_UNIT_WORDS;
            const int word = i % CCQ_UNIT_WORDS;
            int   q = 0;
            float d = 0.0f;
            if (col0 + col < n_cols) {
                const int64_t col_y = from ? from[col0 + col] : col0 + col;
                const block_q8_1 * block = y + col_y*args.col_y + 8*unit + word/8;
                q = ((const int *) block->qs)[word % 8];
                d = __low2float(block->ds);
            }
            y_words[col*CCQ_TILE_STRIDE + word] = q;
            if (word % 8 == 0) {
                y_scales[8*col + word/8] = d;
            }
        }
        __syncthreads();

        if (col0 + col_warp < n_cols) {
#pragma unroll
            for (int k = 0; k < 8; k++) { // of 32 weights
                tile_x a;
                load_ldmatrix(a, x_words + row_warp*CCQ_TILE_STRIDE + 8*k, CCQ_TILE_STRIDE);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    tile_y   b;
                    tile_dst c;
                    load_generic(b, y_words + (col_warp + 8*j)*CCQ_TILE_STRIDE + 8*k, CCQ_TILE_STRIDE);
                    mma(c, a, b);
#pragma unroll
                    for (int l = 0; l < tile_dst::ne; l++) {
                        const float scale_x = x_scales[4*(row_warp + tile_dst::get_i(l)) + k/2];
                        const float scale_y = y_scales[8*(col_warp + 8*j + tile_dst::get_j(l)) + k];
                        sums[j][l] += scale_x*(scale_y*(float) c.x[l]);
                    }
                }
            }
        }
        __syncthreads();
    }

#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int l = 0; l < tile_dst::ne; l++) {
            const int row = row0 + row_warp + tile_dst::get_i(l);
            const int col = col0 + col_warp + 8*j + tile_dst::get_j(l);
            if (row < args.n_rows && col < n_cols) {
                dst[(to ? to[col] : col)*args.col_dst + row] = sums[j][l];
            }
        }
    }
#else
    GGML_UNUSED_VARS(x, y, bounds, from, to, dst, args);
    NO_DEVICE_CODE;
#endif // defined(TURING_MMA_AVAILABLE)
}
