// The multi-token-prediction layers of an ERNIE 4.5 text model, as a draft model without layers of its own trunk. A layer
// joins the next token's embedding with the target's hidden state, passes a dense decoder layer, and shares the target's
// embedding, output norm and output matrix, of which the file holds a copy.

#include "models.h"
#include "pyllamaernie-ernie.h"

void llama_model_ernie4_5_mtp::load_arch_hparams(llama_model_loader & ml) {
    ml.get_key(LLM_KV_ATTENTION_LAYERNORM_RMS_EPS, hparams.f_norm_rms_eps);

    if (hparams.n_layer_nextn == 0 || hparams.n_layer() != 0) {
        throw std::runtime_error(
            format("nextn_predict_layers is %u and block_count %u: expected the same number, at least 1",
                hparams.n_layer_nextn, hparams.n_layer_all));
    }

    type = LLM_TYPE_UNKNOWN;
}

void llama_model_ernie4_5_mtp::load_arch_tensors(llama_model_loader &) {
    LLAMA_LOAD_LOCALS;

    ernie4_5_load_stem(*this);

    for (int i = 0; i < n_layer_all; ++i) {
        auto & layer = layers[i];

        ernie4_5_load_attn(*this, i);

        layer.ffn_norm = create_tensor(tn(LLM_TENSOR_FFN_NORM, "weight", i), { n_embd }, 0);
        ernie4_5_load_dense_ffn(*this, i);

        layer.nextn.eh_proj = create_tensor(tn(LLM_TENSOR_NEXTN_EH_PROJ, "weight", i), { 2 * n_embd, n_embd }, 0);
        layer.nextn.enorm   = create_tensor(tn(LLM_TENSOR_NEXTN_ENORM, "weight", i), { n_embd }, 0);
        layer.nextn.hnorm   = create_tensor(tn(LLM_TENSOR_NEXTN_HNORM, "weight", i), { n_embd }, 0);
    }
}

std::unique_ptr<llm_graph_context> llama_model_ernie4_5_mtp::build_arch_graph(const llm_graph_params & params) const {
    return std::make_unique<graph>(*this, params);
}

// Embeddings of the token at each position, and the hidden state one position before it. Shapes: [n_embd, n_tokens] each
static std::pair<ggml_tensor *, ggml_tensor *> ernie4_5_mtp_build_inp(
    const llm_graph_context & graph, const llama_model & model, int il) {
    auto inp = std::make_unique<llm_graph_input_embd>(graph.hparams.n_embd);

    inp->tokens = ggml_new_tensor_1d(graph.ctx0, GGML_TYPE_I32, graph.n_tokens);
    ggml_set_input(inp->tokens);
    inp->embd = ggml_new_tensor_2d(graph.ctx0, GGML_TYPE_F32, graph.hparams.n_embd, graph.n_tokens);
    ggml_set_input(inp->embd);

    ggml_tensor * tok_embd = ggml_get_rows(graph.ctx0, model.tok_embd, inp->tokens);
    ggml_tensor * h_embd   = inp->embd;
    graph.cb(tok_embd, "mtp_tok_embd", il);
    graph.cb(h_embd, "mtp_h_input", il);

    graph.res->add_input(std::move(inp));

    return { tok_embd, h_embd };
}

llama_model_ernie4_5_mtp::graph::graph(const llama_model & model, const llm_graph_params & params) :
    llm_graph_context(params) {
    const int64_t n_embd_head = hparams.n_embd_head_v();

    GGML_ASSERT(n_embd_head == hparams.n_embd_head_k());
    GGML_ASSERT(n_embd_head == n_rot);
    GGML_ASSERT(cparams.nextn_layer_offset >= 0 && cparams.nextn_layer_offset < (int) hparams.n_layer_nextn);

    const int    il    = cparams.nextn_layer_offset;
    const auto & layer = model.layers[il];

    const auto [tok_embd, h_embd] = ernie4_5_mtp_build_inp(*this, model, il);

    ggml_tensor * inp_pos = build_inp_pos();

    auto * inp_attn = build_attn_inp_kv();

    ggml_tensor * inp_out_ids = build_inp_out_ids();

    ggml_tensor * e_norm = build_norm(tok_embd, layer.nextn.enorm, NULL, LLM_NORM_RMS, il);
    cb(e_norm, "mtp_enorm", il);

    // hidden states come as they leave a last layer; training saw them behind the output norm
    ggml_tensor * h_norm = build_norm(h_embd, model.output_norm, NULL, LLM_NORM_RMS, il);
    h_norm               = build_norm(h_norm, layer.nextn.hnorm, NULL, LLM_NORM_RMS, il);
    cb(h_norm, "mtp_hnorm", il);

    ggml_tensor * cur = build_lora_mm(layer.nextn.eh_proj, ggml_concat(ctx0, e_norm, h_norm, 0));
    cb(cur, "mtp_eh_proj", il);

    ggml_tensor * inpSA = cur;

    auto rope = [&](ggml_tensor * x) {
        return ggml_rope_ext(ctx0, x, inp_pos, nullptr, n_rot, rope_type, n_ctx_orig, freq_base, freq_scale, ext_factor,
            attn_factor, beta_fast, beta_slow);
    };

    cur = ernie4_5_build_attn(*this, layer, cur, inp_attn, rope, il);

    if (inp_out_ids) {
        cur   = ggml_get_rows(ctx0, cur, inp_out_ids);
        inpSA = ggml_get_rows(ctx0, inpSA, inp_out_ids);
    }

    ggml_tensor * ffn_inp = ggml_add(ctx0, cur, inpSA);
    cb(ffn_inp, "ffn_inp", il);

    cur = build_norm(ffn_inp, layer.ffn_norm, NULL, LLM_NORM_RMS, il);
    cb(cur, "ffn_norm", il);

    cur = ernie4_5_build_dense_ffn(*this, layer, cur, il);
    cur = ggml_add(ctx0, cur, ffn_inp);
    cur = build_cvec(cur, il);
    cb(cur, "l_out", il);

    // a further draft step reads this as its hidden state
    res->t_h_nextn = cur;

    ernie4_5_build_output(*this, model, cur);
}
