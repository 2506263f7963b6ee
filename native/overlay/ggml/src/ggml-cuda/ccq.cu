#include "ccq.cuh"
#include "mma.cuh"
#include "mmid.cuh"
#include "quantize.cuh"

// A dense product with more columns than this goes through 16-bit floats and cuBLAS. A guess that no measurement backs;
// the environment variable GGML_CUDA_CCQ_TILES_MAX holds another, for bench/ccq_cuda.py.
#define CCQ_TILES_MAX 128

bool ggml_cuda_is_ccq(ggml_type type) {
    switch ((int) type) {
#define PYLLAMAERNIE_TYPE(NAME, lower, id, block_size, text)                                                           \
    case GGML_TYPE_##NAME: return true;
#include "pyllamaernie-types.inc"
        default: return false;
    }
}

bool ggml_cuda_ccq_is_src0(const ggml_tensor * op) {
    return (op->op == GGML_OP_MUL_MAT || op->op == GGML_OP_MUL_MAT_ID || op->op == GGML_OP_GET_ROWS) &&
        ggml_cuda_is_ccq(op->src[0]->type);
}

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

bool ggml_cuda_ccq_supports_op(const ggml_tensor *, int) {
    return false;
}

to_fp32_cuda_t ggml_cuda_ccq_to_fp32(ggml_type) {
    return nullptr;
}
to_fp16_cuda_t ggml_cuda_ccq_to_fp16(ggml_type) {
    return nullptr;
}
to_bf16_cuda_t ggml_cuda_ccq_to_bf16(ggml_type) {
    return nullptr;
}

void ggml_cuda_ccq_get_rows(const void *, ggml_type type, const int32_t *, void *, ggml_type, int64_t, size_t, size_t,
    size_t, int64_t, int64_t, int64_t, size_t, size_t, size_t, size_t, size_t, size_t, cudaStream_t) {
    GGML_ABORT("%s is not supported by this backend", ggml_type_name(type));
}

bool ggml_cuda_ccq_mul_mat(ggml_backend_cuda_context &, const ggml_tensor *, const ggml_tensor *, ggml_tensor *) {
    return false;
}
bool ggml_cuda_ccq_mul_mat_id(ggml_backend_cuda_context &, ggml_tensor *) {
    return false;
}
bool ggml_cuda_ccq_mul_mat_id_needs_sync(const ggml_tensor *, int) {
    return true;
}

#else

#include "ccq-kernels.cuh"

// ---------------------------------------------------------------- launchers

// Calls f with the type's ccq_kind as a constant.
template <typename F> static void ccq_switch(ggml_type type, F f) {
    switch ((int) type) {
        case GGML_TYPE_CCQ2:    f(std::integral_constant<ccq_kind, CCQ_KIND_2>()); break;
        case GGML_TYPE_CCQ2_25: f(std::integral_constant<ccq_kind, CCQ_KIND_2_25>()); break;
        case GGML_TYPE_CCQ2_5:  f(std::integral_constant<ccq_kind, CCQ_KIND_2_5>()); break;
        case GGML_TYPE_CCQ2_75: f(std::integral_constant<ccq_kind, CCQ_KIND_2_75>()); break;
        case GGML_TYPE_CCQ2_B:  f(std::integral_constant<ccq_kind, CCQ_KIND_2_B>()); break;
        default:                GGML_ABORT("%s is no CCQ type", ggml_type_name(type));
    }
}

template <ccq_kind kind, typename dst_t>
static void ccq_dequantize_cuda(const void * x, dst_t * y, int64_t k, cudaStream_t stream) {
    GGML_ASSERT(k % CCQ_UNIT == 0);
    const int64_t n_units  = k / CCQ_UNIT;
    const int64_t n_blocks = (n_units * CCQ_UNIT_THREADS + CCQ_DEQUANTIZE_THREADS - 1) / CCQ_DEQUANTIZE_THREADS;
    ccq_dequantize<kind><<<n_blocks, CCQ_DEQUANTIZE_THREADS, 0, stream>>>((const uint8_t *) x, y, n_units);
}

template <typename dst_t> static to_t_cuda_t<dst_t> ccq_to(ggml_type type) {
    if (!ggml_cuda_is_ccq(type)) {
        return nullptr;
    }
    to_t_cuda_t<dst_t> convert = nullptr;
    ccq_switch(type, [&](auto kind) { convert = ccq_dequantize_cuda<kind.value, dst_t>; });
    return convert;
}

