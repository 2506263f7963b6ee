// The weights of an open engine, read and overwritten in place: what a coarser type does to the output is measured by
// putting decoded weights where the exact ones were.

#include "bindings.h"

#include "ggml.h"
#include "ggml-backend.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

// Source: llama.cpp src/llama-model.h at the pin, an internal header; upstream's quantize-stats tool uses it too.
const std::vector<std::pair<std::string, ggml_tensor *>> & llama_internal_get_tensor_map(const llama_model * model);

static ggml_tensor * find_tensor(const loaded_model & core, const std::string & name) {
    if (core.model == nullptr) {
        throw std::runtime_error("the engine is closed");
    }
    for (const auto & entry : llama_internal_get_tensor_map(core.model)) {
        if (entry.first == name) {
            return entry.second;
        }
    }
    throw py::value_error("the loaded model has no tensor " + name);
}

// A mapped file cannot be written, and a repacked tensor has another layout than the file.
static void require_plain(const ggml_tensor * t) {
    if (t->buffer == nullptr) {
        throw py::value_error(std::string(t->name) + " is not in memory");
    }
    const char * name = ggml_backend_buft_name(ggml_backend_buffer_get_type(t->buffer));
    for (const char * other : { "Mapped", "REPACK", "AMX", "KLEIDIAI" }) {
        if (strstr(name, other) != nullptr) {
            throw py::value_error(std::string(t->name) + " lies in a buffer of kind " + name +
                ", which cannot be overwritten; load the model without memory mapping, in F32, F16 or BF16");
        }
    }
}

// Shapes: -> (n_bytes,) uint8
static py::array_t<uint8_t> tensor_data(const loaded_model & core, const std::string & name) {
    const ggml_tensor * t = find_tensor(core, name);
    require_plain(t);
    py::array_t<uint8_t>   res((py::ssize_t) ggml_nbytes(t));
    uint8_t *              dst = res.mutable_data();
    py::gil_scoped_release release;
    ggml_backend_tensor_get(t, dst, 0, ggml_nbytes(t));
    return res;
}

// Shapes: data (n_bytes,) uint8 in the tensor's own type
static void set_tensor_data(const loaded_model & core, const std::string & name, const array_in<uint8_t> & data) {
    ggml_tensor * t = find_tensor(core, name);
    require_plain(t);
    if ((size_t) data.nbytes() != ggml_nbytes(t)) {
        throw py::value_error(
            name + " has " + std::to_string(ggml_nbytes(t)) + " bytes, got " + std::to_string(data.nbytes()));
    }
    const uint8_t *        src = data.data();
    py::gil_scoped_release release;
    ggml_backend_tensor_set(t, src, 0, ggml_nbytes(t));
}

void register_probe(py::module_ & m) {
    m.def("tensor_data", &tensor_data, py::arg("engine"), py::arg("name"));
    m.def("set_tensor_data", &set_tensor_data, py::arg("engine"), py::arg("name"), py::arg("data"));
}
