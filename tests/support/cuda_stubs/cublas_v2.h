#pragma once

// What ggml-cuda names of cuBLAS, declared only: enough to compile it where the library (half a gigabyte) is not installed.

#include <cuda_runtime.h>
#include <library_types.h>

typedef struct cublasContext * cublasHandle_t;

enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS,
    CUBLAS_STATUS_NOT_INITIALIZED,
    CUBLAS_STATUS_ALLOC_FAILED,
    CUBLAS_STATUS_INVALID_VALUE,
    CUBLAS_STATUS_ARCH_MISMATCH,
    CUBLAS_STATUS_MAPPING_ERROR,
    CUBLAS_STATUS_EXECUTION_FAILED,
    CUBLAS_STATUS_INTERNAL_ERROR,
    CUBLAS_STATUS_NOT_SUPPORTED,
};
enum cublasOperation_t   { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasComputeType_t { CUBLAS_COMPUTE_16F, CUBLAS_COMPUTE_32F };
enum cublasGemmAlgo_t    { CUBLAS_GEMM_DEFAULT, CUBLAS_GEMM_DEFAULT_TENSOR_OP };
enum cublasMath_t        { CUBLAS_DEFAULT_MATH, CUBLAS_TF32_TENSOR_OP_MATH };

#define CUBLAS_VER_MAJOR 13
#define CUBLAS_VER_MINOR 0

const char * cublasGetStatusString(cublasStatus_t status);

#define CUBLAS_FUNCTION(name) template <typename... T> cublasStatus_t name(T...);
CUBLAS_FUNCTION(cublasCreate)
CUBLAS_FUNCTION(cublasDestroy)
CUBLAS_FUNCTION(cublasSetMathMode)
CUBLAS_FUNCTION(cublasSetStream)
CUBLAS_FUNCTION(cublasSetWorkspace)
CUBLAS_FUNCTION(cublasLoggerConfigure)
CUBLAS_FUNCTION(cublasSgemm)
CUBLAS_FUNCTION(cublasGemmEx)
CUBLAS_FUNCTION(cublasGemmBatchedEx)
CUBLAS_FUNCTION(cublasGemmStridedBatchedEx)
#undef CUBLAS_FUNCTION
