#pragma once

// ERNIE 4.5 models that hold fewer experts than their routers have rows, as `pyllamaernie prune --exact` writes them.
//
// A router adds its correction bias to probabilities. Without the rows of the removed experts the softmax would run over
// fewer values, all probabilities would grow, the bias would not, and the choice among the kept experts would change. So
// all rows stay, and a bias of ERNIE4_5_BIAS_REMOVED keeps the removed experts from being chosen. Numbers of experts are
// those of the router, until the weights are looked up.

#include "models.h"

static constexpr float ERNIE4_5_BIAS_REMOVED = -1e9f;

// How many experts each bank of a layer holds: the key expert_stored_count, or as many as the router has rows.
static inline int64_t ernie4_5_n_expert_stored(llama_model_loader & ml, const llama_hparams & hparams) {
    uint32_t      n_stored = hparams.n_expert;
    const int64_t key =
        ml.metadata ? gguf_find_key(ml.metadata, (ml.get_arch_name() + ".expert_stored_count").c_str()) : -1;
    if (key >= 0) {
        if (gguf_get_kv_type(ml.metadata, key) != GGUF_TYPE_UINT32) {
            throw std::runtime_error("expert_stored_count is not a u32");
        }
        n_stored = gguf_get_val_u32(ml.metadata, key);
    }
    if (n_stored > hparams.n_expert || n_stored < hparams.n_expert_used_max()) {
        throw std::runtime_error(
            format("expert_stored_count is %u: expected %u (experts of a token) to %u (experts of the router)",
                n_stored, hparams.n_expert_used_max(), hparams.n_expert));
    }
    if (n_stored < hparams.n_expert && hparams.n_expert_groups > 1) {
        throw std::runtime_error(format("expert_stored_count is %u of %u, which cannot be with %u routing groups",
            n_stored, hparams.n_expert, hparams.n_expert_groups));
    }
    return n_stored;
}

// build_moe_ffn for a bank that may hold fewer experts than its router has rows.
struct ernie4_5_moe_ffn {
    const llm_graph_context & graph;

    ggml_tensor * operator()(ggml_tensor * cur, ggml_tensor * gate_inp, ggml_tensor * up_exps, ggml_tensor * gate_exps,
        ggml_tensor * down_exps, ggml_tensor * exp_probs_b, int64_t n_expert, int64_t n_expert_used,
        llm_ffn_op_type type_op, bool norm_w, float w_scale, llama_expert_gating_func_type gating_op, int il) const {
        const int64_t n_stored = down_exps->ne[2];
        if (n_stored == n_expert) {
            return graph.build_moe_ffn(cur, gate_inp, up_exps, gate_exps, down_exps, exp_probs_b, n_expert,
                n_expert_used, type_op, norm_w, w_scale, gating_op, il);
        }
        GGML_ASSERT(gating_op == LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX && type_op == LLM_FFN_SILU && norm_w);
        if (!exp_probs_b || !gate_exps) {
            throw std::runtime_error(
                format("layer %d: fewer experts than router rows take a correction bias and gates", il));
        }

        // from here on the nodes are those of build_moe_ffn in the same order, so that the numbers are the same too
        ggml_context * ctx0     = graph.ctx0;
        const int64_t  n_embd   = cur->ne[0];
        const int64_t  n_tokens = cur->ne[1];

        auto [selected, weights] = build_router(cur, gate_inp, exp_probs_b, n_expert, n_expert_used, w_scale, il);

        ggml_tensor * ids = build_stored_ids(exp_probs_b, selected, n_stored);  // [n_expert_used, n_tokens]
        graph.cb(ids, "ffn_moe_stored_ids", il);

        cur = ggml_reshape_3d(ctx0, cur, n_embd, 1, n_tokens);

        ggml_tensor * up = graph.build_lora_mm_id(up_exps, cur, ids);  // [n_ff, n_expert_used, n_tokens]
        graph.cb(up, "ffn_moe_up", il);

        cur = graph.build_lora_mm_id(gate_exps, cur, ids);  // [n_ff, n_expert_used, n_tokens]
        graph.cb(cur, "ffn_moe_gate", il);

        cur = ggml_swiglu_split(ctx0, cur, up);
        graph.cb(cur, "ffn_moe_swiglu", il);

        ggml_tensor * experts = graph.build_lora_mm_id(down_exps, cur, ids);  // [n_embd, n_expert_used, n_tokens]
        graph.cb(experts, "ffn_moe_down", il);

        experts = ggml_mul(ctx0, experts, weights);
        graph.cb(experts, "ffn_moe_weighted", il);
        ggml_build_forward_expand(graph.gf, experts);

        ggml_tensor * moe_out = nullptr;
        for (uint32_t i = 0; i < graph.hparams.n_expert_used(il); ++i) {
            ggml_tensor * one = ggml_view_2d(ctx0, experts, n_embd, n_tokens, experts->nb[2], i * experts->nb[1]);
            moe_out           = moe_out ? ggml_add(ctx0, moe_out, one) : one;
            ggml_build_forward_expand(graph.gf, moe_out);
        }
        if (graph.hparams.n_expert_used(il) == 1) {
            moe_out = ggml_cont(ctx0, moe_out);
        }
        graph.cb(moe_out, "ffn_moe_out", il);

        return moe_out;
    }

