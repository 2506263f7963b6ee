// The token level over llama.h and mtmd.h: a model's vocabulary, and Session, a second context on an engine's weights.
//
// A session returns the logits of every row it decodes, media rows included, and can report which graph nodes ran.

#include "session.h"

#include "../src/llama-ext.h"  // llama_get_memory_breakdown, found through the include path of `common`
#include "ggml.h"
#include "ggml-backend.h"
#include "pyllamaernie-video.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace py = pybind11;

//
// vocabulary
//

static const llama_vocab * vocab_of(const loaded_model & core) {
    const llama_model * model = core.model;
    if (model == nullptr) {
        throw std::runtime_error("the engine is closed");
    }
    return llama_model_get_vocab(model);
}

static std::vector<llama_token> tokenize(
    const loaded_model & core, const py::bytes & text, bool add_special, bool parse_special) {
    const llama_vocab *      vocab = vocab_of(core);
    const std::string_view   view(text);
    std::vector<llama_token> res(view.size() + 2);
    int32_t                  n = llama_tokenize(
        vocab, view.data(), (int32_t) view.size(), res.data(), (int32_t) res.size(), add_special, parse_special);
    if (n < 0 && n != INT32_MIN) {
        res.resize((size_t) -n);
        n = llama_tokenize(
            vocab, view.data(), (int32_t) view.size(), res.data(), (int32_t) res.size(), add_special, parse_special);
    }
    if (n < 0) {
        throw std::runtime_error("the text could not be tokenized");
    }
    res.resize((size_t) n);
    return res;
}

static py::bytes detokenize(
    const loaded_model & core, const std::vector<llama_token> & tokens, bool remove_special, bool unparse_special) {
    const llama_vocab * vocab = vocab_of(core);
    for (llama_token token : tokens) {
        if (token < 0 || token >= llama_vocab_n_tokens(vocab)) {
            throw std::invalid_argument("token id " + std::to_string(token) + " is not in the vocabulary");
        }
    }
    std::string res(tokens.size() * 8 + 16, '\0');
    int32_t     n = llama_detokenize(
        vocab, tokens.data(), (int32_t) tokens.size(), &res[0], (int32_t) res.size(), remove_special, unparse_special);
    if (n < 0) {
        res.resize((size_t) -n);
        n = llama_detokenize(vocab, tokens.data(), (int32_t) tokens.size(), &res[0], (int32_t) res.size(),
            remove_special, unparse_special);
    }
    return py::bytes(res.data(), (size_t) std::max(n, 0));
}

static py::object metadata(const loaded_model & core, const std::string & key) {
    vocab_of(core);
    const llama_model * model = core.model;
    const int32_t       n     = llama_model_meta_val_str(model, key.c_str(), nullptr, 0);
    if (n < 0) {
        return py::none();
    }
    std::string res((size_t) n + 1, '\0');
    llama_model_meta_val_str(model, key.c_str(), &res[0], res.size());
    return py::reinterpret_steal<py::str>(PyUnicode_DecodeUTF8(res.data(), n, "replace"));
}

static py::dict model_info(const loaded_model & core) {
    const llama_vocab * vocab = vocab_of(core);
    const llama_model * model = core.model;
    py::dict            res;
    res["n_vocab"]     = llama_vocab_n_tokens(vocab);
    res["n_embd"]      = llama_model_n_embd(model);
    res["n_ctx_train"] = llama_model_n_ctx_train(model);
    res["n_params"]    = llama_model_n_params(model);
    res["size_bytes"]  = llama_model_size(model);
    res["token_bos"]   = llama_vocab_bos(vocab);
    res["token_eos"]   = llama_vocab_eos(vocab);
    res["token_eot"]   = llama_vocab_eot(vocab);
    res["token_nl"]    = llama_vocab_nl(vocab);
    res["add_bos"]     = llama_vocab_get_add_bos(vocab);
    return res;
}

//
// session
//

struct media_chunk {
    mtmd::input_chunk_ptr chunk;
    int32_t               n_tokens;
    llama_pos             n_pos;
};

// Shapes: -> (n_frames, height, width, 3) float32, normalized
static py::array_t<float> media_pixels(const media_chunk & media) {
    int32_t nx       = 0;
    int32_t ny       = 0;
    size_t  n_frames = 0;
    while (mtmd_input_chunk_get_pixels(media.chunk.get(), n_frames, &nx, &ny)) {
        n_frames++;
    }
    const size_t       n_values = (size_t) nx * ny * 3;
    py::array_t<float> res({ n_frames, (size_t) ny, (size_t) nx, (size_t) 3 });
    for (size_t i = 0; i < n_frames; i++) {
        memcpy(res.mutable_data() + i * n_values, mtmd_input_chunk_get_pixels(media.chunk.get(), i, &nx, &ny),
            n_values * sizeof(float));
    }
    return res;
}

