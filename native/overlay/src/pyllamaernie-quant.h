#pragma once

// What llama-quant.cpp and llama-model-loader.cpp say of values that no quantized file can hold.

#include "ggml.h"
#include "pyllamaernie-quantize.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

// why ggml_quantize_chunk has written nothing
inline std::string pyllamaernie_refusal(
    ggml_type type, const float * src, int64_t nrows, int64_t n_per_row, const float * imatrix, int64_t first_row) {
    char text[256];
    return ggml_quantize_check(type, src, 0, nrows, n_per_row, imatrix, first_row, text, sizeof(text)) ?
        "out of memory" :
        text;
}

// where the bytes [offs, offs + size) of a tensor, which are `data`, first decode to no finite number; empty if nowhere
inline std::string pyllamaernie_bad_value(const ggml_tensor * tensor, const void * data, size_t offs, size_t size) {
    const int64_t      n_per_row = tensor->ne[0];
    const size_t       row_size  = ggml_row_size(tensor->type, n_per_row);
    const auto         to_float  = ggml_get_type_traits(tensor->type)->to_float;
    std::vector<float> buf(n_per_row);
    for (size_t at = 0; at + row_size <= size; at += row_size) {
        const char *  row = (const char *) data + at;
        const float * x   = tensor->type == GGML_TYPE_F32 ? (const float *) row : buf.data();
        if (tensor->type != GGML_TYPE_F32) {
            if (to_float == nullptr) {
                return "";
            }
            to_float(row, buf.data(), n_per_row);
        }
        const int64_t col = std::find_if(x, x + n_per_row, [](float v) { return !std::isfinite(v); }) - x;
        if (col < n_per_row) {
            char text[128];
            snprintf(text, sizeof(text), ": row %lld, column %lld is %g", (long long) ((offs + at) / row_size),
                (long long) col, (double) x[col]);
            return text;
        }
    }
    return "";
}

// what to do about a tensor that an importance matrix does not have
inline const char * pyllamaernie_imatrix_hint(const std::string & name) {
    return name.find("_exps_vl.") == std::string::npos ?
        "" :
        ": vision experts see pictures only, 'pyllamaernie imatrix --images FOLDER' covers them";
}

// files that are removed unless the list is emptied
struct pyllamaernie_unfinished {
    std::vector<std::string> paths;

    ~pyllamaernie_unfinished() {
        for (const auto & path : paths) {
            std::remove(path.c_str());
        }
    }
};