template <typename dst_t>
static void ccq_get_rows_cuda(const void * src0, ggml_type type, const int32_t * rows, dst_t * dst,
    const ccq_get_rows_args & args, int64_t ne10, cudaStream_t stream) {
    const int64_t n_y =
        ((int64_t) args.n_units * CCQ_UNIT_THREADS + CCQ_DEQUANTIZE_THREADS - 1) / CCQ_DEQUANTIZE_THREADS;
    GGML_ASSERT(n_y <= UINT16_MAX);
    const dim3 n_blocks(ne10, n_y, std::min<int64_t>(args.ne11 * args.ne12, UINT16_MAX));
    ccq_switch(type, [&](auto kind) {
        ccq_get_rows<kind.value>
            <<<n_blocks, CCQ_DEQUANTIZE_THREADS, 0, stream>>>((const uint8_t *) src0, rows, dst, args);
    });
}

template <ccq_kind kind>
static void ccq_mul_mat_vec_cuda(const uint8_t * x, const block_q8_1 * y, const int32_t * ids, float * dst,
    const ccq_mul_mat_args & args, dim3 n_blocks, cudaStream_t stream) {
    const dim3 n_threads(32, CCQ_VEC_WARPS, 1);
    switch (args.n_cols) {
        case 1:  ccq_mul_mat_vec<kind, 1><<<n_blocks, n_threads, 0, stream>>>(x, y, ids, dst, args); break;
        case 2:  ccq_mul_mat_vec<kind, 2><<<n_blocks, n_threads, 0, stream>>>(x, y, ids, dst, args); break;
        case 3:  ccq_mul_mat_vec<kind, 3><<<n_blocks, n_threads, 0, stream>>>(x, y, ids, dst, args); break;
        case 4:  ccq_mul_mat_vec<kind, 4><<<n_blocks, n_threads, 0, stream>>>(x, y, ids, dst, args); break;
        case 5:  ccq_mul_mat_vec<kind, 5><<<n_blocks, n_threads, 0, stream>>>(x, y, ids, dst, args); break;
        case 6:  ccq_mul_mat_vec<kind, 6><<<n_blocks, n_threads, 0, stream>>>(x, y, ids, dst, args); break;
        case 7:  ccq_mul_mat_vec<kind, 7><<<n_blocks, n_threads, 0, stream>>>(x, y, ids, dst, args); break;
        case 8:  ccq_mul_mat_vec<kind, 8><<<n_blocks, n_threads, 0, stream>>>(x, y, ids, dst, args); break;
        default: GGML_ABORT("%d columns: a product with vectors takes 1 to %d", args.n_cols, CCQ_VEC_COLS_MAX);
    }
}

static void ccq_mul_mat_vec_launch(ggml_type type, const void * x, const block_q8_1 * y, const int32_t * ids,
    float * dst, const ccq_mul_mat_args & args, int64_t n_channels, int64_t n_samples, cudaStream_t stream) {
    GGML_ASSERT(n_channels <= UINT16_MAX && n_samples <= UINT16_MAX);
    const dim3 n_blocks((args.n_rows + CCQ_VEC_ROWS - 1) / CCQ_VEC_ROWS, n_channels, n_samples);
    ccq_switch(type,
        [&](auto kind) { ccq_mul_mat_vec_cuda<kind.value>((const uint8_t *) x, y, ids, dst, args, n_blocks, stream); });
}

static void ccq_mul_mat_tiles_launch(ggml_type type, const void * x, const block_q8_1 * y, const int32_t * bounds,
    const int32_t * from, const int32_t * to, float * dst, const ccq_mul_mat_args & args, int64_t n_matrices,
    cudaStream_t stream) {
    const dim3 n_blocks((args.n_rows + CCQ_TILE_ROWS - 1) / CCQ_TILE_ROWS,
        (args.n_cols + CCQ_TILE_COLS - 1) / CCQ_TILE_COLS, n_matrices);
    const dim3 n_threads(32, CCQ_TILE_WARPS, 1);
    GGML_ASSERT(n_blocks.y <= UINT16_MAX && n_blocks.z <= UINT16_MAX);
    ccq_switch(type, [&](auto kind) {
        ccq_mul_mat_tiles<kind.value>
            <<<n_blocks, n_threads, 0, stream>>>((const uint8_t *) x, y, bounds, from, to, dst, args);
    });
}

// ---------------------------------------------------------------- entries

static int64_t ccq_tiles_max() {
    static const char *  text  = getenv("GGML_CUDA_CCQ_TILES_MAX");
    static const int64_t n_max = text ? atoll(text) : CCQ_TILES_MAX;
    return n_max;
}

// Upstream's cuBLAS path copies weights to 16-bit floats; it takes no weights with gaps between rows.
static bool ccq_use_tiles(const ggml_tensor * src0, int64_t n_cols, int cc) {
    return turing_mma_available(cc) && (n_cols <= ccq_tiles_max() || !ggml_is_contiguously_allocated(src0));
}

