#pragma once

// What the binding sources share; nothing here is seen by Python.

#include "llama.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

// An array argument: copied when it has another type or layout.
template <typename T>
using array_in = pybind11::array_t<T, pybind11::array::c_style | pybind11::array::forcecast>;

// The weights of one open engine. Sessions hold a share and are counted, so the weights outlive them.
class loaded_model {
public:
    virtual ~loaded_model() = default;

    virtual void session_opened() = 0;  // throws when the engine is closed
    virtual void session_closed() = 0;

    struct llama_model * model = nullptr;  // nullptr once the engine is closed
};

// clang-format off
void register_log   (pybind11::module_ & m);
void register_gguf  (pybind11::module_ & m);
void register_engine(pybind11::module_ & m);
void register_model (pybind11::module_ & m);
void register_imatrix(pybind11::module_ & m);
void register_probe (pybind11::module_ & m);
void register_quant (pybind11::module_ & m);
void register_rpc   (pybind11::module_ & m);
// clang-format on
