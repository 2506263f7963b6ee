#pragma once

// Model classes of the architectures in pyllamaernie-archs.inc.

struct llama_model_ernie4_5_vl_moe : public llama_model_base {
    llama_model_ernie4_5_vl_moe(const struct llama_model_params & params) : llama_model_base(params) {}
    void load_arch_hparams(llama_model_loader & ml) override;
    void load_arch_tensors(llama_model_loader & ml) override;

    struct graph : public llm_graph_context {
        graph(const llama_model & model, const llm_graph_params & params);

    private:
        // both expert banks, of which only the one that fits the ubatch is computed
        struct expert_banks {
            ggml_tensor * text;
            ggml_tensor * vision;
            ggml_tensor * selected;
        };

        expert_banks build_expert_banks(const llama_layer & layer, ggml_tensor * cur, int il) const;

        // both banks and the shared expert, added to ffn_inp
        ggml_tensor * build_sparse_ffn(
            const llama_layer & layer, ggml_tensor * ffn_norm, ggml_tensor * ffn_inp, int il) const;
    };

    std::unique_ptr<llm_graph_context> build_arch_graph(const llm_graph_params & params) const override;
};

struct llama_model_ernie4_5_mtp : public llama_model_base {
    llama_model_ernie4_5_mtp(const struct llama_model_params & params) : llama_model_base(params) {}
    void load_arch_hparams(llama_model_loader & ml) override;
    void load_arch_tensors(llama_model_loader & ml) override;

    struct graph : public llm_graph_context {
        graph(const llama_model & model, const llm_graph_params & params);
    };

    std::unique_ptr<llm_graph_context> build_arch_graph(const llm_graph_params & params) const override;
};
