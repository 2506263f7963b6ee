#pragma once

// What the ERNIE 4.5 models of this folder have in common: tensors and graph of the stem, the attention and the dense
// feed-forward network. What a model does in its own way (positions, experts, the input of a draft) is in its own file.

#include "models.h"

// Embedding, output norm and output matrix; without an output matrix the embedding serves as one.
static inline void ernie4_5_load_stem(llama_model_base & m) {
    const int64_t n_embd  = m.hparams.n_embd;
    const int64_t n_vocab = m.vocab.n_tokens();

    m.tok_embd = m.create_tensor(m.tn(LLM_TENSOR_TOKEN_EMBD, "weight"), { n_embd, n_vocab }, 0);

    // output
    m.output_norm = m.create_tensor(m.tn(LLM_TENSOR_OUTPUT_NORM, "weight"), { n_embd }, 0);
    m.output      = m.create_tensor(m.tn(LLM_TENSOR_OUTPUT, "weight"), { n_embd, n_vocab }, m.TENSOR_NOT_REQUIRED);
    // tied embeddings
    if (m.output == NULL) {
        m.output = m.create_tensor(m.tn(LLM_TENSOR_TOKEN_EMBD, "weight"), { n_embd, n_vocab }, m.TENSOR_DUPLICATED);
    }
}

static inline void ernie4_5_load_attn(llama_model_base & m, int il) {
    const int64_t n_embd     = m.hparams.n_embd;
    const int64_t n_embd_q   = m.hparams.n_embd_head_k() * m.hparams.n_head();
    const int64_t n_embd_gqa = m.hparams.n_embd_v_gqa();

    auto & layer = m.layers[il];

    layer.attn_norm = m.create_tensor(m.tn(LLM_TENSOR_ATTN_NORM, "weight", il), { n_embd }, 0);

    m.create_tensor_qkv(layer, il, n_embd, n_embd_q, n_embd_gqa, n_embd_gqa, 0);
    layer.wo   = m.create_tensor(m.tn(LLM_TENSOR_ATTN_OUT, "weight", il), { n_embd_q, n_embd }, 0);
    layer.wo_b = m.create_tensor(m.tn(LLM_TENSOR_ATTN_OUT, "bias", il), { n_embd }, m.TENSOR_NOT_REQUIRED);
}

static inline void ernie4_5_load_dense_ffn(llama_model_base & m, int il) {
    const int64_t n_embd = m.hparams.n_embd;
    const int64_t n_ff   = m.hparams.n_ff();

    auto & layer = m.layers[il];

    layer.ffn_gate = m.create_tensor(m.tn(LLM_TENSOR_FFN_GATE, "weight", il), { n_embd, n_ff }, 0);
    layer.ffn_down = m.create_tensor(m.tn(LLM_TENSOR_FFN_DOWN, "weight", il), { n_ff, n_embd }, 0);
    layer.ffn_up   = m.create_tensor(m.tn(LLM_TENSOR_FFN_UP, "weight", il), { n_embd, n_ff }, 0);
}

// Norm and attention; rope(cur) gives Q or K its positions. Shapes: cur [n_embd, n_tokens] -> [n_embd, n_tokens]
template <typename F>
static ggml_tensor * ernie4_5_build_attn(const llm_graph_context & graph, const llama_layer & layer, ggml_tensor * cur,
    llm_graph_input_attn_kv * inp_attn, F && rope, int il) {
    const int64_t n_embd_head = graph.hparams.n_embd_head_v();

    cur = graph.build_norm(cur, layer.attn_norm, NULL, LLM_NORM_RMS, il);
    graph.cb(cur, "attn_norm", il);

    auto [Qcur, Kcur, Vcur] = graph.build_qkv(layer, cur, n_embd_head, graph.n_head, graph.n_head_kv, il);

    Qcur = rope(Qcur);
    Kcur = rope(Kcur);

    graph.cb(Qcur, "Qcur", il);
    graph.cb(Kcur, "Kcur", il);
    graph.cb(Vcur, "Vcur", il);

    cur = graph.build_attn(inp_attn, layer.wo, layer.wo_b, layer.wo_s, Qcur, Kcur, Vcur, nullptr, nullptr, nullptr,
        1.0f / sqrtf(float(n_embd_head)), il);
    graph.cb(cur, "attn_out", il);

    return cur;
}

static inline ggml_tensor * ernie4_5_build_dense_ffn(
    const llm_graph_context & graph, const llama_layer & layer, ggml_tensor * cur, int il) {
    cur = graph.build_ffn(cur, layer.ffn_up, NULL, NULL, layer.ffn_gate, NULL, NULL, layer.ffn_down, NULL, NULL, NULL,
        LLM_FFN_SILU, LLM_FFN_PAR, il);
    graph.cb(cur, "ffn_out", il);

    return cur;
}

// The output norm and the logits, which end the graph.
static inline void ernie4_5_build_output(
    const llm_graph_context & graph, const llama_model & model, ggml_tensor * cur) {
    cur = graph.build_norm(cur, model.output_norm, NULL, LLM_NORM_RMS, -1);

    graph.cb(cur, "result_norm", -1);
    graph.res->t_embd = cur;

    // lm_head
    cur = graph.build_lora_mm(model.output, cur, model.output_s);

    graph.cb(cur, "result_output", -1);
    graph.res->t_logits = cur;

    ggml_build_forward_expand(graph.gf, cur);
}
