"""What tests of `slice` and `prune` share: models to cut, statistics of their experts, and the logits of the result."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import gguf_models
import numpy as np
from checkpoint_shapes import SHAPES
from gguf_contents import data_of
from gguf_models import gguf

from pyllamaernie import Llama, programs
from pyllamaernie.quant.imatrix import compute_imatrix

N_EXPERT, N_USED = SHAPES["moe"].n_expert, SHAPES["moe"].n_expert_used  # of `vl` too, in each pool
IDS = [5, 60, 200, 17, 300, 42, 90, 7, 150, 33, 410, 8, 77, 123, 61, 250]
PICTURES = [(gguf_models.picture(140, 196, seed=seed), gguf_models.QUESTION) for seed in range(6)]


def logits(path: Path, *, picture: bool = False) -> np.ndarray:
    """Of a text, or of a picture and a text; the projector is that of the uncut model."""
    mmproj = gguf("vl").parent / "mmproj-vl.gguf" if picture else None
    with Llama(path, mmproj=mmproj, type_k="f32", type_v="f32", n_ctx=512, n_threads=1) as llm:
        ids = [*IDS[:4], *gguf_models.image_ids(5, 7), *IDS[4:]] if picture else IDS
        return llm.logits(ids, images=[gguf_models.picture(140, 196, seed=9)] if picture else [])


@functools.cache
def quantized(kind: str) -> Path:
    """The model of one kind in Q8_0; rows of its experts are no multiples of 256."""
    path = gguf_models.subfolder("cut") / f"q8-{kind}.gguf"
    programs.run("llama-quantize", [gguf(kind), path, "q8_0", 1], capture=True, timeout=60)
    return path


@functools.cache
def text() -> Path:
    return gguf_models.random_words(gguf_models.subfolder("cut") / "text.txt", 700)


@functools.cache
def imatrix(kind: str) -> Path:
    """What `pyllamaernie imatrix` finds on the text, for `vl` with six pictures."""
    path = gguf_models.subfolder("cut") / f"imatrix-{kind}.gguf"
    compute_imatrix(gguf(kind), text(), path, pictures=PICTURES if kind == "vl" else [], chunk=128, n_threads=1)
    return path


def biases(path: Path, masked: Mapping[str, Mapping[int, list[int]]], *, even: bool = True) -> dict[str, np.ndarray]:
    """Correction biases that keep the masked experts from being chosen; the others' are 0 or as they were.

    `masked`: pool -> layer -> experts.
    """
    out = {}
    for name, data in data_of(path).items():
        if "exp_probs_b" in name:
            il, pool = int(name.split(".")[1]), "vision" if "_vl" in name else "text"
            out[name] = np.zeros_like(data) if even else np.array(data)
            out[name].reshape(-1)[masked.get(pool, {}).get(il, [])] = -1e9
    return out
