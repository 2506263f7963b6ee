#pragma once

// Kernels of the CCQ types. Whoever includes this has included common.cuh, convert.cuh and mma.cuh before, or the
// stand-ins of tests/support/cuda_emulator.h.

#include "ccq-decode.cuh"

// ---------------------------------------------------------------- to floats

#define CCQ_DEQUANTIZE_THREADS 256

// One thread decodes 32 weights of a row.
template <ccq_kind kind, typename dst_t>
static __device__ __forceinline__ void ccq_dequantize_32(const uint8_t * row, int unit, int t, dst_t * dst) {
    ccq_thread_weights x;
    ccq_decode<kind>(row, unit, t, x);
#pragma unroll
    for (int w = 0; w < CCQ_THREAD_WORDS; w++) {
        const int   word  = ccq_word<kind>(t, w);
        const float scale = (float) ccq_byte(x.scale_levels, word / 16) * x.scale;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            dst[4 * word + i] = ggml_cuda_cast<dst_t>((float) (int8_t) (x.level[w] >> 8 * i) * scale);
        }
    }
}

template <ccq_kind kind, typename dst_t>
static __global__ void ccq_dequantize(const uint8_t * x, dst_t * y, const int64_t n_units) {
    const int64_t i    = (int64_t) blockIdx.x * CCQ_DEQUANTIZE_THREADS + threadIdx.x;
    const int64_t unit = i / CCQ_UNIT_THREADS;
    if (unit >= n_units) {
        return;
    }
    // blocks from the first one on, so that the unit's number fits an int
    const int64_t   first = unit & ~(int64_t) 1;
    const uint8_t * row   = x + (kind == CCQ_KIND_2_B ? first / 2 : first) * ccq_block_bytes<kind>();
    ccq_dequantize_32<kind>(row, (int) (unit & 1), (int) (i % CCQ_UNIT_THREADS), y + unit * CCQ_UNIT);
}

struct ccq_get_rows_args {
    int     n_units;           // of a row
    int64_t ne11, ne12;        // of the row numbers
    int64_t nb01, nb02, nb03;  // of x, in bytes
    int64_t s10, s11, s12;     // of the row numbers
    int64_t s1, s2, s3;        // of dst
};

template <ccq_kind kind, typename dst_t>
static __global__ void ccq_get_rows(
    const uint8_t * x, const int32_t * rows, dst_t * dst, const ccq_get_rows_args args) {
    const int i    = blockIdx.y * CCQ_DEQUANTIZE_THREADS + threadIdx.x;
    const int unit = i / CCQ_UNIT_THREADS;
    if (unit >= args.n_units) {
        return;
    }
    const int64_t i10 = blockIdx.x;
    for (int64_t z = blockIdx.z; z < args.ne11 * args.ne12; z += gridDim.z) {
        const int64_t   i11 = z / args.ne12;
        const int64_t   i12 = z % args.ne12;
        const int64_t   i01 = rows[i10 * args.s10 + i11 * args.s11 + i12 * args.s12];
        const uint8_t * row = x + i01 * args.nb01 + i11 * args.nb02 + i12 * args.nb03;
        ccq_dequantize_32<kind>(
            row, unit, i % CCQ_UNIT_THREADS, dst + i10 * args.s1 + i11 * args.s2 + i12 * args.s3 + unit * CCQ_UNIT);
    }
}

// ---------------------------------------------------------------- matrix times up to eight vectors

#define CCQ_VEC_WARPS    4  // of a thread block
#define CCQ_VEC_ROWS     8  // of a thread block: half a warp has a row, and two units of it at a time
#define CCQ_VEC_COLS_MAX 8

// Rows of x are numbered within a channel, columns of y and dst as well; a channel is a matrix. Strides of x count bytes,
// of y blocks, of dst floats. With ids, a channel of dst is one of the experts a token has chosen and a sample is a token.
struct ccq_mul_mat_args {
    int     n_units;  // of a row of x
    int     n_rows;   // of x
    int     n_cols;   // of y
    int     n_channels_y;
    int     channel_ratio;  // channels of y for one of x
    int     sample_ratio;
    int64_t row_x, channel_x, sample_x;
    int64_t col_y, channel_y, sample_y;
    int64_t col_dst, channel_dst, sample_dst;
    int64_t stride_ids;  // from one token to the next
};

