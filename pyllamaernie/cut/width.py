"""The width of experts, for `slice --expert-ff`: which neurons stay, and their bytes.

A neuron of an expert is one row of gate and up and one column of down. Rows are whole pieces of a file in every type;
columns of a quantized type hang together in blocks, so a cut there keeps or drops whole blocks and stays byte-exact.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyllamaernie.cut.source import Source
from pyllamaernie.errors import InputError, UnsupportedInputError

if TYPE_CHECKING:
    import numpy as np

    from pyllamaernie.cut.scores import ExpertStatistics
    from pyllamaernie.gguf.file import InTensor

WIDTH_KEYS = {"text": "expert_feed_forward_length", "vision": "expert_feed_forward_length_vl"}

_PART = re.compile(r"blk\.\d+\.ffn_(gate|up|down|gate_up)_exps(?:_vl)?\.(weight|bias)")


@dataclass(frozen=True)
class Width:
    """How many neurons the experts of a pool keep. `ids`: which, by layer, (n_expert, n) ascending; None: the first."""

    n: int
    ids: Mapping[int, np.ndarray] | None = None


def widths_of(source: Source, wanted: Mapping[str, int], importance: ExpertStatistics | None) -> dict[str, Width]:
    """The cut of each pool that `wanted` names: its first neurons, or with `importance` those that add most.

    Raises: InputError, UnsupportedInputError.
    """
    pools, out = source.pools(), {}
    if not pools:
        raise InputError(f"{source.path} ({source.arch}) has no experts to cut")
    for pool, n in wanted.items():
        if pool not in pools:
            raise InputError(f"{source.path} has no experts for {pool}, only for {', '.join(pools)}")
        if source.get(WIDTH_KEYS[pool]) is None:
            raise UnsupportedInputError(f"{source.path} has no {source.arch}.{WIDTH_KEYS[pool]} to set the width in")
        for il in pools[pool]:
            _check(source.down(pool, il), n)
        ids = None
        if importance is not None:
            ids = {il: _best(source, importance, pool, il, n) for il in pools[pool]}
        out[pool] = Width(n, ids)
    return out


def _check(down: InTensor, n: int) -> None:
    from pyllamaernie.gguf.file import block_size

    n_ff, unit = down.shape[2], block_size(down.type)
    if not 1 <= n <= n_ff:
        raise InputError(f"{n} neurons cannot be kept; the experts of {down.name} have {n_ff}, so 1 to that many")
    if n % unit:
        raise InputError(
            f"{n} neurons cannot be kept: {down.name} is {down.type.name}, whose columns come in blocks of {unit}; "
            f"take a multiple of {unit}, or cut the F16 or F32 file"
        )


def _best(source: Source, importance: ExpertStatistics, pool: str, il: int, n: int) -> np.ndarray:
    """Neurons, or whole blocks of them, by their expected share of the squared output. Shapes: -> (n_expert, n)."""
    import numpy as np

    from pyllamaernie.cut.scores import neuron_energies
    from pyllamaernie.gguf.file import block_size

    down = source.down(pool, il)
    unit = block_size(down.type)
    energies = neuron_energies(source, importance, pool, il).reshape(down.shape[0], -1, unit).sum(2)
    blocks = np.sort(np.argsort(-energies, axis=1, kind="stable")[:, : n // unit], axis=1)
    return (blocks[:, :, None] * unit + np.arange(unit)).reshape(down.shape[0], n)


def cut_shape(tensor: InTensor, width: Width) -> tuple[int, ...]:
    """The shape of a tensor of experts after the cut."""
    part, kind = _part_of(tensor)
    n = width.n * (2 if part == "gate_up" else 1)
    if kind == "bias":
        return tensor.shape if part == "down" else (tensor.shape[0], n)
    return (*tensor.shape[:2], n) if part == "down" else (tensor.shape[0], n, tensor.shape[2])


def cut_expert(tensor: InTensor, il: int, expert: int, width: Width) -> np.ndarray:
    """The bytes of one expert after the cut: rows of gate and up, columns of down."""
    import numpy as np

    from pyllamaernie.gguf.file import block_size

    part, kind = _part_of(tensor)
    data = np.ascontiguousarray(tensor.data[expert])
    ids = np.arange(width.n) if width.ids is None else width.ids[il][expert]
    if part == "down":
        if kind == "bias":
            return data
        unit = block_size(tensor.type)
        blocks = data.view(np.uint8).reshape(len(data), tensor.shape[2] // unit, -1)  # (n_embd, n_blocks, block bytes)
        return blocks[:, ids[::unit] // unit]
    if part == "gate_up":  # the rows of gate, then those of up
        ids = np.concatenate([ids, ids + tensor.shape[1] // 2])
    return data[ids]


def _part_of(tensor: InTensor) -> tuple[str, str]:
    found = _PART.fullmatch(tensor.name)
    if found is None:
        raise UnsupportedInputError(f"how to cut the width of {tensor.name} is not known")
    return found[1], found[2]


def has_width(name: str) -> bool:
    """Whether a tensor of experts has to do with their width; routers and scales of whole experts have not."""
    return "_exps" in name and not name.endswith(".scale")
