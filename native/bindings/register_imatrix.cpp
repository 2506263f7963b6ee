// Imatrix: a context on an engine's weights that sums the squared inputs of every weight matrix, for text and pictures,
// and for each expert what it adds to the output.
//
// What counts, and how, follows upstream's collector, so that a text gives its numbers: dense matrices of the layers in
// batches of 16 rows or more, expert matrices always, one count per expert. Sums are kept in double precision.
// Source: llama.cpp tools/imatrix/imatrix.cpp at the pin; node names from llama_graph's build_moe_ffn.

#include "session.h"

#include "ggml.h"
#include "ggml-backend.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

static const int64_t n_rows_min = 16;  // upstream leaves smaller batches of a dense matrix out

struct matrix_sums {
    int64_t              n_cols = 0;
    std::vector<double>  values;  // n_mat rows of n_cols
    std::vector<int64_t> counts;  // one for a dense matrix, one per expert
};

// Sums over the tokens of an expert. g: its final weight; y: its output before that; all indexed by expert.
struct expert_sums {
    std::vector<double> gate;        // g
    std::vector<double> gate2;       // g^2
    std::vector<double> gate_out;    // g |y|
    std::vector<double> gate2_out2;  // g^2 |y|^2
    std::vector<double> out_max;     // largest |y|
    std::vector<double> prob;        // of the router, over all tokens; has the length of the router
};

class imatrix_session : public context_session {
public:
    imatrix_session(std::shared_ptr<loaded_model> core, int n_ctx, int n_batch, int n_threads, bool process_output,
        bool experts) : context_session(std::move(core)), process_output(process_output), with_experts(experts) {
        llama_context_params params =
            context_params((uint32_t) n_ctx, (uint32_t) n_batch, (uint32_t) n_batch, n_threads);
        params.cb_eval           = on_node;
        params.cb_eval_user_data = this;
        open(params);
    }

    void load_projector(const std::string & path, const std::string & marker, int n_threads, bool use_gpu) {
        mtmd_context_params params = projector_params(n_threads, use_gpu);
        params.media_marker        = marker.c_str();
        open_projector(path, params);
    }

    // Shapes: (n,) int32
    void add_tokens(const array_in<int32_t> & tokens) {
        require_open();
        const llama_token *    ids = tokens.data();
        const int32_t          n   = (int32_t) tokens.size();
        py::gil_scoped_release release;
        llama_memory_clear(llama_get_memory(ctx.get()), true);
        decode_text(ids, n, 0, [](int32_t, int32_t) {});
    }

    // A rendered prompt with one marker per picture. Returns its tokens. Shapes: pictures (height, width, 3) uint8
    int32_t add_prompt(const std::string & prompt, const std::vector<array_in<uint8_t>> & pictures) {
        require_projector();
        std::vector<mtmd::bitmap> bitmaps;
        for (const auto & rgb : pictures) {
            bitmaps.push_back(picture_bitmap(rgb));
        }
        std::vector<const mtmd_bitmap *> pointers;
        for (const auto & bitmap : bitmaps) {
            pointers.push_back(bitmap.ptr.get());
        }

        py::gil_scoped_release release;
        const mtmd_input_text  text = { prompt.c_str(), prompt.size(), /*add_special*/ true, /*parse_special*/ true };
        mtmd::input_chunks     chunks(mtmd_input_chunks_init());
        if (mtmd_tokenize(mctx.get(), chunks.ptr.get(), &text, pointers.data(), pointers.size()) != 0) {
            throw std::runtime_error("the prompt and its pictures could not be tokenized");
        }
        const int32_t n_tokens = (int32_t) mtmd_helper_get_n_tokens(chunks.ptr.get());
        if (n_tokens > (int32_t) llama_n_ctx(ctx.get())) {
            throw std::length_error("the prompt has " + std::to_string(n_tokens) + " tokens, the context holds " +
                std::to_string(llama_n_ctx(ctx.get())));
        }
        llama_memory_clear(llama_get_memory(ctx.get()), true);
        llama_pos pos = 0;
        for (size_t i = 0; i < chunks.size(); i++) {
            const mtmd_input_chunk * chunk = chunks[i];
            if (mtmd_input_chunk_get_type(chunk) == MTMD_INPUT_CHUNK_TYPE_TEXT) {
                size_t              n   = 0;
                const llama_token * ids = mtmd_input_chunk_get_tokens_text(chunk, &n);
                decode_text(ids, (int32_t) n, pos, [](int32_t, int32_t) {});
            } else {
                if (mtmd_encode_chunk(mctx.get(), chunk) != 0) {
                    throw std::runtime_error("a picture could not be encoded");
                }
                decode_media(chunk, mtmd_get_output_embd(mctx.get()), pos, [](int32_t, int32_t) {});
            }
            pos += mtmd_input_chunk_get_n_pos(chunk);
        }
        return n_tokens;
    }

