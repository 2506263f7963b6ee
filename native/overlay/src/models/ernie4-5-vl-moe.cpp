// ERNIE 4.5 VL MoE, the language model: text and vision tokens share attention, norms and the shared expert, and have
// an expert bank (router, correction bias, experts) each. 3-D positions go through M-RoPE with Q and K rows permuted at
// conversion and the frequencies put right by rope_freqs.

#include "models.h"
#include "pyllamaernie-ernie.h"
#include "pyllamaernie-experts.h"

static bool ernie4_5_vl_moe_is_sparse(const llama_hparams & hparams, int il) {
    return uint32_t(il) >= hparams.n_layer_dense_lead && (il + 1) % hparams.n_moe_layer_step == 0;
}

void llama_model_ernie4_5_vl_moe::load_arch_hparams(llama_model_loader & ml) {
    ml.get_key(LLM_KV_ATTENTION_LAYERNORM_RMS_EPS, hparams.f_norm_rms_eps);
    ml.get_key_or_arr(LLM_KV_ROPE_DIMENSION_SECTIONS, hparams.rope_sections, 4, true);

    ml.get_key_or_arr(LLM_KV_EXPERT_FEED_FORWARD_LENGTH, hparams.n_ff_exp_arr, hparams.n_layer_all);
    ml.get_key(LLM_KV_EXPERT_FEED_FORWARD_LENGTH_VL, hparams.n_ff_exp_vl);
    ml.get_key(LLM_KV_EXPERT_SHARED_FEED_FORWARD_LENGTH, hparams.n_ff_shexp);
    ml.get_key(LLM_KV_INTERLEAVE_MOE_LAYER_STEP, hparams.n_moe_layer_step);
    ml.get_key(LLM_KV_LEADING_DENSE_BLOCK_COUNT, hparams.n_layer_dense_lead);

    const auto & s = hparams.rope_sections;  // t, h, w, unused
    if (s[1] != s[2] || s[3] != 0 || s[0] + s[1] + s[2] != int(hparams.n_rot() / 2)) {
        throw std::runtime_error(
            format("rope.dimension_sections is [%d, %d, %d, %d]: expected [t, h, w, 0] with h = w and t + h + w = %u",
                s[0], s[1], s[2], s[3], hparams.n_rot() / 2));
    }
    if (hparams.n_expert == 0 || hparams.n_moe_layer_step == 0) {
        throw std::runtime_error(
            format("expert_count is %u and interleave_moe_layer_step is %u: both must be at least 1", hparams.n_expert,
                hparams.n_moe_layer_step));
    }

    type = LLM_TYPE_UNKNOWN;
}

