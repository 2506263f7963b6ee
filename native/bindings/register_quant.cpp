// Rows of weights to and from the bytes of any ggml type, many threads at once, and the table of those types.
//
// Rows are independent, so any cut of a tensor into calls gives the bytes that llama-quantize writes. What ggml answers
// with an assertion is checked before: a Python exception names the value, its row and its column.

#include "bindings.h"

#include "ggml.h"
#include "ggml-cpu.h"
#include "pyllamaernie-quantize.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

static const int64_t n_values_step = 64 * 1024;  // converted at once: float32 of this many stay in a core's cache

static bool is_float(ggml_type type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
}

// The types that ggml_quantize_chunk writes are those that can be read back; Q8_1 and Q8_K only live in activations.
static bool is_storable(ggml_type type) {
    return is_float(type) || (ggml_is_quantized(type) && ggml_get_type_traits(type)->to_float != nullptr);
}

static ggml_type storable_type(int id) {
    if (id < 0 || id >= GGML_TYPE_COUNT || !is_storable((ggml_type) id)) {
        throw py::value_error("type " + std::to_string(id) + " stores no weights");
    }
    return (ggml_type) id;
}

static std::string number(float value) {
    std::ostringstream out;
    out << value;
    return out.str();
}

static void require_row(ggml_type type, int64_t n_cols) {
    const int64_t block = ggml_blck_size(type);
    if (n_cols <= 0 || n_cols % block != 0) {
        throw py::value_error(std::string(ggml_type_name(type)) + ": rows of " + std::to_string(n_cols) +
            " values are not whole blocks of " + std::to_string(block));
    }
}

static int64_t n_rows_of(ggml_type type, const array_in<uint8_t> & data, int64_t n_cols) {
    require_row(type, n_cols);
    const int64_t row_bytes = (int64_t) ggml_row_size(type, n_cols);
    if (data.nbytes() % row_bytes != 0) {
        throw py::value_error(std::string(ggml_type_name(type)) + ": " + std::to_string(data.nbytes()) +
            " bytes are not whole rows of " + std::to_string(row_bytes));
    }
    return data.nbytes() / row_bytes;
}

static void to_float(ggml_type type, const uint8_t * src, float * dst, int64_t n) {
    switch (type) {
        case GGML_TYPE_F32: memcpy(dst, src, (size_t) n * sizeof(float)); break;
        // exact, as ggml-base's own are, but with the instructions that the processor has for it
        case GGML_TYPE_F16:  ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) src, dst, n); break;
        case GGML_TYPE_BF16: ggml_cpu_bf16_to_fp32((const ggml_bf16_t *) src, dst, n); break;
        default:             ggml_get_type_traits(type)->to_float(src, dst, n);
    }
}

static void require_finite(ggml_type type, const float * x, int64_t n, int64_t n_cols, int64_t first_row) {
    const int64_t i = std::find_if(x, x + n, [](float v) { return !std::isfinite(v); }) - x;
    if (i < n) {
        throw py::value_error(std::string(ggml_type_name(type)) + ": row " + std::to_string(first_row + i / n_cols) +
            ", column " + std::to_string(i % n_cols) + " is " + number(x[i]));
    }
}

static void require_importance(ggml_type type, const float * x, int64_t n_importance, int64_t n_cols) {
    if (x == nullptr) {
        if (ggml_quantize_requires_imatrix(type)) {
            throw py::value_error(std::string(ggml_type_name(type)) + ": cannot be written without importance data");
        }
        return;
    }
    if (n_importance != n_cols) {
        throw py::value_error(std::string(ggml_type_name(type)) + ": importance of " + std::to_string(n_importance) +
            " columns for rows of " + std::to_string(n_cols));
    }
    for (int64_t j = 0; j < n_cols; j++) {
        if (!std::isfinite(x[j]) || x[j] < 0.0f) {
            throw py::value_error(std::string(ggml_type_name(type)) + ": importance of column " + std::to_string(j) +
                " is " + number(x[j]) + ", expected a finite number from 0 up");
        }
    }
}