    // (name, sums (n_mat, n_cols) float32, counts (n_counts,) int64) of each matrix, sorted by name
    py::list statistics() const {
        py::list res;
        for (const auto & entry : sums) {
            const matrix_sums & e     = entry.second;
            const py::ssize_t   n_mat = (py::ssize_t) (e.values.size() / (size_t) e.n_cols);
            py::array_t<float>  values({ n_mat, (py::ssize_t) e.n_cols });
            std::copy(e.values.begin(), e.values.end(), values.mutable_data());
            res.append(py::make_tuple(
                entry.first, values, py::array_t<int64_t>((py::ssize_t) e.counts.size(), e.counts.data())));
        }
        return res;
    }

    // {down projection: {statistic: (n_expert,) float64}}; the probabilities have the length of the router
    py::dict expert_statistics() const {
        py::dict res;
        for (const auto & entry : experts) {
            const expert_sums &                                        e = entry.second;
            py::dict                                                   row;
            const std::pair<const char *, const std::vector<double> *> parts[] = {
                { "gate", &e.gate },
                { "gate2", &e.gate2 },
                { "gate_out", &e.gate_out },
                { "gate2_out2", &e.gate2_out2 },
                { "out_max", &e.out_max },
                { "prob", &e.prob },
            };
            for (const auto & part : parts) {
                if (!part.second->empty()) {
                    row[part.first] = py::array_t<double>((py::ssize_t) part.second->size(), part.second->data());
                }
            }
            res[py::str(entry.first)] = row;
        }
        return res;
    }

private:
    static bool is_named(const ggml_tensor * t, const char * stem) {
        const size_t n = strlen(stem);
        return strncmp(t->name, stem, n) == 0 && t->name[n] == '-';
    }

    // The scheduler offers every node, also those of a branch that is not computed.
    bool wants(const ggml_tensor * t) const {
        if (!(t->flags & GGML_TENSOR_FLAG_COMPUTE)) {
            return false;
        }
        if (t->op == GGML_OP_MUL_MAT_ID) {
            return t->src[1]->type == GGML_TYPE_F32;
        }
        if (with_experts && t->type == GGML_TYPE_F32 && (is_probs(t) || is_weighted(t))) {
            return true;
        }
        if (t->op != GGML_OP_MUL_MAT || t->src[1]->ne[1] < n_rows_min || t->src[1]->type != GGML_TYPE_F32) {
            return false;
        }
        const std::string name = weight_name(t);
        return name.compare(0, 4, "blk.") == 0 || (process_output && name == "output.weight");
    }

    // A weight that the scheduler copied to another device is called DEVICE#name#copy.
    static std::string weight_name(const ggml_tensor * t) {
        const std::string name  = t->src[0]->name;
        const size_t      begin = name.find('#');
        if (begin == std::string::npos) {
            return name;
        }
        const size_t end = name.find('#', begin + 1);
        return name.substr(begin + 1, end == std::string::npos ? end : end - begin - 1);
    }

    static bool is_probs(const ggml_tensor * t) {
        return (t->op == GGML_OP_SOFT_MAX || t->op == GGML_OP_UNARY) && is_named(t, "ffn_moe_probs");
    }

    static bool is_weighted(const ggml_tensor * t) {
        return t->op == GGML_OP_MUL && is_named(t, "ffn_moe_weighted");
    }

    // The weight of the first matrix product that t comes from.
    static std::string source_weight(const ggml_tensor * t) {
        while (t && t->op != GGML_OP_MUL_MAT && t->op != GGML_OP_MUL_MAT_ID) {
            t = t->src[0];
        }
        return t ? weight_name(t) : "";
    }

    static bool on_node(ggml_tensor * t, bool ask, void * user_data) {
        auto * self = (imatrix_session *) user_data;
        if (ask) {
            return self->wants(t);
        }
        try {
            self->collect(t);
        } catch (const std::exception & e) {
            self->failure = e.what();  // an exception must not cross the scheduler
            return false;
        }
        return true;
    }

