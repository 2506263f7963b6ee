"""Sizes of the small random checkpoints: one set for each kind, and wider ones. Weights are in `checkpoints`."""

from __future__ import annotations

from dataclasses import dataclass, replace

KINDS = ("dense", "moe", "vl")


@dataclass(frozen=True)
class Shape:
    """Sizes of one checkpoint. `n_ff_exp_vl` up to `patch` are only read for `vl`, `n_mtp` for the text kinds."""

    n_vocab: int = 512
    n_embd: int = 256
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 64
    n_layer: int = 4
    n_ff: int = 384
    n_expert: int = 8
    n_expert_used: int = 3
    n_shared: int = 2
    n_ff_exp: int = 96
    n_ff_exp_vl: int = 32
    section_t: int = 10
    v_depth: int = 3
    v_width: int = 128
    v_head: int = 4
    v_ff: int = 512
    patch: int = 14
    n_dense: int = 1  # layers before the first sparse one
    correction_bias: bool = True
    n_mtp: int = 0  # multi-token-prediction layers, dense ones
    embed: float = 0.5  # deviation of the embedding and the output matrix


# Dense: head_dim is not n_embd / n_head, as in ERNIE-4.5-0.3B. MoE and VL: n_ff / n_head_kv equals the shared width, a
# coincidence of the released models that upstream's converter relies on.
SHAPES: dict[str, Shape] = {"dense": Shape(n_head=6), "moe": Shape(), "vl": Shape()}

# Every row length is a multiple of 256, so that every quantization type applies.
WIDE_SHAPES: dict[str, Shape] = {
    "dense": Shape(n_ff=512),
    "moe": Shape(n_ff=2048, n_ff_exp=512, n_layer=3),
    "vl": Shape(n_ff=2048, n_ff_exp=512, n_ff_exp_vl=256, n_layer=3, v_depth=2, v_width=256, v_head=8, v_ff=1024),
}


def shape_with(kind: str, **changes: int) -> Shape:
    """The default sizes of `kind` with some changed."""
    return replace(SHAPES[kind], **changes)