// Shapes: data (n_rows, row bytes of source) uint8, importance (n_cols,) float32 -> (n_rows, row bytes of type) uint8
static py::array_t<uint8_t> quantize(int type_id, int source_id, const array_in<uint8_t> & data, int64_t n_cols,
    const std::optional<array_in<float>> & importance, int64_t first_row) {
    const ggml_type type   = storable_type(type_id);
    const ggml_type source = storable_type(source_id);
    require_row(type, n_cols);
    const int64_t n_rows  = n_rows_of(source, data, n_cols);
    const float * weights = importance ? importance->data() : nullptr;
    require_importance(type, weights, importance ? importance->size() : 0, n_cols);

    const size_t         source_bytes = ggml_row_size(source, n_cols);
    const size_t         row_bytes    = ggml_row_size(type, n_cols);
    py::array_t<uint8_t> res({ (py::ssize_t) n_rows, (py::ssize_t) row_bytes });
    const uint8_t *      src = data.data();
    uint8_t *            dst = res.mutable_data();

    py::gil_scoped_release release;
    const int64_t          step   = std::max<int64_t>(1, n_values_step / n_cols);
    const bool             copies = source != GGML_TYPE_F32 || (uintptr_t) src % alignof(float) != 0;
    std::vector<float>     buffer(copies ? (size_t) (std::min(step, n_rows) * n_cols) : 0);
    for (int64_t row = 0; row < n_rows; row += step) {
        const int64_t n = std::min(step, n_rows - row);
        const float * x = (const float *) (src + row * source_bytes);
        if (copies) {
            to_float(source, src + row * source_bytes, buffer.data(), n * n_cols);
            x = buffer.data();
        }
        float limit;  // to which values were clamped
        if (ggml_quantize_chunk_clamped(type, x, dst + row * row_bytes, 0, n, n_cols, weights, &limit) == 0) {
            require_finite(type, x, n * n_cols, n_cols, first_row + row);
            throw std::bad_alloc();  // anything else was refused above
        }
        if (std::isfinite(limit) || !ggml_validate_row_data(type, dst + row * row_bytes, (size_t) n * row_bytes)) {
            const int64_t i =
                std::max_element(x, x + n * n_cols, [](float a, float b) { return std::fabs(a) < std::fabs(b); }) - x;
            throw py::value_error(std::string(ggml_type_name(type)) + ": row " +
                std::to_string(first_row + row + i / n_cols) + ", column " + std::to_string(i % n_cols) + " is " +
                number(x[i]) + ", beyond what the type can hold");
        }
    }
    return res;
}

// Shapes: data (n_rows, row bytes) uint8 -> (n_rows, n_cols) float32
static py::array_t<float> dequantize(int type_id, const array_in<uint8_t> & data, int64_t n_cols) {
    const ggml_type        type   = storable_type(type_id);
    const int64_t          n_rows = n_rows_of(type, data, n_cols);
    py::array_t<float>     res({ (py::ssize_t) n_rows, (py::ssize_t) n_cols });
    const uint8_t *        src = data.data();
    float *                dst = res.mutable_data();
    py::gil_scoped_release release;
    to_float(type, src, dst, n_rows * n_cols);
    return res;
}

// Whether every scale, or every value of a float type, is a finite number.
static bool validate(int type_id, const array_in<uint8_t> & data) {
    const ggml_type        type = storable_type(type_id);
    const uint8_t *        src  = data.data();
    const size_t           n    = (size_t) data.nbytes();
    py::gil_scoped_release release;
    return ggml_validate_row_data(type, src, n);
}

// (name, id, values in a block, bytes of a block, is it quantized, does its encoder demand importance data)
static py::list types() {
    py::list res;
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const ggml_type type = (ggml_type) i;
        if (ggml_type_name(type) != nullptr && ggml_blck_size(type) > 0 && is_storable(type)) {
            res.append(py::make_tuple(std::string(ggml_type_name(type)), i, ggml_blck_size(type), ggml_type_size(type),
                ggml_is_quantized(type), ggml_quantize_requires_imatrix(type)));
        }
    }
    return res;
}

void register_quant(py::module_ & m) {
    m.def("quant_types", &types);
    m.def("quantize", &quantize, py::arg("type"), py::arg("source_type"), py::arg("data"), py::arg("n_cols"),
        py::arg("importance"), py::arg("first_row"));
    m.def("dequantize", &dequantize, py::arg("type"), py::arg("data"), py::arg("n_cols"));
    m.def("validate", &validate, py::arg("type"), py::arg("data"));
}
