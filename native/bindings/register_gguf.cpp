// The header of a GGUF file as plain Python values, read by ggml's own checked reader; no tensor data is touched.

#include "bindings.h"

#include "ggml.h"
#include "gguf.h"

#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>

namespace py = pybind11;

struct gguf_deleter {
    void operator()(gguf_context * ctx) const {
        gguf_free(ctx);
    }
};

static py::str text(const char * value) {
    return py::reinterpret_steal<py::str>(PyUnicode_DecodeUTF8(value, (Py_ssize_t) strlen(value), "replace"));
}

// Numbers, flags and strings as they are; an array as its length, which is all that callers ask of the vocabulary.
static py::object value(const gguf_context * ctx, int64_t id) {
    switch (gguf_get_kv_type(ctx, id)) {
        case GGUF_TYPE_UINT8:   return py::int_(gguf_get_val_u8(ctx, id));
        case GGUF_TYPE_INT8:    return py::int_(gguf_get_val_i8(ctx, id));
        case GGUF_TYPE_UINT16:  return py::int_(gguf_get_val_u16(ctx, id));
        case GGUF_TYPE_INT16:   return py::int_(gguf_get_val_i16(ctx, id));
        case GGUF_TYPE_UINT32:  return py::int_(gguf_get_val_u32(ctx, id));
        case GGUF_TYPE_INT32:   return py::int_(gguf_get_val_i32(ctx, id));
        case GGUF_TYPE_UINT64:  return py::int_(gguf_get_val_u64(ctx, id));
        case GGUF_TYPE_INT64:   return py::int_(gguf_get_val_i64(ctx, id));
        case GGUF_TYPE_FLOAT32: return py::float_(gguf_get_val_f32(ctx, id));
        case GGUF_TYPE_FLOAT64: return py::float_(gguf_get_val_f64(ctx, id));
        case GGUF_TYPE_BOOL:    return py::bool_(gguf_get_val_bool(ctx, id));
        case GGUF_TYPE_STRING:  return text(gguf_get_val_str(ctx, id));
        case GGUF_TYPE_ARRAY:   return py::int_(gguf_get_arr_n(ctx, id));
        default:                return py::none();
    }
}

static py::dict gguf_read(const std::string & path) {
    gguf_init_params                            params = { /*.no_alloc =*/true, /*.ctx =*/nullptr };
    std::unique_ptr<gguf_context, gguf_deleter> ctx;
    {
        py::gil_scoped_release release;
        ctx.reset(gguf_init_from_file(path.c_str(), params));
    }
    if (!ctx) {
        throw std::runtime_error("not a readable GGUF header");
    }

    py::dict metadata;
    for (int64_t id = 0; id < gguf_get_n_kv(ctx.get()); id++) {
        metadata[text(gguf_get_key(ctx.get(), id))] = value(ctx.get(), id);
    }

    py::list tensors;
    for (int64_t id = 0; id < gguf_get_n_tensors(ctx.get()); id++) {
        const int64_t * ne = gguf_get_tensor_ne(ctx.get(), id);
        tensors.append(
            py::make_tuple(text(gguf_get_tensor_name(ctx.get(), id)), py::make_tuple(ne[0], ne[1], ne[2], ne[3]),
                std::string(ggml_type_name(gguf_get_tensor_type(ctx.get(), id))),
                gguf_get_data_offset(ctx.get()) + gguf_get_tensor_offset(ctx.get(), id),
                gguf_get_tensor_size(ctx.get(), id)));
    }

    py::dict res;
    res["version"]  = gguf_get_version(ctx.get());
    res["metadata"] = metadata;
    res["tensors"]  = tensors;
    return res;
}

void register_gguf(py::module_ & m) {
    m.def("gguf_read", &gguf_read, py::arg("path"));
}