void llama_model_ernie4_5_vl_moe::load_arch_tensors(llama_model_loader & ml) {
    LLAMA_LOAD_LOCALS;

    ernie4_5_load_stem(*this);

    const int64_t n_ff_exp    = hparams.n_ff_exp();
    const int64_t n_ff_exp_vl = hparams.n_ff_exp_vl;
    const int64_t n_ff_shexp  = hparams.n_ff_shexp;
    const int64_t n_stored    = ernie4_5_n_expert_stored(ml, hparams);

    for (int i = 0; i < n_layer; ++i) {
        auto & layer = layers[i];

        ernie4_5_load_attn(*this, i);

        layer.rope_freqs =
            create_tensor(tn(LLM_TENSOR_ROPE_FREQS, "weight", i), { n_rot / 2 }, i > 0 ? TENSOR_DUPLICATED : 0);

        layer.ffn_norm = create_tensor(tn(LLM_TENSOR_FFN_NORM, "weight", i), { n_embd }, 0);

        if (!ernie4_5_vl_moe_is_sparse(hparams, i)) {
            ernie4_5_load_dense_ffn(*this, i);
            continue;
        }

        // clang-format off
        layer.ffn_gate_inp    = create_tensor(tn(LLM_TENSOR_FFN_GATE_INP,     "weight", i), {n_embd, n_expert}, 0);
        layer.ffn_exp_probs_b = create_tensor(tn(LLM_TENSOR_FFN_EXP_PROBS_B,  "bias",   i), {n_expert}, TENSOR_NOT_REQUIRED);
        layer.ffn_gate_exps   = create_tensor(tn(LLM_TENSOR_FFN_GATE_EXPS,    "weight", i), {  n_embd, n_ff_exp, n_stored}, 0);
        layer.ffn_down_exps   = create_tensor(tn(LLM_TENSOR_FFN_DOWN_EXPS,    "weight", i), {n_ff_exp,   n_embd, n_stored}, 0);
        layer.ffn_up_exps     = create_tensor(tn(LLM_TENSOR_FFN_UP_EXPS,      "weight", i), {  n_embd, n_ff_exp, n_stored}, 0);

        layer.ffn_gate_inp_vl    = create_tensor(tn(LLM_TENSOR_FFN_GATE_INP_VL,    "weight", i), {n_embd, n_expert}, 0);
        layer.ffn_exp_probs_b_vl = create_tensor(tn(LLM_TENSOR_FFN_EXP_PROBS_B_VL, "bias",   i), {n_expert}, TENSOR_NOT_REQUIRED);
        layer.ffn_gate_exps_vl   = create_tensor(tn(LLM_TENSOR_FFN_GATE_EXPS_VL,   "weight", i), {  n_embd, n_ff_exp_vl, n_stored}, 0);
        layer.ffn_down_exps_vl   = create_tensor(tn(LLM_TENSOR_FFN_DOWN_EXPS_VL,   "weight", i), {n_ff_exp_vl,   n_embd, n_stored}, 0);
        layer.ffn_up_exps_vl     = create_tensor(tn(LLM_TENSOR_FFN_UP_EXPS_VL,     "weight", i), {  n_embd, n_ff_exp_vl, n_stored}, 0);
        // clang-format on

        if (n_ff_shexp > 0) {
            // clang-format off
            layer.ffn_gate_shexp = create_tensor(tn(LLM_TENSOR_FFN_GATE_SHEXP, "weight", i), {    n_embd, n_ff_shexp}, 0);
            layer.ffn_down_shexp = create_tensor(tn(LLM_TENSOR_FFN_DOWN_SHEXP, "weight", i), {n_ff_shexp,     n_embd}, 0);
            layer.ffn_up_shexp   = create_tensor(tn(LLM_TENSOR_FFN_UP_SHEXP,   "weight", i), {    n_embd, n_ff_shexp}, 0);
            // clang-format on
        }
    }
}

std::unique_ptr<llm_graph_context> llama_model_ernie4_5_vl_moe::build_arch_graph(
    const llm_graph_params & params) const {
    return std::make_unique<graph>(*this, params);
}

llama_model_ernie4_5_vl_moe::graph::expert_banks llama_model_ernie4_5_vl_moe::graph::build_expert_banks(
    const llama_layer & layer, ggml_tensor * cur, int il) const {
    // everything that the banks share is in the graph, and marked, before the first bank is
    ggml_build_forward_expand(gf, cur);
    const int n_nodes_shared = ggml_graph_n_nodes(gf);

    const ernie4_5_moe_ffn build_moe_ffn = { *this };

    expert_banks banks;
    banks.text   = build_moe_ffn(cur, layer.ffn_gate_inp, layer.ffn_up_exps, layer.ffn_gate_exps, layer.ffn_down_exps,
        layer.ffn_exp_probs_b, n_expert, n_expert_used, LLM_FFN_SILU, true, hparams.expert_weights_scale,
        LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX, il);
    banks.vision = build_moe_ffn(cur, layer.ffn_gate_inp_vl, layer.ffn_up_exps_vl, layer.ffn_gate_exps_vl,
        layer.ffn_down_exps_vl, layer.ffn_exp_probs_b_vl, n_expert, n_expert_used, LLM_FFN_SILU, true,
        hparams.expert_weights_scale, LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX, il);
    cb(banks.text, "ffn_moe_out_text", il);
    cb(banks.vision, "ffn_moe_out_vision", il);

    // build_moe_ffn expands some of its nodes, which marks them for computation: without this both banks would run
    for (int i = n_nodes_shared; i < ggml_graph_n_nodes(gf); ++i) {
        ggml_graph_node(gf, i)->flags &= ~GGML_TENSOR_FLAG_COMPUTE;
    }

    ggml_tensor * outs[] = { banks.text, banks.vision };
    banks.selected       = ggml_build_forward_select(gf, outs, 2, ubatch.token ? 0 : 1);

    return banks;
}

