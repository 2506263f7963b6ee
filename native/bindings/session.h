#pragma once

// A context of its own on an engine's weights, with a projector on request: what every kind of session is built on. What
// it computes from the rows that are decoded is the kind's own.

#include "bindings.h"

#include "llama-cpp.h"
#include "mtmd-helper.h"
#include "mtmd.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

// Every row it decodes has logits.
class context_session {
public:
    explicit context_session(std::shared_ptr<loaded_model> core) : core(std::move(core)) {}

    virtual ~context_session() {
        close();
    }

    void close() {
        if (ctx) {
            mctx.reset();
            ctx.reset();
            core->session_closed();
        }
    }

protected:
    // Of a context with one sequence.
    static llama_context_params context_params(uint32_t n_ctx, uint32_t n_batch, uint32_t n_ubatch, int32_t n_threads) {
        llama_context_params params = llama_context_default_params();
        params.n_ctx                = n_ctx;
        params.n_batch              = n_batch;
        params.n_ubatch             = n_ubatch;
        params.n_threads            = n_threads;
        params.n_threads_batch      = n_threads;
        params.n_seq_max            = 1;
        return params;
    }

    static mtmd_context_params projector_params(int n_threads, bool use_gpu) {
        mtmd_context_params params = mtmd_context_params_default();
        params.use_gpu             = use_gpu;
        params.n_threads           = n_threads;
        params.print_timings       = false;
        params.warmup              = false;
        return params;
    }

    // Shapes: (height, width, 3) uint8
    static mtmd::bitmap picture_bitmap(const array_in<uint8_t> & rgb) {
        if (rgb.ndim() != 3 || rgb.shape(2) != 3) {
            throw std::invalid_argument("a picture is (height, width, 3) uint8");
        }
        return mtmd::bitmap((uint32_t) rgb.shape(1), (uint32_t) rgb.shape(0), rgb.data());
    }

    void open(const llama_context_params & params) {
        core->session_opened();
        {
            pybind11::gil_scoped_release release;
            ctx.reset(llama_init_from_model(core->model, params));
        }
        if (!ctx) {
            core->session_closed();
            throw std::runtime_error("the context could not be created");
        }
    }

    void open_projector(const std::string & path, const mtmd_context_params & params) {
        require_open();
        pybind11::gil_scoped_release release;
        mctx.reset(mtmd_init_from_file(path.c_str(), llama_get_model(ctx.get()), params));
        if (!mctx) {
            throw std::runtime_error("the projector could not be loaded");
        }
    }

    void require_open() const {
        if (!ctx) {
            throw std::runtime_error("the session is closed");
        }
    }

    void require_projector() const {
        require_open();
        if (!mctx) {
            throw std::runtime_error("this session has no projector");
        }
    }

    size_t n_embd() const {
        return (size_t) llama_model_n_embd_inp(llama_get_model(ctx.get()));
    }

    // done(i0, i1) follows each batch, while its logits can be read
    template <typename F> void decode_text(const llama_token * ids, int32_t n, llama_pos pos_0, F && done) {
        decode(
            n,
            [=](llama_batch_ext * batch, int32_t i) {
                const int32_t   idx = llama_batch_ext_add_token(batch, 0, ids[i]);
                const llama_pos pos = pos_0 + i;
                llama_batch_ext_set_pos(batch, idx, &pos);
                return idx;
            },
            done);
    }

    // Shapes: rows (n, n_embd)
    template <typename F>
    void decode_media(const mtmd_input_chunk * chunk, const float * rows, llama_pos pos_0, F && done) {
        if (mtmd_decode_use_non_causal(mctx.get(), chunk)) {
            throw std::runtime_error("this projector needs non-causal attention, which is not offered here");
        }
        const size_t                  n     = mtmd_input_chunk_get_n_tokens(chunk);
        const size_t                  width = n_embd();
        const bool                    mrope = mtmd_decode_use_mrope(mctx.get());
        std::vector<mtmd_decoder_pos> rel(n);
        if (mrope) {
            mtmd_helper_image_get_decoder_pos(mtmd_input_chunk_get_tokens_image(chunk), pos_0, rel.data());
        }
        decode((int32_t) n,
            [&](llama_batch_ext * batch, int32_t i) {
                const llama_embd row    = { rows + (size_t) i * width, 1, width };
                const int32_t    idx    = llama_batch_ext_add_embd(batch, 0, row);
                llama_pos        pos[4] = { pos_0 + i, 0, 0, 0 };  // t, y, x, z
                if (mrope) {
                    pos[0] = (llama_pos) rel[(size_t) i].t;
                    pos[1] = (llama_pos) rel[(size_t) i].y;
                    pos[2] = (llama_pos) rel[(size_t) i].x;
                    pos[3] = (llama_pos) rel[(size_t) i].z;
                }
                llama_batch_ext_set_pos(batch, idx, pos);
                return idx;
            },
            done);
    }

    std::shared_ptr<loaded_model> core;
    llama_context_ptr             ctx;
    mtmd::context_ptr             mctx;
    std::string                   failure;  // an eval callback puts here what it cannot throw through the scheduler

private:
    template <typename A, typename F> void decode(int32_t n, A && add_row, F && done) {
        llama_batch_ext_ptr batch(llama_batch_ext_init(ctx.get()));
        const int32_t       n_batch = (int32_t) llama_n_batch(ctx.get());
        for (int32_t i0 = 0; i0 < n; i0 += n_batch) {
            const int32_t i1 = std::min(n, i0 + n_batch);
            llama_batch_ext_clear(batch.get());
            for (int32_t i = i0; i < i1; i++) {
                const int32_t idx = add_row(batch.get(), i);
                if (idx < 0) {
                    throw std::runtime_error("a row could not be added to the batch, code " + std::to_string(idx));
                }
                llama_batch_ext_set_output_logits(batch.get(), idx, true);  // else the last layer leaves the row out
            }
            const int32_t code = llama_process(ctx.get(), LLAMA_PROCESS_TYPE_DECODE, batch.get());
            llama_synchronize(ctx.get());
            if (!failure.empty()) {
                throw std::runtime_error(failure);
            }
            if (code != 0) {
                throw std::runtime_error("decode failed with code " + std::to_string(code));
            }
            done(i0, i1);
        }
    }
};
