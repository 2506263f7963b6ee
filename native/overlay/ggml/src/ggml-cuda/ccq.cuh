#pragma once

// What ggml-cuda calls for tensors of a CCQ type, one line at each place. HIP and MUSA have none of it.

#include "common.cuh"
#include "convert.cuh"

bool ggml_cuda_is_ccq(ggml_type type);

// Whether an operation reads weights of a CCQ type in a way that is decided here, and whether the device can do it.
bool ggml_cuda_ccq_is_src0(const ggml_tensor * op);
bool ggml_cuda_ccq_supports_op(const ggml_tensor * op, int cc);

// nullptr for a type that is not CCQ
to_fp32_cuda_t ggml_cuda_ccq_to_fp32(ggml_type type);
to_fp16_cuda_t ggml_cuda_ccq_to_fp16(ggml_type type);
to_bf16_cuda_t ggml_cuda_ccq_to_bf16(ggml_type type);

// Arguments as get_rows_cuda has them; strides are in bytes.
void ggml_cuda_ccq_get_rows(const void * src0, ggml_type src0_type, const int32_t * rows, void * dst,
    ggml_type dst_type, int64_t ne00, size_t nb01, size_t nb02, size_t nb03, int64_t ne10, int64_t ne11, int64_t ne12,
    size_t nb10, size_t nb11, size_t nb12, size_t nb1, size_t nb2, size_t nb3, cudaStream_t stream);

// True if the product is on its way. False: the type is not CCQ, or upstream's path is the one to take, by cuBLAS.
bool ggml_cuda_ccq_mul_mat(
    ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, ggml_tensor * dst);
bool ggml_cuda_ccq_mul_mat_id(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// Whether ggml_cuda_ccq_mul_mat_id would return false for weights of a CCQ type.
bool ggml_cuda_ccq_mul_mat_id_needs_sync(const ggml_tensor * dst, int cc);