class session : public context_session {
public:
    session(std::shared_ptr<loaded_model> core, const py::kwargs & options) : context_session(std::move(core)) {
        llama_context_params params =
            context_params(options["n_ctx"].cast<uint32_t>(), options["n_batch"].cast<uint32_t>(),
                options["n_ubatch"].cast<uint32_t>(), options["n_threads"].cast<int32_t>());
        params.type_k          = (ggml_type) options["type_k"].cast<int>();
        params.type_v          = (ggml_type) options["type_v"].cast<int>();
        flash_attn             = (llama_flash_attn_type) options["flash_attn"].cast<int>();
        params.flash_attn_type = flash_attn;
        if (options["trace"].cast<bool>()) {
            params.cb_eval           = on_node;
            params.cb_eval_user_data = this;
        }
        open(params);
    }

    void load_projector(const std::string & path, int n_threads, bool use_gpu) {
        mtmd_context_params params = projector_params(n_threads, use_gpu);
        params.flash_attn_type     = flash_attn;
        open_projector(path, params);
    }

    // Shapes: (height, width, 3) uint8
    std::unique_ptr<media_chunk> tokenize_image(const array_in<uint8_t> & rgb) {
        require_projector();
        mtmd::bitmap bitmap = picture_bitmap(rgb);

        py::gil_scoped_release release;
        return tokenize_media(std::move(bitmap));
    }

    // Shapes: (n_frames, height, width, 3) uint8
    std::unique_ptr<media_chunk> tokenize_video(const array_in<uint8_t> & rgb) {
        require_projector();
        if (rgb.ndim() != 4 || rgb.shape(3) != 3 || rgb.size() == 0) {
            throw std::invalid_argument("a video is (n_frames, height, width, 3) uint8");
        }
        if (!mtmd_takes_whole_videos(mctx.get())) {
            throw std::invalid_argument("this projector takes no videos");
        }
        const uint32_t        n    = (uint32_t) rgb.shape(0);
        const uint32_t        ny   = (uint32_t) rgb.shape(1);
        const uint32_t        nx   = (uint32_t) rgb.shape(2);
        const unsigned char * data = rgb.data();

        py::gil_scoped_release release;
        return tokenize_media(mtmd::bitmap(mtmd_bitmap_init_video(nx, ny, n, data)));
    }

    // Shapes: -> (n_tokens, n_embd) float32
    py::array_t<float> encode(const media_chunk & media) {
        require_projector();
        py::array_t<float> res({ (size_t) media.n_tokens, n_embd() });
        float *            dst = res.mutable_data();
        {
            py::gil_scoped_release release;
            if (mtmd_encode_chunk(mctx.get(), media.chunk.get()) != 0) {
                throw std::runtime_error("the picture or video could not be encoded");
            }
            memcpy(dst, mtmd_get_output_embd(mctx.get()), n_embd() * (size_t) media.n_tokens * sizeof(float));
        }
        return res;
    }

    // Shapes: (n,) int32 -> (n, n_vocab) float32
    py::array_t<float> decode_tokens(const array_in<int32_t> & tokens, llama_pos pos_0) {
        require_open();
        const llama_token * ids = tokens.data();
        for (py::ssize_t i = 0; i < tokens.size(); i++) {
            if (ids[i] < 0 || ids[i] >= n_vocab()) {
                throw std::invalid_argument("token id " + std::to_string(ids[i]) + " is not in the vocabulary");
            }
        }
        return logits_of(
            (int32_t) tokens.size(), [&](auto && done) { decode_text(ids, (int32_t) tokens.size(), pos_0, done); });
    }

    // Shapes: (n_tokens, n_embd) float32 -> (n_tokens, n_vocab) float32
    py::array_t<float> decode_rows(const media_chunk & media, const array_in<float> & embd, llama_pos pos_0) {
        require_projector();
        if (embd.ndim() != 2 || embd.shape(0) != media.n_tokens || (size_t) embd.shape(1) != n_embd()) {
            throw std::invalid_argument("the embeddings do not have the shape of the chunk");
        }
        const float * rows = embd.data();
        return logits_of(media.n_tokens, [&](auto && done) { decode_media(media.chunk.get(), rows, pos_0, done); });
    }

    void clear() {
        require_open();
        llama_memory_clear(llama_get_memory(ctx.get()), true);
    }

    int32_t n_ctx() const {
        require_open();
        return (int32_t) llama_n_ctx(ctx.get());
    }

    size_t compute_buffer_bytes() const {
        require_open();
        size_t res = 0;
        for (const auto & entry : llama_get_memory_breakdown(ctx.get())) {
            res += entry.second.compute;
        }
        return res;
    }

    int32_t n_graph_reuse() const {
        require_open();
        return llama_perf_context(ctx.get()).n_reused;
    }