bool ggml_cuda_ccq_supports_op(const ggml_tensor * op, int cc) {
    const ggml_tensor * src0 = op->src[0];
    const ggml_tensor * src1 = op->src[1];
    if (src0->nb[0] != ggml_type_size(src0->type) || src1->nb[0] != ggml_type_size(src1->type)) {
        return false;
    }
    if (op->op == GGML_OP_GET_ROWS) {
        return op->type == GGML_TYPE_F32 && src1->type == GGML_TYPE_I32;
    }
    if (op->op == GGML_OP_MUL_MAT_ID && ggml_get_op_params_i32(op, 3) == GGML_PREC_F32) {
        return false;  // as upstream
    }
    return op->type == GGML_TYPE_F32 && src1->type == GGML_TYPE_F32 &&
        (turing_mma_available(cc) || ggml_is_contiguous(src0));
}

to_fp32_cuda_t ggml_cuda_ccq_to_fp32(ggml_type type) {
    return ccq_to<float>(type);
}
to_fp16_cuda_t ggml_cuda_ccq_to_fp16(ggml_type type) {
    return ccq_to<half>(type);
}
to_bf16_cuda_t ggml_cuda_ccq_to_bf16(ggml_type type) {
    return ccq_to<nv_bfloat16>(type);
}

void ggml_cuda_ccq_get_rows(const void * src0, ggml_type src0_type, const int32_t * rows, void * dst,
    ggml_type dst_type, int64_t ne00, size_t nb01, size_t nb02, size_t nb03, int64_t ne10, int64_t ne11, int64_t ne12,
    size_t nb10, size_t nb11, size_t nb12, size_t nb1, size_t nb2, size_t nb3, cudaStream_t stream) {
    const int64_t ts = ggml_type_size(dst_type);
    const int64_t s  = sizeof(int32_t);
    // clang-format off
    const ccq_get_rows_args args = {
        (int) (ne00/CCQ_UNIT), ne11, ne12, (int64_t) nb01, (int64_t) nb02, (int64_t) nb03,
        (int64_t) nb10/s, (int64_t) nb11/s, (int64_t) nb12/s, (int64_t) nb1/ts, (int64_t) nb2/ts, (int64_t) nb3/ts };
    // clang-format on
    switch (dst_type) {
        case GGML_TYPE_F32:  ccq_get_rows_cuda(src0, src0_type, rows, (float *) dst, args, ne10, stream); break;
        case GGML_TYPE_F16:  ccq_get_rows_cuda(src0, src0_type, rows, (half *) dst, args, ne10, stream); break;
        case GGML_TYPE_BF16: ccq_get_rows_cuda(src0, src0_type, rows, (nv_bfloat16 *) dst, args, ne10, stream); break;
        default:             GGML_ABORT("rows of a CCQ type are F32, F16 or BF16, not %s", ggml_type_name(dst_type));
    }
}

// Activations as blocks of 32 bytes and a scale; the number of blocks of a row, which is padded.
static int64_t ccq_quantize_src1(ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1,
    ggml_cuda_pool_alloc<block_q8_1> & y) {
    const int64_t ts       = sizeof(float);
    const int64_t n_padded = GGML_PAD(src1->ne[0], MATRIX_ROW_PADDING);
    y.alloc(ctx.pool(), ggml_nrows(src1) * (n_padded / QK8_1));
    quantize_row_q8_1_cuda((const float *) src1->data, nullptr, y.get(), src0->type, src1->ne[0], src1->nb[1] / ts,
        src1->nb[2] / ts, src1->nb[3] / ts, n_padded, src1->ne[1], src1->ne[2], src1->ne[3], ctx.stream());
    CUDA_CHECK(cudaGetLastError());
    return n_padded / QK8_1;
}