    static const char * host_data(const ggml_tensor * t, std::vector<char> & copy) {
        if (ggml_backend_buffer_is_host(t->view_src ? t->view_src->buffer : t->buffer)) {
            return (const char *) t->data;
        }
        copy.resize(ggml_nbytes(t));
        ggml_backend_tensor_get(t, copy.data(), 0, copy.size());
        return copy.data();
    }

    matrix_sums & entry_of(const ggml_tensor * t, int64_t n_mat, int64_t n_counts) {
        const std::string name   = weight_name(t);
        matrix_sums &     e      = sums[name];
        const int64_t     n_cols = t->src[1]->ne[0];
        if (e.values.empty()) {
            e.n_cols = n_cols;
            e.values.resize((size_t) (n_cols * n_mat), 0.0);
            e.counts.resize((size_t) n_counts, 0);
        } else if ((int64_t) e.values.size() != n_cols * n_mat || (int64_t) e.counts.size() != n_counts) {
            throw std::runtime_error(name + " appears with two shapes");
        }
        return e;
    }

    static void add_row(double * dst, const char * row, int64_t n) {
        const float * x = (const float *) row;
        for (int64_t j = 0; j < n; j++) {
            dst[j] += (double) x[j] * x[j];
        }
    }

    static void require_finite(const ggml_tensor * t, const double * values, int64_t n) {
        for (int64_t j = 0; j < n; j++) {
            if (!std::isfinite(values[j])) {
                throw std::runtime_error("the inputs of " + weight_name(t) + " are not finite");
            }
        }
    }

    static float value_at(const char * data, const ggml_tensor * t, int64_t i0, int64_t i1, int64_t i2) {
        float res;
        memcpy(&res, data + i0 * t->nb[0] + i1 * t->nb[1] + i2 * t->nb[2], sizeof(res));
        return res;
    }

    // The router's probabilities, before a bias is added for the choice. Shapes: (n_tokens, n_expert)
    void collect_probs(const ggml_tensor * t) {
        std::string  name = source_weight(t);
        const size_t at   = name.find("ffn_gate_inp");
        if (at == std::string::npos) {
            return;
        }
        const bool    is_vl = name.compare(at, 15, "ffn_gate_inp_vl") == 0;
        expert_sums & e = experts[name.substr(0, at) + (is_vl ? "ffn_down_exps_vl.weight" : "ffn_down_exps.weight")];
        const int64_t n_expert = t->ne[0];
        e.prob.resize((size_t) n_expert, 0.0);
        const char * data = host_data(t, src1_copy);
        for (int64_t row = 0; row < t->ne[1]; row++) {
            for (int64_t i = 0; i < n_expert; i++) {
                e.prob[(size_t) i] += value_at(data, t, i, row, 0);
            }
        }
    }

    // t = y * g. The product may lie where y was, so |y| is taken from the product. Shapes: t (n_tokens, n_used, n_embd),
    // g (n_tokens, n_used, 1)
    void collect_weighted(const ggml_tensor * t) {
        if (down_ids.empty() || source_weight(t) != down_name || t->ne[1] * t->ne[2] != (int64_t) down_ids.size()) {
            down_ids.clear();
            return;
        }
        const ggml_tensor * gate = t->src[1];
        expert_sums &       e    = experts[down_name];
        for (auto * part : { &e.gate, &e.gate2, &e.gate_out, &e.gate2_out2, &e.out_max }) {
            part->resize((size_t) n_down, 0.0);
        }
        const char * data      = host_data(t, src1_copy);
        const char * gate_data = host_data(gate, ids_copy);
        for (int64_t row = 0; row < t->ne[2]; row++) {
            for (int64_t i = 0; i < t->ne[1]; i++) {
                const size_t expert = (size_t) down_ids[(size_t) (row * t->ne[1] + i)];
                const double g      = value_at(gate_data, gate, 0, i, row);
                double       out2   = 0.0;  // of the product
                for (int64_t j = 0; j < t->ne[0]; j++) {
                    const double x = value_at(data, t, j, i, row);
                    out2 += x * x;
                }
                if (!std::isfinite(out2)) {
                    throw std::runtime_error("the outputs of " + down_name + " are not finite");
                }
                const double out = std::sqrt(out2);
                e.gate[expert] += g;
                e.gate2[expert] += g * g;
                e.gate_out[expert] += out;
                e.gate2_out2[expert] += out2;
                e.out_max[expert] = std::max(e.out_max[expert], g != 0.0 ? out / std::fabs(g) : 0.0);
            }
        }
        down_ids.clear();
    }

