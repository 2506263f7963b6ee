"""Tensor lists of ERNIE 4.5 models by arithmetic from their configurations, with invented losses for each type.

Names and shapes are those of the GGUF that `pyllamaernie.convert` writes; no weight exists. The losses fall with the
bits roughly as real ones do (a factor of 3 to 4 per bit), differ between tensors by orders of magnitude, and are
otherwise random from a seed, so that a solver meets no two equal tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import numpy as np

from pyllamaernie.plan.budget import Candidate, Tensor, disk_bytes

TYPES = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "IQ4_NL"),
    *("Q4_0", "Q4_K", "Q4_1", "Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0", "BF16"),
)
# how much one role's error moves the output, relative to its peers
_WEIGHT_OF_ROLE = {
    "token_embd": 3.0,
    "output": 3.0,
    "attn_v": 4.0,
    "attn_k": 2.0,
    "ffn_down": 1.5,
    "ffn_down_exps": 1.5,
}


@dataclass(frozen=True)
class Shape:
    """What of a configuration decides the tensors; `n_ff_exps_vl` 0: no vision experts."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_ff_exps: int
    n_ff_shexp: int
    n_ff_exps_vl: int
    n_dense: int
    tied: bool
    n_expert: int = 64
    head_dim: int = 128
    n_vocab: int = 103424


# of the 300B it is not known whether the embeddings are tied; an output matrix of its own is the longer list
SHAPES = {
    "21B": Shape(28, 2560, 12288, 20, 4, 1536, 3072, 0, n_dense=1, tied=True),
    "28B-VL": Shape(28, 2560, 12288, 20, 4, 1536, 3072, 512, n_dense=1, tied=True),
    "300B": Shape(54, 8192, 28672, 64, 8, 3584, 0, 0, n_dense=3, tied=False),
}


def matrices(s: Shape) -> Iterator[tuple[str, tuple[int, int], bool]]:
    """(name, (rows, row length), quantizable) of every tensor; experts count as rows."""
    yield "token_embd.weight", (s.n_vocab, s.n_embd), True
    if not s.tied:
        yield "output.weight", (s.n_vocab, s.n_embd), True
    yield "output_norm.weight", (1, s.n_embd), False
    for il in range(s.n_layer):
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{il}.{name}.weight", (1, s.n_embd), False
        q, kv = s.n_head * s.head_dim, s.n_head_kv * s.head_dim
        for name, rows, row in (("q", q, s.n_embd), ("k", kv, s.n_embd), ("v", kv, s.n_embd), ("output", s.n_embd, q)):
            yield f"blk.{il}.attn_{name}.weight", (rows, row), True
        banks = [("", s.n_ff, 1)]
        if il >= s.n_dense:
            banks = [
                ("_exps", s.n_ff_exps, s.n_expert),
                ("_shexp", s.n_ff_shexp, 1),
                ("_exps_vl", s.n_ff_exps_vl, s.n_expert),
            ]
        for suffix, n_ff, n_expert in banks:
            if n_ff:
                yield f"blk.{il}.ffn_gate{suffix}.weight", (n_ff * n_expert, s.n_embd), True
                yield f"blk.{il}.ffn_up{suffix}.weight", (n_ff * n_expert, s.n_embd), True
                yield f"blk.{il}.ffn_down{suffix}.weight", (s.n_embd * n_expert, n_ff), True
            if n_ff and "_exps" in suffix:
                vl = "_vl" if suffix.endswith("_vl") else ""
                yield f"blk.{il}.ffn_gate_inp{vl}.weight", (s.n_expert, s.n_embd), False
                yield f"blk.{il}.exp_probs_b{vl}.bias", (1, s.n_expert), False


def table(shape: Shape, seed: int) -> list[Tensor]:
    """All tensors with sizes on disk and invented losses; the types are those whose block divides the row."""
    rng = np.random.default_rng(seed)
    # what makes a type better or worse than its bits say, for all tensors alike
    skill = {name: float(np.exp(rng.normal(0, 0.15))) for name in TYPES}
    tensors = []
    for name, (n_rows, n_per_row), quantizable in matrices(shape):
        n_weights = n_rows * n_per_row
        if not quantizable:
            tensors.append(
                Tensor(name, n_weights, (Candidate("F32", disk_bytes(n_rows, n_per_row, 1, 4), 0.0),), False)
            )
            continue
        role = name.split(".")[-2]
        weight = _WEIGHT_OF_ROLE.get(role, 1.0) * float(np.exp(rng.normal(0, 0.8))) * n_weights**0.5
        candidates = []
        for type_name in TYPES:
            block, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
            if n_per_row % block:
                continue
            error = skill[type_name] * float(np.exp(rng.normal(0, 0.05))) * 3.6 ** (-8 * n_bytes / block)
            candidates.append(Candidate(type_name, disk_bytes(n_rows, n_per_row, block, n_bytes), weight * error))
        tensors.append(Tensor(name, n_weights, tuple(candidates)))
    return tensors


def gate_up_ties(tensors: list[Tensor]) -> list[tuple[str, str]]:
    """Gate and up projections of a layer, which fused kernels want in one type."""
    names = {t.name for t in tensors if t.quantizable}
    gates = sorted(n for n in names if ".ffn_gate" in n)
    return [(gate, gate.replace(".ffn_gate", ".ffn_up")) for gate in gates]
