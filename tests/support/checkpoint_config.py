"""config.json and preprocessor_config.json of a small checkpoint, as transformers or Baidu's repositories have them."""

from __future__ import annotations

from checkpoint_shapes import Shape
from tiny_vocabulary import token_id


def config(
    kind: str, shape: Shape, *, flat: bool = False, tied: bool = True, use_bias: bool = False, dtype: str = "float32"
) -> dict:
    """config.json: as transformers writes it, or with `flat` as Baidu's own repositories do."""
    text = _text(shape, tied, use_bias)
    if kind != "vl" or flat:
        text["rope_theta"] = 500000.0
    if kind == "dense":
        return {
            "architectures": ["Ernie4_5_ForCausalLM" if flat else "Ernie4_5ForCausalLM"],
            "model_type": "ernie4_5",
            "torch_dtype": dtype,
            "head_dim": shape.head_dim,
            **text,
        }
    if shape.n_mtp:
        text["num_nextn_predict_layers"] = shape.n_mtp
    text |= {"moe_k": shape.n_expert_used, "moe_num_shared_experts": shape.n_shared}
    if kind == "moe":
        return {
            "architectures": ["Ernie4_5_MoeForCausalLM"],
            "model_type": "ernie4_5_moe",
            "torch_dtype": dtype,
            **text,
            "moe_num_experts": shape.n_expert,
            "moe_intermediate_size": shape.n_ff_exp,
            "moe_layer_start_index": shape.n_dense,
            "moe_layer_end_index": -1,
            "moe_layer_interval": 1,
        }
    return {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        **(_flat_vl(shape, text, dtype) if flat else _vl(shape, text, dtype, tied)),
    }


def _text(shape: Shape, tied: bool, use_bias: bool) -> dict:
    """What all kinds say of their text layers."""
    return {
        "vocab_size": shape.n_vocab,
        "hidden_size": shape.n_embd,
        "intermediate_size": shape.n_ff,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_head_kv,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "use_bias": use_bias,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
    }


def _vision(shape: Shape) -> dict:
    """What both forms say of the vision tower."""
    return {
        "depth": shape.v_depth,
        "hidden_size": shape.v_width,
        "num_heads": shape.v_head,
        "in_channels": 3,
        "patch_size": shape.patch,
        "spatial_merge_size": 2,
        "hidden_act": "quick_gelu",
    }


def _flat_vl(shape: Shape, text: dict, dtype: str) -> dict:
    return {
        "model_type": "ernie4_5_moe_vl",
        "torch_dtype": dtype,
        **text,
        "moe_num_experts": [shape.n_expert] * 2,
        "moe_intermediate_size": [shape.n_ff_exp, shape.n_ff_exp_vl],
        "moe_layer_start_index": [shape.n_dense] * 2,
        "moe_layer_end_index": [shape.n_layer + 1, shape.n_layer],
        "moe_layer_interval": 1,
        "moe_use_aux_free": True,
        "rope_3d": True,
        "freq_allocation": shape.section_t,
        "spatial_conv_size": 2,
        "temporal_conv_size": 2,
        "use_temporal_conv": True,
        "pixel_hidden_size": shape.v_width,
        "im_patch_id": token_id("<|IMAGE_PLACEHOLDER|>"),
        "vision_config": {
            "model_type": "DFNRope_vision_transformer",
            **_vision(shape),
            "embed_dim": shape.v_width,
            "mlp_ratio": shape.v_ff // shape.v_width,
        },
    }


def _vl(shape: Shape, text: dict, dtype: str, tied: bool) -> dict:
    half = (shape.head_dim // 2 - shape.section_t) // 2
    ids = {
        f"{key}_token_id": token_id(f"<|{name}|>")
        for key, name in (
            ("image_start", "IMAGE_START"),
            ("image_end", "IMAGE_END"),
            ("image", "IMAGE_PLACEHOLDER"),
            ("video_start", "VIDEO_START"),
            ("video_end", "VIDEO_END"),
            ("video", "VIDEO_PLACEHOLDER"),
        )
    }
    return {
        "model_type": "ernie4_5_vl_moe",
        "dtype": dtype,
        "tie_word_embeddings": tied,
        **ids,
        "text_config": {
            "model_type": "ernie4_5_vl_moe_text",
            "dtype": dtype,
            **text,
            "moe_num_experts": shape.n_expert,
            "moe_intermediate_size": [shape.n_ff_exp, shape.n_ff_exp_vl],
            "mlp_layer_types": ["dense"] * shape.n_dense + ["sparse"] * (shape.n_layer - shape.n_dense),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500000.0,
                "mrope_section": [half, half, shape.section_t],
            },
        },
        "vision_config": {
            "model_type": "ernie4_5_vl_moe_vision",
            "dtype": dtype,
            **_vision(shape),
            "intermediate_size": shape.v_ff,
            "temporal_merge_size": 2,
            "rms_norm_eps": 1e-6,
        },
    }


def preprocessor_config(shape: Shape, *, flat: bool = False) -> dict:
    """preprocessor_config.json of a VL checkpoint. The upper limit is low, so that a test picture can reach it."""
    limits = (
        {"min_pixels": 3136, "max_pixels": 200 * 784}
        if flat
        else {"size": {"shortest_edge": 3136, "longest_edge": 200 * 784}}
    )
    return {
        "image_processor_type": "Ernie4_5_VLMoeImageProcessorPil",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
        "patch_size": shape.patch,
        "merge_size": 2,
        "temporal_patch_size": 1,
        **limits,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