template <ccq_kind kind, int n_cols>
__launch_bounds__(CCQ_VEC_WARPS * 32, 1) static __global__ void ccq_mul_mat_vec(
    const uint8_t * x, const block_q8_1 * y, const int32_t * ids, float * dst, const ccq_mul_mat_args args) {
    const int     row       = blockIdx.x * CCQ_VEC_ROWS + threadIdx.y * 2 + threadIdx.x / 16;
    const int     channel   = blockIdx.y;
    const int     sample    = blockIdx.z;
    const int64_t channel_x = ids ? ids[sample * args.stride_ids + channel] : channel / args.channel_ratio;
    const int64_t sample_x  = ids ? 0 : sample / args.sample_ratio;
    const int64_t channel_y = ids ? channel % args.n_channels_y : channel;

    const int t     = threadIdx.x % CCQ_UNIT_THREADS;
    const int word0 = ccq_word<kind>(t, 0);
    x += channel_x * args.channel_x + sample_x * args.sample_x + (row < args.n_rows ? row : 0) * args.row_x;
    y += channel_y * args.channel_y + sample * args.sample_y + word0 / 8;
    dst += channel * args.channel_dst + sample * args.sample_dst + row;

    float sums[n_cols] = { 0.0f };
    for (int unit = threadIdx.x / CCQ_UNIT_THREADS % 2; unit < args.n_units; unit += 2) {
        const uint8_t *           block = ccq_block<kind>(x, unit);
        const uint32_t            head  = ccq_load_u16(block);
        uint32_t                  t1[CCQ_THREAD_WORDS];
        [[maybe_unused]] uint32_t t2[CCQ_THREAD_WORDS];
        if constexpr (kind == CCQ_KIND_2_B) {
            ccq_decode_b(block, unit & 1, t, t1);
        } else {
            ccq_decode_native<kind>(block, head, t, t1, t2);
        }
        const uint32_t levels = ccq_scale_levels<kind>(block, head, unit & 1);
        const float    scale  = ccq_scale<kind>(block, head);
#pragma unroll
        for (int c = 0; c < n_cols; c++) {
            const block_q8_1 * yc    = y + c * args.col_y + 8 * unit;
            float              total = 0.0f;
            if constexpr (kind == CCQ_KIND_2_B) {  // the thread's weights are those of one block of y
                const int * q   = (const int *) yc->qs;
                int         sum = 0;
#pragma unroll
                for (int w = 0; w < CCQ_THREAD_WORDS; w++) {
                    sum = ggml_cuda_dp4a((int) t1[w], q[w], sum);
                }
                total = __low2float(yc->ds) * (float) (sum * ccq_byte(levels, t / 2));
            } else {
#pragma unroll
                for (int p = 0; p < 4; p++) {
                    const int * q   = (const int *) yc[2 * p].qs + word0 % 8;
                    int         sum = 0;
#pragma unroll
                    for (int w = 0; w < 2; w++) {
                        sum = ggml_cuda_dp4a((int) t1[2 * p + w], q[w], sum);
                        sum = ggml_cuda_dp4a((int) t2[2 * p + w], q[w], sum);
                    }
                    total += __low2float(yc[2 * p].ds) * (float) (sum * ccq_byte(levels, p));
                }
            }
            sums[c] += scale * total;
        }
    }

#pragma unroll
    for (int c = 0; c < n_cols; c++) {
        const float sum = warp_reduce_sum<16>(sums[c]);
        if (threadIdx.x % 16 == 0 && row < args.n_rows) {
            dst[c * args.col_dst] = sum;
        }
    }
}

// ---------------------------------------------------------------- matrix times matrix, by tiles of bytes

#define CCQ_TILE_ROWS 64  // of x
#define CCQ_TILE_COLS 64  // of y
#define CCQ_TILE_STRIDE                                                                                                \
    (CCQ_UNIT_WORDS + 4)    // of a row of a tile, in words: the eight rows of a fragment hit all banks
#define CCQ_TILE_WARPS   8  // 4 of 16 rows by 2 of 32 columns
#define CCQ_TILE_THREADS (32 * CCQ_TILE_WARPS)