ggml_tensor * llama_model_ernie4_5_vl_moe::graph::build_sparse_ffn(
    const llama_layer & layer, ggml_tensor * ffn_norm, ggml_tensor * ffn_inp, int il) const {
    const expert_banks banks = build_expert_banks(layer, ffn_norm, il);

    ggml_tensor * cur = banks.selected;

    if (hparams.n_ff_shexp > 0) {
        ggml_tensor * ffn_shexp = build_ffn(ffn_norm, layer.ffn_up_shexp, NULL, NULL, layer.ffn_gate_shexp, NULL, NULL,
            layer.ffn_down_shexp, NULL, NULL, NULL, LLM_FFN_SILU, LLM_FFN_PAR, il);
        cb(ffn_shexp, "ffn_shexp", il);

        cur = ggml_add(ctx0, cur, ffn_shexp);
        cb(cur, "ffn_out", il);
    }

    cur = ggml_add(ctx0, cur, ffn_inp);

    // The memory plan is made once, for text, and serves image ubatches too. So both outputs must live equally long: a
    // reader that is never computed, placed behind the real one, ends the life of each.
    ggml_build_forward_expand(gf, cur);
    ggml_build_forward_order(gf, ggml_sum(ctx0, banks.text));
    ggml_build_forward_order(gf, ggml_sum(ctx0, banks.vision));

    return cur;
}

llama_model_ernie4_5_vl_moe::graph::graph(const llama_model & model, const llm_graph_params & params) :
    llm_graph_context(params) {
    const int64_t n_embd_head = hparams.n_embd_head_v();

    GGML_ASSERT(n_embd_head == hparams.n_embd_head_k());
    GGML_ASSERT(n_embd_head == n_rot);

    int sections[4];
    std::copy(std::begin(hparams.rope_sections), std::begin(hparams.rope_sections) + 4, sections);

    ggml_tensor * cur;
    ggml_tensor * inpL = build_inp_embd(model.tok_embd);

    // inp_pos - contains the positions (t, h, w, unused)
    ggml_tensor * inp_pos = build_inp_pos();

    auto * inp_attn = build_attn_inp_kv();

    ggml_tensor * inp_out_ids = build_inp_out_ids();

    for (int il = 0; il < n_layer; ++il) {
        const auto & layer = model.layers[il];

        ggml_tensor * inpSA = inpL;

        ggml_tensor * rope_factors = model.get_rope_factors(cparams, il);

        auto rope = [&](ggml_tensor * x) {
            return ggml_rope_multi(ctx0, x, inp_pos, rope_factors, n_rot, sections, rope_type, n_ctx_orig, freq_base,
                freq_scale, ext_factor, attn_factor, beta_fast, beta_slow);
        };

        cur = ernie4_5_build_attn(*this, layer, inpL, inp_attn, rope, il);

        if (il == n_layer - 1 && inp_out_ids) {
            cur   = ggml_get_rows(ctx0, cur, inp_out_ids);
            inpSA = ggml_get_rows(ctx0, inpSA, inp_out_ids);
        }

        ggml_tensor * ffn_inp = ggml_add(ctx0, cur, inpSA);
        cb(ffn_inp, "ffn_inp", il);

        cur = build_norm(ffn_inp, layer.ffn_norm, NULL, LLM_NORM_RMS, il);
        cb(cur, "ffn_norm", il);

        if (ernie4_5_vl_moe_is_sparse(hparams, il)) {
            cur = build_sparse_ffn(layer, cur, ffn_inp, il);
        } else {
            cur = ernie4_5_build_dense_ffn(*this, layer, cur, il);
            cur = ggml_add(ctx0, cur, ffn_inp);
        }

        cur = build_cvec(cur, il);
        cb(cur, "l_out", il);

        // input for next layer
        inpL = cur;
    }

    ernie4_5_build_output(*this, model, inpL);
}