    void collect(const ggml_tensor * t) {
        if (t->op == GGML_OP_MUL) {
            return collect_weighted(t);
        }
        if (t->op != GGML_OP_MUL_MAT && t->op != GGML_OP_MUL_MAT_ID) {
            return collect_probs(t);
        }
        const ggml_tensor * src0   = t->src[0];
        const ggml_tensor * src1   = t->src[1];
        const char *        data   = host_data(src1, src1_copy);
        const int64_t       n_cols = src1->ne[0];

        if (t->op == GGML_OP_MUL_MAT_ID) {
            const ggml_tensor * ids      = t->src[2];  // [n_expert_used, n_tokens], often a view
            const int64_t       n_expert = src0->ne[2];
            const char *        ids_data = host_data(ids, ids_copy);
            matrix_sums &       e        = entry_of(t, n_expert, n_expert);
            // kept for the weighted outputs: by then the ids' memory may be taken
            const bool is_down = with_experts && weight_name(t).find("ffn_down_exps") != std::string::npos;
            if (is_down) {
                down_name = weight_name(t);
                n_down    = n_expert;
                down_ids.clear();
            }
            for (int64_t row = 0; row < ids->ne[1]; row++) {
                for (int64_t i = 0; i < ids->ne[0]; i++) {
                    int32_t expert;
                    memcpy(&expert, ids_data + row * ids->nb[1] + i * ids->nb[0], sizeof(expert));
                    if (expert < 0 || expert >= n_expert) {
                        throw std::runtime_error(
                            weight_name(t) + ": expert id " + std::to_string(expert) + " is out of range");
                    }
                    if (is_down) {
                        down_ids.push_back(expert);
                    }
                    e.counts[(size_t) expert]++;
                    add_row(e.values.data() + expert * n_cols,
                        data + row * src1->nb[2] + (i % src1->ne[1]) * src1->nb[1], n_cols);
                }
            }
            require_finite(t, e.values.data(), n_cols * n_expert);
            return;
        }

        const int64_t n_mat = src0->ne[2] * src0->ne[3];
        matrix_sums & e     = entry_of(t, n_mat, 1);
        for (int64_t i3 = 0; i3 < src1->ne[3]; i3++) {
            for (int64_t i2 = 0; i2 < src1->ne[2]; i2++) {
                const int64_t mat = (i3 % src0->ne[3]) * src0->ne[2] + i2 % src0->ne[2];
                for (int64_t i1 = 0; i1 < src1->ne[1]; i1++) {
                    add_row(e.values.data() + mat * n_cols,
                        data + i1 * src1->nb[1] + i2 * src1->nb[2] + i3 * src1->nb[3], n_cols);
                }
            }
        }
        e.counts[0] += ggml_nrows(src1) / n_mat;
        require_finite(t, e.values.data(), n_cols * n_mat);
    }

    bool                               process_output;
    bool                               with_experts;
    std::map<std::string, matrix_sums> sums;
    std::map<std::string, expert_sums> experts;    // by the name of the down projection
    std::string                        down_name;  // the down projection that ran last, its experts, and their number
    std::vector<int32_t>               down_ids;
    int64_t                            n_down = 0;
    std::vector<char>                  src1_copy;
    std::vector<char>                  ids_copy;
};

void register_imatrix(py::module_ & m) {
    py::class_<imatrix_session>(m, "ImatrixSession")
        .def(py::init<std::shared_ptr<loaded_model>, int, int, int, bool, bool>(), py::arg("engine"), py::arg("n_ctx"),
            py::arg("n_batch"), py::arg("n_threads"), py::arg("process_output"), py::arg("experts"))
        .def("close", &imatrix_session::close)
        .def("load_projector", &imatrix_session::load_projector, py::arg("path"), py::arg("marker"),
            py::arg("n_threads"), py::arg("use_gpu"))
        .def("add_tokens", &imatrix_session::add_tokens, py::arg("tokens"))
        .def("add_prompt", &imatrix_session::add_prompt, py::arg("prompt"), py::arg("pictures"))
        .def("statistics", &imatrix_session::statistics)
        .def("expert_statistics", &imatrix_session::expert_statistics);
}