// One unit of all rows of x and of all columns of y goes through shared memory as bytes, with a float for 64 weights and
// one for 32 activations. Without ids a z of the grid is a matrix; with them it is an expert e, whose columns are numbers
// bounds[e] to bounds[e + 1] of a list: from[i] is the column of y that number i reads, to[i] the one of dst.
template <ccq_kind kind>
__launch_bounds__(CCQ_TILE_THREADS, 2) static __global__ void ccq_mul_mat_tiles(const uint8_t * x, const block_q8_1 * y,
    const int32_t * bounds, const int32_t * from, const int32_t * to, float * dst, const ccq_mul_mat_args args) {
#if defined(TURING_MMA_AVAILABLE)
    using namespace ggml_cuda_mma;
    typedef tile<16, 8, int> tile_x;
    typedef tile<8, 8, int>  tile_y;
    typedef tile<16, 8, int> tile_dst;

    __shared__ __align__(16) int x_words[CCQ_TILE_ROWS * CCQ_TILE_STRIDE];
    __shared__ __align__(16) int y_words[CCQ_TILE_COLS * CCQ_TILE_STRIDE];
    __shared__ float             x_scales[CCQ_TILE_ROWS * 4];
    __shared__ float             y_scales[CCQ_TILE_COLS * 8];

    const int row0   = blockIdx.x * CCQ_TILE_ROWS;
    const int col0   = blockIdx.y * CCQ_TILE_COLS;
    int       n_cols = args.n_cols;
    if (bounds) {
        const int first = bounds[blockIdx.z];
        n_cols          = bounds[blockIdx.z + 1] - first;
        from += first;
        to += first;
        x += blockIdx.z * args.channel_x;
    } else {
        const int channel = blockIdx.z % args.n_channels_y;
        const int sample  = blockIdx.z / args.n_channels_y;
        x += channel / args.channel_ratio * args.channel_x + sample / args.sample_ratio * args.sample_x;
        y += channel * args.channel_y + sample * args.sample_y;
        dst += channel * args.channel_dst + sample * args.sample_dst;
    }
    if (col0 >= n_cols) {
        return;  // the whole thread block
    }

    const int thread                = 32 * threadIdx.y + threadIdx.x;
    const int row_warp              = threadIdx.y % 4 * 16;
    const int col_warp              = threadIdx.y / 4 * 32;
    float     sums[4][tile_dst::ne] = { { 0.0f } };

    for (int unit = 0; unit < args.n_units; unit++) {
        for (int i = thread; i < CCQ_TILE_ROWS * CCQ_UNIT_THREADS; i += CCQ_TILE_THREADS) {
            const int          row = i / CCQ_UNIT_THREADS;
            const int          t   = i % CCQ_UNIT_THREADS;
            ccq_thread_weights weights;
            ccq_decode<kind>(x + (row0 + row < args.n_rows ? row0 + row : row0) * args.row_x, unit, t, weights);
#pragma unroll
            for (int w = 0; w < CCQ_THREAD_WORDS; w++) {
                x_words[row * CCQ_TILE_STRIDE + ccq_word<kind>(t, w)] = (int) weights.level[w];
            }
            if (t < 4) {
                x_scales[4 * row + t] = (float) ccq_byte(weights.scale_levels, t) * weights.scale;
            }
        }
        for (int i = thread; i < CCQ_TILE_COLS * CCQ_UNIT_WORDS; i += CCQ_TILE_THREADS) {
            const int col  = i / CCQ_UNIT_WORDS;
            const int word = i % CCQ_UNIT_WORDS;
            int       q    = 0;
            float     d    = 0.0f;
            if (col0 + col < n_cols) {
                const int64_t      col_y = from ? from[col0 + col] : col0 + col;
                const block_q8_1 * block = y + col_y * args.col_y + 8 * unit + word / 8;
                q                        = ((const int *) block->qs)[word % 8];
                d                        = __low2float(block->ds);
            }
            y_words[col * CCQ_TILE_STRIDE + word] = q;
            if (word % 8 == 0) {
                y_scales[8 * col + word / 8] = d;
            }
        }
        __syncthreads();

        if (col0 + col_warp < n_cols) {
#pragma unroll 2                           // all eight take more registers than Turing has
            for (int k = 0; k < 8; k++) {  // of 32 weights
                tile_x a;
                load_ldmatrix(a, x_words + row_warp * CCQ_TILE_STRIDE + 8 * k, CCQ_TILE_STRIDE);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    tile_y   b;
                    tile_dst c;
                    load_generic(b, y_words + (col_warp + 8 * j) * CCQ_TILE_STRIDE + 8 * k, CCQ_TILE_STRIDE);
                    mma(c, a, b);
#pragma unroll
                    for (int l = 0; l < tile_dst::ne; l++) {
                        const float scale_x = x_scales[4 * (row_warp + tile_dst::get_i(l)) + k / 2];
                        const float scale_y = y_scales[8 * (col_warp + 8 * j + tile_dst::get_j(l)) + k];
                        sums[j][l] += scale_x * (scale_y * (float) c.x[l]);
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
            const int col = col0 + col_warp + 8 * j + tile_dst::get_j(l);
            if (row < args.n_rows && col < n_cols) {
                dst[(to ? to[col] : col) * args.col_dst + row] = sums[j][l];
            }
        }
    }
#else
    GGML_UNUSED_VARS(x, y, bounds, from, to, dst, args);
    NO_DEVICE_CODE;
#endif  // defined(TURING_MMA_AVAILABLE)
}
