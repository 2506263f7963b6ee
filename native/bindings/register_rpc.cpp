// RPC: the protocol of this build, and workers as devices of this process. The handshake is pyllamaernie/llama/rpc.py's.

#include "bindings.h"

#include "ggml-backend.h"
#include "ggml-rpc.h"

#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

static bool device_is_rpc(ggml_backend_dev_t dev) {
    return strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev)), "RPC") == 0;
}

// The names of the worker's devices. A worker is registered once for the life of the process, its connection comes and goes.
static std::vector<std::string> rpc_add_server(const std::string & endpoint) {
    ggml_backend_reg_t rpc = ggml_backend_reg_by_name("RPC");
    if (rpc == nullptr) {
        throw std::runtime_error("this build has no RPC backend");
    }
    auto * add_server =
        (decltype(ggml_backend_rpc_add_server) *) ggml_backend_reg_get_proc_address(rpc, "ggml_backend_rpc_add_server");
    ggml_backend_reg_t reg = add_server(endpoint.c_str());
    if (reg == nullptr) {
        throw std::runtime_error("the worker offers no device");
    }
    ggml_backend_register(reg);
    std::vector<std::string> res;
    for (size_t i = 0; i < ggml_backend_reg_dev_count(reg); i++) {
        res.push_back(ggml_backend_dev_name(ggml_backend_reg_dev_get(reg, i)));
    }
    return res;
}

static std::vector<std::string> gpu_devices(bool rpc) {
    std::vector<std::string> res;
    for (size_t i = 0; i < ggml_backend_dev_count(); i++) {
        ggml_backend_dev_t dev  = ggml_backend_dev_get(i);
        const auto         type = ggml_backend_dev_type(dev);
        if ((type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU) &&
            device_is_rpc(dev) == rpc) {
            res.push_back(ggml_backend_dev_name(dev));
        }
    }
    return res;
}

void register_rpc(py::module_ & m) {
    m.attr("RPC_VERSION") =
        py::make_tuple((int) RPC_PROTO_MAJOR_VERSION, (int) RPC_PROTO_MINOR_VERSION, (int) RPC_PROTO_PATCH_VERSION);
    m.def("rpc_add_server", &rpc_add_server, py::arg("endpoint"), py::call_guard<py::gil_scoped_release>());
    m.def("gpu_devices", &gpu_devices, py::arg("rpc"));
}