    // (op, name, name of the first source) of each node that ran in the last decode
    std::vector<std::tuple<std::string, std::string, std::string>> last_nodes;

private:
    llama_flash_attn_type flash_attn;

    // The scheduler asks for every node in order and does not look at the compute flag, so it is tested here.
    static bool on_node(ggml_tensor * t, bool ask, void * user_data) {
        if (ask && (t->flags & GGML_TENSOR_FLAG_COMPUTE)) {
            ((session *) user_data)
                ->last_nodes.emplace_back(ggml_op_name(t->op), t->name, t->src[0] ? t->src[0]->name : "");
        }
        return ask ? false : true;
    }

    int32_t n_vocab() const {
        return llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx.get())));
    }

    std::unique_ptr<media_chunk> tokenize_media(mtmd::bitmap bitmap) {
        const mtmd_bitmap *   bitmaps[] = { bitmap.ptr.get() };
        const char *          marker    = mtmd_get_marker(mctx.get());
        const mtmd_input_text text      = { marker, strlen(marker), /*add_special*/ false, /*parse_special*/ true };
        mtmd::input_chunks    chunks(mtmd_input_chunks_init());
        if (mtmd_tokenize(mctx.get(), chunks.ptr.get(), &text, bitmaps, 1) != 0) {
            throw std::runtime_error("the picture or video could not be preprocessed");
        }
        // the text that mtmd puts in front of a medium is part of the caller's ids already
        for (size_t i = 0; i < chunks.size(); i++) {
            if (mtmd_input_chunk_get_type(chunks[i]) == MTMD_INPUT_CHUNK_TYPE_IMAGE) {
                auto res = std::make_unique<media_chunk>();
                res->chunk.reset(mtmd_input_chunk_copy(chunks[i]));
                res->n_tokens = (int32_t) mtmd_input_chunk_get_n_tokens(chunks[i]);
                res->n_pos    = mtmd_input_chunk_get_n_pos(chunks[i]);
                return res;
            }
        }
        throw std::runtime_error("the projector made no media chunk");
    }

    // run(done) decodes n rows
    template <typename F> py::array_t<float> logits_of(int32_t n, F && run) {
        const size_t       width = (size_t) n_vocab();
        py::array_t<float> res({ (size_t) n, width });
        float *            dst = res.mutable_data();
        last_nodes.clear();

        py::gil_scoped_release release;
        run([&](int32_t i0, int32_t i1) {
            for (int32_t i = i0; i < i1; i++) {
                const float * row = llama_get_logits_ith(ctx.get(), i - i0);
                if (row == nullptr) {
                    throw std::runtime_error("no logits for row " + std::to_string(i));
                }
                memcpy(dst + (size_t) i * width, row, width * sizeof(float));
            }
        });
        return res;
    }
};

void register_model(py::module_ & m) {
    m.def("tokenize", &tokenize, py::arg("engine"), py::arg("text"), py::arg("add_special"), py::arg("parse_special"));
    m.def("detokenize", &detokenize, py::arg("engine"), py::arg("tokens"), py::arg("remove_special"),
        py::arg("unparse_special"));
    m.def("metadata", &metadata, py::arg("engine"), py::arg("key"));
    m.def("model_info", &model_info, py::arg("engine"));

    py::class_<media_chunk>(m, "MediaChunk")
        .def("pixels", &media_pixels)
        .def_readonly("n_tokens", &media_chunk::n_tokens)
        .def_readonly("n_pos", &media_chunk::n_pos);

    py::class_<session>(m, "Session")
        .def(py::init<std::shared_ptr<loaded_model>, const py::kwargs &>(), py::arg("engine"))
        .def("close", &session::close)
        .def("load_projector", &session::load_projector, py::arg("path"), py::arg("n_threads"), py::arg("use_gpu"))
        .def("tokenize_image", &session::tokenize_image, py::arg("rgb"))
        .def("tokenize_video", &session::tokenize_video, py::arg("rgb"))
        .def("encode", &session::encode, py::arg("chunk"))
        .def("decode_tokens", &session::decode_tokens, py::arg("tokens"), py::arg("pos"))
        .def("decode_media", &session::decode_rows, py::arg("chunk"), py::arg("embd"), py::arg("pos"))
        .def("clear", &session::clear)
        .def_property_readonly("n_ctx", &session::n_ctx)
        .def_property_readonly("compute_buffer_bytes", &session::compute_buffer_bytes)
        .def_property_readonly("n_graph_reuse", &session::n_graph_reuse)
        .def_readonly("last_nodes", &session::last_nodes);

    py::dict types;
    for (int i = 0; i < GGML_TYPE_COUNT; i++) {
        const char * name = ggml_type_name((ggml_type) i);
        if (name != nullptr && ggml_blck_size((ggml_type) i) > 0) {
            types[name] = i;
        }
    }
    m.attr("GGML_TYPES") = types;
    m.def("supports_gpu_offload", &llama_supports_gpu_offload);
}