    // The chosen experts and their weights. Shapes: cur [n_embd, n_tokens] -> [n_expert_used, n_tokens] int32,
    // [1, n_expert_used, n_tokens]
    std::pair<ggml_tensor *, ggml_tensor *> build_router(ggml_tensor * cur, ggml_tensor * gate_inp,
        ggml_tensor * exp_probs_b, int64_t n_expert, int64_t n_expert_used, float w_scale, int il) const {
        ggml_context * ctx0     = graph.ctx0;
        const int64_t  n_tokens = cur->ne[1];

        ggml_tensor * logits = graph.build_lora_mm(gate_inp, cur);  // [n_expert, n_tokens]
        graph.cb(logits, "ffn_moe_logits", il);

        ggml_tensor * probs = ggml_soft_max(ctx0, logits);  // [n_expert, n_tokens]
        graph.cb(probs, "ffn_moe_probs", il);

        ggml_tensor * selection_probs = ggml_add(ctx0, probs, exp_probs_b);
        graph.cb(selection_probs, "ffn_moe_probs_biased", il);

        ggml_tensor * selected = ggml_argsort_top_k(ctx0, selection_probs, n_expert_used);  // [n_expert_used, n_tokens]
        graph.cb(selected->src[0], "ffn_moe_argsort", il);
        graph.cb(selected, "ffn_moe_topk", il);

        ggml_tensor * weights = ggml_get_rows(ctx0, ggml_reshape_3d(ctx0, probs, 1, n_expert, n_tokens), selected);
        graph.cb(weights, "ffn_moe_weights", il);  // [1, n_expert_used, n_tokens]

        weights = ggml_reshape_2d(ctx0, weights, n_expert_used, n_tokens);
        ggml_tensor * weights_sum =
            ggml_clamp(ctx0, ggml_sum_rows(ctx0, weights), 6.103515625e-5, INFINITY);  // [1, n_tokens]
        weights = ggml_div(ctx0, weights, weights_sum);
        graph.cb(weights, "ffn_moe_weights_norm", il);
        weights = ggml_reshape_3d(ctx0, weights, 1, n_expert_used, n_tokens);
        if (w_scale != 0.0f && w_scale != 1.0f) {
            weights = ggml_scale(ctx0, weights, w_scale);
            graph.cb(weights, "ffn_moe_weights_scaled", il);
        }
        ggml_build_forward_expand(graph.gf, weights);

        return { selected, weights };
    }

    // Where the weights of the selected experts are: an expert's place among those whose bias does not say that they are
    // removed. Never out of range, whatever biases and router hold. Shapes: -> (n_tokens, n_expert_used) int32
    ggml_tensor * build_stored_ids(ggml_tensor * exp_probs_b, ggml_tensor * selected, int64_t n_stored) const {
        ggml_context * ctx0     = graph.ctx0;
        const int64_t  n_expert = exp_probs_b->ne[0];

        ggml_tensor * is_stored =
            ggml_step(ctx0, ggml_scale_bias(ctx0, exp_probs_b, 1.0f, -0.5f * ERNIE4_5_BIAS_REMOVED));
        ggml_tensor * places = ggml_scale_bias(ctx0, ggml_cumsum(ctx0, is_stored), 1.0f, -1.0f);  // [n_expert]
        places               = ggml_clamp(ctx0, places, 0.0f, float(n_stored - 1));
        places = ggml_repeat_4d(ctx0, ggml_reshape_3d(ctx0, places, 1, n_expert, 1), 1, n_expert, selected->ne[1], 1);

        ggml_tensor * ids = ggml_get_rows(ctx0, places, selected);  // [1, n_expert_used, n_tokens]
        return ggml_cast(ctx0, ggml_reshape_2d(ctx0, ids, selected->ne[0], selected->ne[1]), GGML_TYPE_I32);
    }
};
