#pragma once

// ggml_quantize_chunk refuses what it cannot write: it returns 0, and this function says why.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// true if ggml_quantize_chunk would write these rows. Else `text` (of `size` bytes, may be NULL) gets the reason, such as
// "row 3, column 7: the weight is nan, not a finite number"; rows count from `first_row`, that of src + start.
GGML_API bool ggml_quantize_check(enum ggml_type type, const float * src, int64_t start, int64_t nrows,
    int64_t n_per_row, const float * imatrix, int64_t first_row, char * text, size_t size);

// ggml_quantize_chunk, which clamps values that the type cannot hold, and says so in the log; here `limit` tells instead:
// the least magnitude that any row was clamped to, infinity where none was.
GGML_API size_t ggml_quantize_chunk_clamped(enum ggml_type type, const float * src, void * dst, int64_t start,
    int64_t nrows, int64_t n_per_row, const float * imatrix, float * limit);

#ifdef __cplusplus
}
#endif
