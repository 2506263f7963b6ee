// The compiled half of pyllamaernie: one register_* call per area, nothing else.

#include "bindings.h"

PYBIND11_MODULE(_core, m) {
    m.doc() = "Thin bindings over llama.h, mtmd.h and upstream's server engine; see pyllamaernie.llama for the API.";
    register_log(m);
    register_gguf(m);
    register_engine(m);
    register_model(m);
    register_imatrix(m);
    register_probe(m);
    register_quant(m);
    register_rpc(m);
}
