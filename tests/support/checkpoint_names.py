"""The tensors of a checkpoint under the names of the programs that write them; `checkpoints` has Baidu's own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def with_names(kind: str, weights: Mapping[str, np.ndarray], names: str) -> dict[str, np.ndarray]:
    """`names`: saved (transformers' save_pretrained), baidu, memory (fused experts), fused (qkv and up-gate in one)."""
    if names == "saved":
        return with_tower_under_model(weights)
    if names == "memory":
        return with_memory_names(kind, weights)
    if names == "fused":
        return with_fused_projections(weights)
    if names == "baidu":
        return dict(weights)
    raise ValueError(f"names={names!r}: expected saved, baidu, memory or fused")


def with_tower_under_model(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What transformers' save_pretrained writes: Baidu's names, but `model.vision_model.*`."""
    return {f"model.{k}" if k.startswith("vision_model.") else k: v for k, v in weights.items()}


def with_memory_names(kind: str, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the transformers modules call their parameters: fused experts, routers [n_expert, n_embd]."""
    text = "model.language_model." if kind == "vl" else "model."
    out: dict[str, np.ndarray] = {}
    for name, data in weights.items():
        if ".mlp.experts." in name:
            continue
        if name.startswith("vision_model."):
            name = name.replace("vision_model.", "model.vision_tower.", 1)
        elif ".resampler_model." in name:
            for part in ("spatial_linear", "temporal_linear"):
                for old, new in (("0", "fc1"), ("2", "fc2"), ("3", "ln")):
                    name = name.replace(f"{part}.{old}.", f"{part}.{new}.")
        elif name.startswith("model."):
            name = text + name.removeprefix("model.")
        if kind == "vl" and ".mlp.gate.weight" in name:
            bank = "vision_moe" if name.endswith("_1") else "text_moe"
            out[name.split(".gate.")[0] + f".{bank}.gate.weight"] = np.ascontiguousarray(data.T)
        elif name.endswith("moe_statics.e_score_correction_bias"):
            stem = name.removesuffix("moe_statics.e_score_correction_bias")
            for row, bank in enumerate(("text_moe.", "vision_moe.") if kind == "vl" else ("",)):
                out[f"{stem}{bank}gate.moe_statics.e_score_correction_bias"] = data[row : row + 1]
        else:
            out[name] = data
    for il in sorted({int(k.split(".")[2]) for k in weights if ".mlp.experts." in k}):
        stem = f"model.layers.{il}.mlp.experts"
        n = sum(1 for k in weights if k.startswith(f"{stem}.") and k.endswith(".up_proj.weight"))
        banks = {"": range(n)} if kind == "moe" else {"text_moe.": range(n // 2), "vision_moe.": range(n // 2, n)}
        for bank, experts in banks.items():
            fused = f"{text}layers.{il}.mlp.{bank}experts"
            out[f"{fused}.gate_up_proj"] = np.stack(
                [np.concatenate([weights[f"{stem}.{e}.{w}_proj.weight"] for w in ("gate", "up")]) for e in experts]
            )
            out[f"{fused}.down_proj"] = np.stack([weights[f"{stem}.{e}.down_proj.weight"] for e in experts])
    return out


def with_fused_projections(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Paddle-derived torch files: `qkv_proj` (q, k, v) and `up_gate_proj` (gate, then up), weights and biases."""
    out = {k: v for k, v in weights.items()}
    for name in list(out):
        for first, others, fused in (
            ("q_proj", ("k_proj", "v_proj"), "qkv_proj"),
            ("gate_proj", ("up_proj",), "up_gate_proj"),
        ):
            if f".{first}." in name:
                parts = [out.pop(name)] + [out.pop(name.replace(first, other)) for other in others]
                out[name.replace(first, fused)] = np.concatenate(parts)
    return out
