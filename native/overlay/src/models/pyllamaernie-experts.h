#pragma once

// ERNIE 4.5 models that hold fewer experts than their routers have rows, as `pyllamaernie prune --exact` writes them.
//
// A router adds its correction bias to probabilities. Without the rows of the removed experts the softmax would run over
// fewer values, all probabilities would grow, the bias would not, and the choice among the kept experts would change. So
// all rows stay, those of the kept experts in front, and the choice is made among these: ids are below the number held.

#include "models.h"

// How many experts each bank of a layer holds: the key expert_stored_count, or as many as the router has rows.
static inline int64_t ernie4_5_n_expert_stored(llama_model_loader & ml, const llama_hparams & hparams) {
    uint32_t n_stored = hparams.n_expert;
    const int64_t key = ml.metadata ? gguf_find_key(ml.metadata, (ml.get_arch_name() + ".expert_stored_count").c_str()) : -1;
    if (key >= 0) {
        if (gguf_get_kv_type(ml.metadata, key) != GGUF_TYPE_UINT32) {
            throw std::runtime_error("expert_stored_count is not a u32");
        }
        n_stored = gguf_get_val_u32(ml.metadata, key);
    }
    if (n_stored > hparams.n_expert || n_stored < hparams.n_expert_used_max()) {
        throw std::runtime_error(format("expert_stored_count is %u: expected %u (experts of a token) to %u (experts of the router)",
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

    ggml_tensor * operator()(
             ggml_tensor * cur,
             ggml_tensor * gate_inp,
             ggml_tensor * up_exps,
             ggml_tensor * gate_exps,
             ggml_tensor * down_exps,
             ggml_tensor * exp_probs_b,
                 int64_t   n_expert,
                 int64_t   n_expert_used,
         llm_ffn_op_type   type_op,
                    bool   norm_w,
                   float   w_scale,
            llama_expert_gating_func_type gating_op,
                     int   il) const {
        const int64_t n_stored = down_exps->ne[2];
        if (n_stored == n_expert) {
            return graph.build_moe_ffn(cur, gate_inp, up_exps, gate_exps, down_exps, exp_probs_b, n_expert, n_expert_used,
                    type_op, norm_w, w_scale, gating_op, il);
        }
        GGML_ASSERT(gating_op == LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX);

        ggml_tensor * logits = graph.build_lora_mm(gate_inp, cur); // [n_expert, n_tokens]
        graph.cb(logits, "ffn_moe_logits", il);

        ggml_tensor * choice = ggml_soft_max(graph.ctx0, logits);
        if (exp_probs_b) {
            choice = ggml_add(graph.ctx0, choice, exp_probs_b);
        }
        choice = ggml_cont(graph.ctx0, ggml_view_2d(graph.ctx0, choice, n_stored, choice->ne[1], choice->nb[1], 0));
        graph.cb(choice, "ffn_moe_probs_stored", il); // [n_stored, n_tokens]

        n_expert_used = std::min(n_expert_used, n_stored); // a warmup asks for all experts
        ggml_tensor * selected = ggml_argsort_top_k(graph.ctx0, choice, n_expert_used); // [n_expert_used, n_tokens]

        return graph.build_moe_ffn(cur, gate_inp, up_exps, gate_exps, down_exps, nullptr, n_expert, n_expert_used,
                type_op, norm_w, w_scale, gating_op, il, logits, nullptr, nullptr, nullptr, nullptr, selected);
    }
};
