"""The checkpoints of the ERNIE 4.5 family: each one's sizes, and a small random stand-in of the same proportions.

Base and Thinking variants have the sizes of their sibling; a Base checkpoint has no chat template.
Source of the sizes: transformers 5.23's defaults for 0.3B, 21B and VL-28B, Baidu's ERNIE repository (pre-training
configurations) for 300B, and where those are silent the released model cards; for VL-424B the vision experts' width is
derived (it is what makes the sum right). num_nextn_predict_layers = 1 is said of the released text MoE configurations.
"""

from __future__ import annotations

from dataclasses import dataclass

from checkpoint_shapes import Shape

# The released models' proportions at small sizes: heads, width of a head, top-k, rotation sections (10, 11, 11 for 20,
# 22, 22), first sparse layer, experts' widths, shared experts or none, correction bias or none. The embedding is small,
# so that a tied model does not repeat its last token for ever and the probabilities are not all 0 or 1. Name -> options
# of `checkpoints.write_checkpoint`.
CLASSES: dict[str, dict] = {
    "0.3B": {
        "kind": "dense",
        "shape": Shape(n_embd=128, n_head=16, n_head_kv=2, head_dim=16, n_layer=3, n_ff=384, embed=0.15),
        "tied": True,
    },
    "21B-A3B": {
        "kind": "moe",
        "shape": Shape(
            n_embd=160, n_head=10, n_head_kv=2, head_dim=16, n_layer=3, n_ff=768, n_expert=64, n_expert_used=6,
            n_ff_exp=96, n_mtp=1, embed=0.15,
        ),
        "tied": True,
    },
    "300B-A47B": {
        "kind": "moe",
        "shape": Shape(
            n_embd=256, n_head=16, n_head_kv=2, head_dim=16, n_layer=5, n_ff=896, n_expert=64, n_expert_used=8,
            n_shared=0, n_ff_exp=112, n_dense=3, correction_bias=False, n_mtp=1,
            embed=0.15,
        ),
        "tied": False,
    },
    "VL-28B-A3B": {
        "kind": "vl",
        "shape": Shape(
            n_embd=320, n_head=5, n_head_kv=1, n_layer=3, n_ff=1536, n_expert=64, n_expert_used=6, n_ff_exp=192,
            n_ff_exp_vl=64, v_depth=2, v_width=160, v_head=2, v_ff=640, embed=0.15,
        ),
        "tied": True,
    },
    "VL-424B-A47B": {
        "kind": "vl",
        "shape": Shape(
            n_embd=512, n_head=8, n_head_kv=1, n_layer=5, n_ff=1792, n_expert=32, n_expert_used=8, n_shared=0,
            n_ff_exp=224, n_ff_exp_vl=96, n_dense=3, v_depth=2, v_width=160, v_head=2, v_ff=640, embed=0.15,
        ),
        "tied": False,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Released:
    """A released model's sizes; `params` is its published number of parameters, `digits` how exact that is."""

    kind: str
    shape: Shape
    tied: bool
    params: float
    digits: float
    where: str


_TOWER = {"section_t": 20, "v_depth": 32, "v_width": 1280, "v_head": 16, "v_ff": 5120}
_A3B = {
    "n_vocab": 103424, "head_dim": 128, "n_embd": 2560, "n_head": 20, "n_head_kv": 4, "n_layer": 28, "n_ff": 12288,
    "n_expert": 64, "n_expert_used": 6, "n_shared": 2, "n_ff_exp": 1536,
}  # fmt: skip
_A47B = {
    "n_vocab": 103424, "head_dim": 128, "n_embd": 8192, "n_head": 64, "n_head_kv": 8, "n_layer": 54, "n_ff": 28672,
    "n_expert": 64, "n_expert_used": 8, "n_shared": 0, "n_ff_exp": 3584, "n_dense": 3,
}  # fmt: skip
_COUNTED = "the weights' own count, as https://haimaker.ai/models/baidu shows it"

RELEASED: dict[str, Released] = {
    "0.3B": Released(
        "dense",
        Shape(n_vocab=103424, n_embd=1024, n_head=16, n_head_kv=2, head_dim=128, n_layer=18, n_ff=3072),
        True, 0.36e9, 0.01e9, "model card of ERNIE-4.5-0.3B",
    ),
    "21B-A3B": Released(
        "moe", Shape(**_A3B), True, 21.83e9, 0.01e9,
        "llama-bench on converted files, which lack the multi-token-prediction layer",
    ),
    # of the 1.0 billion between this and the sum without it, nothing but the multi-token-prediction layer can account
    "300B-A47B": Released(
        "moe", Shape(**_A47B, correction_bias=False, n_mtp=1), False, 300.5e9, 0.1e9, _COUNTED,
    ),
    "VL-28B-A3B": Released("vl", Shape(**_A3B, **_TOWER, n_ff_exp_vl=512), True, 29.4e9, 0.1e9, _COUNTED),
    "VL-424B-A47B": Released("vl", Shape(**_A47B, **_TOWER, n_ff_exp_vl=1536), False, 423.5e9, 0.1e9, _COUNTED),
}  # fmt: skip