bool ggml_cuda_ccq_mul_mat(
    ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, ggml_tensor * dst) {
    if (!ggml_cuda_is_ccq(src0->type) || src1->type != GGML_TYPE_F32 || dst->type != GGML_TYPE_F32) {
        return false;
    }
    GGML_TENSOR_BINARY_OP_LOCALS
    const int  cc      = ggml_cuda_info().devices[ctx.device].cc;
    const bool use_vec = ne11 <= CCQ_VEC_COLS_MAX;
    if (!use_vec && !ccq_use_tiles(src0, ne11, cc)) {
        return false;
    }
    GGML_ASSERT(nb00 == ggml_type_size(src0->type) && nb10 == sizeof(float) && nb0 == sizeof(float));
    GGML_ASSERT(ne12 % ne02 == 0 && ne13 % ne03 == 0);

    ggml_cuda_pool_alloc<block_q8_1> y;
    const int64_t                    row_blocks = ccq_quantize_src1(ctx, src0, src1, y);
    const int64_t                    ts         = sizeof(float);
    // clang-format off
    const ccq_mul_mat_args args = {
        (int) (ne00/CCQ_UNIT), (int) ne01, (int) ne11, (int) ne12, (int) (ne12/ne02), (int) (ne13/ne03),
        (int64_t) nb01, (int64_t) nb02, (int64_t) nb03, row_blocks, ne11*row_blocks, ne12*ne11*row_blocks,
        (int64_t) nb1/ts, (int64_t) nb2/ts, (int64_t) nb3/ts, 0 };
    // clang-format on
    if (use_vec) {
        ccq_mul_mat_vec_launch(
            src0->type, src0->data, y.get(), nullptr, (float *) dst->data, args, ne12, ne13, ctx.stream());
    } else {
        ccq_mul_mat_tiles_launch(src0->type, src0->data, y.get(), nullptr, nullptr, nullptr, (float *) dst->data, args,
            ne12 * ne13, ctx.stream());
    }
    return true;
}

bool ggml_cuda_ccq_mul_mat_id_needs_sync(const ggml_tensor * dst, int cc) {
    return dst->src[1]->type != GGML_TYPE_F32 || dst->type != GGML_TYPE_F32 ||
        (dst->ne[2] > CCQ_VEC_COLS_MAX && !turing_mma_available(cc));
}

bool ggml_cuda_ccq_mul_mat_id(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];
    const ggml_tensor * ids  = dst->src[2];
    if (!ggml_cuda_is_ccq(src0->type) ||
        ggml_cuda_ccq_mul_mat_id_needs_sync(dst, ggml_cuda_info().devices[ctx.device].cc)) {
        return false;
    }
    GGML_TENSOR_BINARY_OP_LOCALS
    GGML_ASSERT(nb00 == ggml_type_size(src0->type) && nb10 == sizeof(float) && nb0 == sizeof(float));
    GGML_ASSERT(ids->type == GGML_TYPE_I32 && ids->nb[0] == sizeof(int32_t));
    GGML_ASSERT(ne03 == 1 && ne13 == 1 && ne3 == 1 && ne2 == ne12 && ne1 == ids->ne[0]);

    cudaStream_t                     stream     = ctx.stream();
    const int32_t *                  ids_data   = (const int32_t *) ids->data;
    const int64_t                    ts         = sizeof(float);
    const int64_t                    stride_ids = ids->nb[1] / sizeof(int32_t);
    ggml_cuda_pool_alloc<block_q8_1> y;
    const int64_t                    row_blocks = ccq_quantize_src1(ctx, src0, src1, y);

    if (ne12 <= CCQ_VEC_COLS_MAX) {  // every chosen expert of every token by itself
        // clang-format off
        const ccq_mul_mat_args args = {
            (int) (ne00/CCQ_UNIT), (int) ne01, 1, (int) ne11, 1, 1,
            (int64_t) nb01, (int64_t) nb02, 0, 0, row_blocks, ne11*row_blocks, 0, (int64_t) nb1/ts, (int64_t) nb2/ts, stride_ids };
        // clang-format on
        ccq_mul_mat_vec_launch(src0->type, src0->data, y.get(), ids_data, (float *) dst->data, args, ne1, ne12, stream);
        return true;
    }

    const int64_t n_pairs = ne12 * ne1;
    GGML_ASSERT((int64_t) nb2 == ne1 * (int64_t) nb1);  // a pair of token and slot is a column of dst
    ggml_cuda_pool_alloc<int32_t> from(ctx.pool(), n_pairs);
    ggml_cuda_pool_alloc<int32_t> to(ctx.pool(), n_pairs);
    ggml_cuda_pool_alloc<int32_t> bounds(ctx.pool(), ne02 + 1);
    ggml_cuda_launch_mm_ids_helper(ids_data, from.get(), to.get(), bounds.get(), ne02, ne12, ne1, ne11, stride_ids,
        ne11, /*write_inverse =*/false, stream);
    CUDA_CHECK(cudaGetLastError());
    // clang-format off
    const ccq_mul_mat_args args = { // an expert has a token at most once, so it has at most ne12 columns
        (int) (ne00/CCQ_UNIT), (int) ne01, (int) ne12, 1, 1, 1,
        (int64_t) nb01, (int64_t) nb02, 0, row_blocks, 0, 0, (int64_t) nb1/ts, 0, 0, 0 };
    // clang-format on
    ccq_mul_mat_tiles_launch(
        src0->type, src0->data, y.get(), bounds.get(), from.get(), to.get(), (float *) dst->data, args, ne02, stream);
    return true;
}

#endif  // defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)
