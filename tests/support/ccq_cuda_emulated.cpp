// The CCQ kernels of ggml-cuda for the CPU, with a C interface for tests/native/test_ccq_cuda.py. Launches as in ccq.cu.

#include "cuda_emulator.h"
#include "ggml-cuda/ccq-kernels.cuh"

using emulator::launch;

template <typename F> static int with_kind(int kind, F f) {
    switch (kind) {
        case CCQ_KIND_2:    f(std::integral_constant<ccq_kind, CCQ_KIND_2>());    return 0;
        case CCQ_KIND_2_25: f(std::integral_constant<ccq_kind, CCQ_KIND_2_25>()); return 0;
        case CCQ_KIND_2_5:  f(std::integral_constant<ccq_kind, CCQ_KIND_2_5>());  return 0;
        case CCQ_KIND_2_75: f(std::integral_constant<ccq_kind, CCQ_KIND_2_75>()); return 0;
        case CCQ_KIND_2_B:  f(std::integral_constant<ccq_kind, CCQ_KIND_2_B>());  return 0;
        default: return 1;
    }
}

static unsigned ceil_div(int64_t a, int64_t b) { return (unsigned) ((a + b - 1)/b); }

template <typename dst_t> static int dequantize(int kind, const void * x, void * y, int64_t n_units, int order) {
    const unsigned n_blocks = ceil_div(n_units*CCQ_UNIT_THREADS, CCQ_DEQUANTIZE_THREADS);
    return with_kind(kind, [=](auto k) {
        launch(n_blocks, CCQ_DEQUANTIZE_THREADS, order, [=] { ccq_dequantize<k.value>((const uint8_t *) x, (dst_t *) y, n_units); });
    });
}

extern "C" {

int emulated_to_fp32(int kind, const void * x, void * y, int64_t n_units, int order) { return dequantize<float>(kind, x, y, n_units, order); }
int emulated_to_fp16(int kind, const void * x, void * y, int64_t n_units, int order) { return dequantize<half>(kind, x, y, n_units, order); }
int emulated_to_bf16(int kind, const void * x, void * y, int64_t n_units, int order) { return dequantize<nv_bfloat16>(kind, x, y, n_units, order); }

// strides: nb01, nb02, nb03, s10, s11, s12, s1, s2, s3
int emulated_get_rows(int kind, const void * x, const int32_t * rows, float * y, int n_units, const int64_t * ne, const int64_t * strides, int order) {
    ccq_get_rows_args args = { n_units, ne[1], ne[2], strides[0], strides[1], strides[2], strides[3], strides[4], strides[5], strides[6], strides[7], strides[8] };
    const dim3 grid(ne[0], ceil_div((int64_t) n_units*CCQ_UNIT_THREADS, CCQ_DEQUANTIZE_THREADS), ne[1]*ne[2]);
    return with_kind(kind, [=](auto k) {
        launch(grid, CCQ_DEQUANTIZE_THREADS, order, [=] { ccq_get_rows<k.value>((const uint8_t *) x, rows, y, args); });
    });
}

int emulated_mul_mat_vec(
        int kind, const void * x, const void * y, const int32_t * ids, float * dst, const ccq_mul_mat_args * args, int n_channels, int n_samples, int order) {
    const ccq_mul_mat_args a = *args;
    const dim3 grid(ceil_div(a.n_rows, CCQ_VEC_ROWS), n_channels, n_samples);
    const dim3 block(32, CCQ_VEC_WARPS);
    const uint8_t    * xb = (const uint8_t *) x;
    const block_q8_1 * yb = (const block_q8_1 *) y;
    return with_kind(kind, [=](auto k) {
        switch (a.n_cols) {
            case 1: launch(grid, block, order, [=] { ccq_mul_mat_vec<k.value, 1>(xb, yb, ids, dst, a); }); break;
            case 3: launch(grid, block, order, [=] { ccq_mul_mat_vec<k.value, 3>(xb, yb, ids, dst, a); }); break;
            case 8: launch(grid, block, order, [=] { ccq_mul_mat_vec<k.value, 8>(xb, yb, ids, dst, a); }); break;
            default: abort();
        }
    });
}

int emulated_mul_mat_tiles(
        int kind, const void * x, const void * y, const int32_t * bounds, const int32_t * from, const int32_t * to, float * dst,
        const ccq_mul_mat_args * args, int n_matrices, int order) {
    const ccq_mul_mat_args a = *args;
    const dim3 grid(ceil_div(a.n_rows, CCQ_TILE_ROWS), ceil_div(a.n_cols, CCQ_TILE_COLS), n_matrices);
    return with_kind(kind, [=](auto k) {
        launch(grid, dim3(32, CCQ_TILE_WARPS), order, [=] {
            ccq_mul_mat_tiles<k.value>((const uint8_t *) x, (const block_q8_1 *) y, bounds, from, to, dst, a);
        });
    });
}

// ccq_get_constants(): k, m, then t1 and t2 of both tables
int emulated_constants(int kind, int32_t * out) {
    return with_kind(kind, [=](auto k) {
        constexpr ccq_constants c = ccq_get_constants<k.value>();
        int n = 0;
        for (int i = 0; i < 4; i++) { out[n++] = (int32_t) c.k[i]; }
        for (int i = 0; i < 4; i++) { out[n++] = (int32_t) c.m[i]; }
        for (int i = 0; i < 32; i++) { out[n++] = c.t1[i/16][i % 16]; }
        for (int i = 0; i < 32; i++) { out[n++] = c.t2[i/16][i % 16]; }
    });
}

}
