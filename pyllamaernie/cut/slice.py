"""A smaller GGUF out of a larger one: fewer layers, fewer or narrower experts, fewer experts per token.

Nothing is trained and nothing quantized again: what stays is copied byte for byte, one expert at a time, since an
expert is one contiguous piece of its tensor in every type. Which experts to keep is `prune`'s question.
Source: tensor and key names are llama.cpp's, src/llama-arch.cpp at the pin.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyllamaernie import files
from pyllamaernie.cut import elastic
from pyllamaernie.cut.keys import depth_keys, describe, set_elastic, set_experts, set_widths
from pyllamaernie.cut.scores import ExpertStatistics
from pyllamaernie.cut.source import BIAS_REMOVED, LAYER, Kept, Source, expert_place, open_source
from pyllamaernie.cut.width import Width, cut_expert, cut_shape, has_width, widths_of
from pyllamaernie.errors import CorruptModelError, DiskSpaceError, InputError, UnsupportedInputError

if TYPE_CHECKING:
    import numpy as np

    from pyllamaernie.gguf.file import InTensor, Key, OutTensor

PLAN_FORMAT = "pyllamaernie-experts"
SOFTMAX = 1  # expert_gating_func; absent means softmax for the architectures that have no such key
EXACT_ARCHS = ("ernie4_5-moe", "ernie4_5-vl-moe")  # their loaders know expert_stored_count


@dataclass(frozen=True)
class SliceResult:
    """What was written. `warnings` are sentences for a person."""

    path: Path
    n_bytes_before: int
    n_bytes: int
    n_layer: int
    n_expert: int
    n_expert_used: int
    warnings: tuple[str, ...]


def first_experts(source: Source, n: int) -> Kept:
    """The first `n` experts of every pool and layer, or as many from the front of each routing group."""
    per_group = source.n_expert // source.n_group
    ids = [g * per_group + i for g in range(source.n_group) for i in range(n // source.n_group)]
    return {pool: {layer: ids for layer in layers} for pool, layers in source.pools().items()}


def read_plan(path: str | os.PathLike[str]) -> Kept:
    """Kept experts out of a plan: {"format": ..., "pools": {pool: {layer: {"kept": [ids]} or [ids]}}}."""
    try:
        plan = json.loads(Path(path).read_text(encoding="utf-8"))
        if plan["format"] != PLAN_FORMAT:
            raise ValueError(f"its format is {plan['format']!r}")
        return {
            pool: {int(il): list(map(int, row["kept"] if isinstance(row, dict) else row)) for il, row in layers.items()}
            for pool, layers in plan["pools"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not a plan of experts (format {PLAN_FORMAT!r}, as prune writes): {error}"
        ) from None


def slice_model(
    model: str | os.PathLike[str] | Source,
    output: str | os.PathLike[str],
    *,
    layers: Sequence[int] | None = None,
    experts: int | Kept | None = None,
    top_k: int | None = None,
    expert_ff: Mapping[str, int] | None = None,
    importance: ExpertStatistics | None = None,
    exact: bool = False,
    bias_scales: Mapping[str, Mapping[int, float]] | None = None,
    notes: Sequence[Key] = (),
    overwrite: bool = False,
) -> SliceResult:
    """Write `model` with only these layers, experts, neurons and experts per token; None keeps what there is.

    `experts`: how many from the front, or for each pool and layer (numbered as in `model`) which ones; a GGUF has one
    number of experts, so all lists are equally long. `expert_ff`: neurons of an expert, by pool: the first ones, or
    with `importance` those that add most. `exact` keeps the rows of the removed experts in the routers, so that tokens
    choose among the kept ones as before; only our loader takes such a file. `bias_scales` multiply the routers'
    correction biases. `notes` are further keys for the file.
    Raises: InputError, UnsupportedInputError, DiskSpaceError, the errors of `open_source`. No file is left then.
    """
    from pyllamaernie.gguf.file import file_bytes, write_gguf

    source = model if isinstance(model, Source) else open_source(model)
    output = Path(output)
    check_output(source, output, overwrite)
    order = _layer_order(source, layers)
    kept = _kept_experts(source, experts)
    n_expert = _n_expert(source, kept)
    n_used = _check_top_k(source, n_expert, top_k)
    widths = widths_of(source, expert_ff, importance) if expert_ff else {}
    if exact:
        _check_exact(source, kept)
    sub = None  # kept experts or neurons that are not the first ones are no sub-model
    if (experts is None or isinstance(experts, int)) and (importance is None or not widths):
        sub = elastic.matching(source, order, n_expert, {pool: width.n for pool, width in widths.items()}, top_k)
    keys = depth_keys(source, order) if layers is not None else dict(source.keys)
    set_experts(source, keys, n_expert, top_k, exact)
    set_widths(source, keys, widths)
    tensors = list(_cut(source, order, kept, n_expert, widths, exact, bias_scales or {}))
    describe(source, keys, tensors, order, kept, notes, bool(widths))
    set_elastic(keys, sub)
    wanted, free = file_bytes(tensors), shutil.disk_usage(output.absolute().parent).free
    if wanted > free:
        raise DiskSpaceError(f"{output}: {wanted / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")
    with files.hidden_file(output) as hidden:
        rest = [key for name, key in keys.items() if name != "general.architecture"]
        write_gguf(hidden, source.arch, rest, tensors)
        os.replace(hidden, output)
    is_front = isinstance(experts, int) and n_expert < source.n_expert
    is_cut = len(order) < source.n_layer or is_front or bool(widths) or n_used < source.n_expert_used
    warnings = [
        *(_training_warnings(source, output) if is_cut and sub is None else ()),
        *_window_warnings(source, order),
        *(() if exact else _bias_warnings(source, kept, n_expert, bool(bias_scales))),
    ]
    sizes = source.path.stat().st_size, output.stat().st_size
    return SliceResult(output, *sizes, len(order), n_expert, n_used, tuple(warnings))


def check_output(source: Source, output: Path, overwrite: bool) -> None:
    """Raises: InputError where no file may be written."""
    files.check_output(output, overwrite, (source.path,), ending=".gguf")


def slice_preset(
    model: str | os.PathLike[str], output: str | os.PathLike[str], name: str, *, overwrite: bool = False
) -> SliceResult:
    """Write a sub-model that the file says it was trained for. Raises: as `slice_model`, InputError if it has none."""
    source = open_source(model)
    sub = elastic.sub_model(source, name)
    return slice_model(
        source,
        output,
        layers=sub.layers,
        experts=sub.n_expert,
        top_k=sub.n_expert_used,
        expert_ff=sub.widths,
        overwrite=overwrite,
    )


def _layer_order(source: Source, layers: Sequence[int] | None) -> list[int]:
    """Old numbers of the kept layers. Layers that predict further tokens stay, at the end."""
    n = source.n_layer - source.n_next
    if layers is None:
        return list(range(source.n_layer))
    wrong = sorted({il for il in layers if not 0 <= il < n})
    if wrong:
        raise InputError(f"there is no layer {wrong[0]}; {source.path} has layers 0 to {n - 1}")
    if len(set(layers)) != len(layers):
        raise InputError(f"layer {next(il for il in layers if list(layers).count(il) > 1)} is named twice")
    if not layers:
        raise InputError(f"no layer is left; keep at least one of 0 to {n - 1}")
    return sorted(layers) + list(range(n, source.n_layer))


def _kept_experts(source: Source, experts: int | Kept | None) -> Kept | None:
    if experts is None:
        return None
    if not source.pools():
        raise InputError(f"{source.path} ({source.arch}) has no experts to cut")
    source.require_whole()
    if not isinstance(experts, int):
        return experts
    if not 1 <= experts <= source.n_expert:
        raise InputError(f"{experts} experts cannot be kept; {source.path} has {source.n_expert}, so 1 to that many")
    if experts % source.n_group:
        raise InputError(f"{experts} experts cannot be spread over {source.n_group} groups; take a multiple of that")
    return first_experts(source, experts)


def _n_expert(source: Source, kept: Kept | None) -> int:
    """How many experts every pool has afterwards."""
    if kept is None:
        return source.n_stored
    want, have = source.pools(), {pool: sorted(rows) for pool, rows in kept.items()}
    if want != have:
        raise InputError(f"the plan names pools and layers {have}, {source.path} has {want}")
    per_group, sizes = source.n_expert // source.n_group, set()
    for pool, rows in kept.items():
        for il, ids in rows.items():
            if sorted(set(ids)) != list(ids) or not all(0 <= e < source.n_expert for e in ids):
                raise InputError(
                    f"pool {pool}, layer {il}: {list(ids)} is not an ascending list out of 0 to {source.n_expert - 1}"
                )
            sizes.add(len(ids))
            groups = {sum(e // per_group == g for e in ids) for g in range(source.n_group)}
            if len(groups) > 1:
                raise InputError(
                    f"pool {pool}, layer {il}: the {source.n_group} routing groups keep {sorted(groups)} experts; "
                    "each must keep as many as the others"
                )
    if len(sizes) != 1 or 0 in sizes:
        raise InputError(f"layers keep {sorted(sizes)} experts; a GGUF has one number for all, at least 1")
    return sizes.pop()


def _check_top_k(source: Source, n_expert: int, top_k: int | None) -> int:
    if top_k is not None and not source.pools():
        raise InputError(f"{source.path} ({source.arch}) has no experts, so no number of experts per token")
    if top_k is not None and not 1 <= top_k <= n_expert:
        raise InputError(f"{top_k} experts per token are not possible with {n_expert}; take 1 to {n_expert}")
    n_used = source.n_expert_used if top_k is None else top_k
    if n_used > n_expert:
        raise InputError(
            f"a token uses {n_used} experts, {n_expert} would be left; keep at least {n_used}, "
            f"or lower the number per token to 1 to {n_expert} (--top-k)"
        )
    within = int(source.get("expert_group_used_count", source.n_group)) * (n_expert // source.n_group)
    if source.n_group > 1 and n_used > within:
        raise InputError(f"a token uses {n_used} experts, the groups open to it would hold {within}")
    return n_used


def _check_exact(source: Source, kept: Kept | None) -> None:
    if kept is None:
        raise InputError("only a cut of experts can keep the routers whole; say which experts to keep")
    if source.arch not in EXACT_ARCHS or source.n_group > 1:
        groups = f" with {source.n_group} routing groups" if source.n_group > 1 else ""
        raise UnsupportedInputError(
            f"{source.path} ({source.arch}{groups}): whole routers are only possible for {', '.join(EXACT_ARCHS)}"
        )
    if int(source.get("expert_gating_func", SOFTMAX)) != SOFTMAX:
        raise UnsupportedInputError(f"{source.path} has no softmax in its routers, so an ordinary cut is exact already")
    odd = [t.name for t in source.tensors if "_exps" in t.name and not t.name.endswith(".weight")]
    if odd:
        raise UnsupportedInputError(f"{source.path}: whole routers are not possible with {odd[0]}")
    for pool, layers in source.pools().items():
        for il in layers:
            bias = source.bias(pool, il)
            if bias is None or bias.type.name != "F32":
                raise UnsupportedInputError(
                    f"{source.path}: layer {il} has no correction bias in F32 for {pool}; without one an ordinary cut "
                    "is exact"
                )


def _cut(
    source: Source,
    order: Sequence[int],
    kept: Kept | None,
    n_expert: int,
    widths: Mapping[str, Width],
    exact: bool,
    bias_scales: Mapping[str, Mapping[int, float]],
) -> Iterator[OutTensor]:

    position = {il: j for j, il in enumerate(order)}
    for tensor in source.tensors:
        name = tensor.name
        layer = LAYER.fullmatch(name)
        if layer is not None:
            if int(layer[1]) not in position:
                continue
            name = f"blk.{position[int(layer[1])]}.{layer[2]}"
        place = expert_place(source, tensor.name)
        if place is None or (kept is None and not widths):
            yield _whole(tensor, name)
        else:
            ids = None if kept is None else list(kept[place[1]][place[0]])
            width = widths.get(place[1]) if has_width(tensor.name) else None
            scale = bias_scales.get(place[1], {}).get(place[0], 1.0) if "exp_probs_b" in tensor.name else 1.0
            yield _cut_experts(source, tensor, name, place[0], ids, width, exact, scale)


def _cut_experts(
    source: Source,
    tensor: InTensor,
    name: str,
    il: int,
    ids: list[int] | None,
    width: Width | None,
    exact: bool,
    scale: float,
) -> OutTensor:
    """One tensor of experts: these of them, of this width. With `exact` a router stays, all but its bias."""
    from pyllamaernie.gguf.file import OutTensor

    shape, data = tensor.shape, tensor.data
    n_ones = next((i for i, n in enumerate(shape) if n > 1), 0)  # a bias may be stored as one row
    n_rows = source.n_stored if "_exps" in tensor.name else source.n_expert
    if shape[n_ones] != n_rows:
        if tensor.name.endswith(".weight") or "exp_probs_b" in tensor.name:
            raise CorruptModelError(f"{source.path}: {tensor.name} has shape {shape}, the keys say {n_rows} experts")
        return _whole(tensor, name)
    if width is not None:
        shape = cut_shape(tensor, width)
        ids = ids or list(range(n_rows))
        return OutTensor(
            name,
            (len(ids), *shape[1:]),
            tensor.type,
            lambda: (cut_expert(tensor, il, e, width) for e in ids),
        )
    if ids is None:
        return _whole(tensor, name)
    if exact and "_exps" not in tensor.name:
        gone = [e for e in range(n_rows) if e not in set(ids)] if "exp_probs_b" in tensor.name else []
        return OutTensor(name, shape, tensor.type, lambda: iter((_without(data, gone),)))
    rows = data.reshape(data.shape[n_ones:])
    out = (*shape[:n_ones], len(ids), *shape[n_ones + 1 :])
    if scale != 1.0:
        return OutTensor(name, out, tensor.type, lambda: iter(((rows[ids] * scale).astype(rows.dtype),)))
    return OutTensor(name, out, tensor.type, lambda: (rows[e : e + 1] for e in ids))


def _whole(tensor: InTensor, name: str) -> OutTensor:
    from pyllamaernie.gguf.file import OutTensor

    return OutTensor(name, tensor.shape, tensor.type, lambda: iter((tensor.data,)))


def _without(bias: np.ndarray, gone: list[int]) -> np.ndarray:
    """A router's tensor as it is, or a copy of a bias that keeps these experts from being chosen."""
    if not gone:
        return bias
    out = bias.copy()
    out.reshape(-1)[gone] = BIAS_REMOVED
    return out


def _training_warnings(source: Source, output: Path) -> Iterator[str]:
    known = elastic.sub_models(source)
    what = f"its file names {', '.join(sub.name for sub in known)}, not this one" if known else "its file names none"
    yield (
        f"only a sub-model that was trained as one keeps its quality, and {what}; measure it with "
        f"`pyllamaernie compare {source.path.name} {output.name} -f test.txt`"
    )


def _window_warnings(source: Source, order: Sequence[int]) -> Iterator[str]:
    if len(order) < source.n_layer and source.get("attention.sliding_window"):
        if source.get("attention.sliding_window_pattern") is None:
            yield f"which layers of {source.arch} use a window is in its program code; check that the cut suits it"


def _bias_warnings(source: Source, kept: Kept | None, n_expert: int, is_scaled: bool) -> Iterator[str]:
    """Softmax runs over fewer experts, so probabilities grow against a bias that is added to them."""
    if n_expert == source.n_expert or int(source.get("expert_gating_func", SOFTMAX)) != SOFTMAX:
        return
    uneven = 0
    for tensor in source.tensors:
        place = expert_place(source, tensor.name) if "exp_probs_b" in tensor.name else None
        if place is not None and kept is not None:
            values = tensor.data.reshape(-1)[list(kept[place[1]][place[0]])]
            uneven += bool(values.max() > values.min())
    if uneven:
        scaled = ", scaled by what they grew on average" if is_scaled else ""
        yield (
            f"{uneven} routers add a correction bias{scaled} to probabilities that now run over {n_expert} experts "
            f"instead of {source.n_expert}: tokens near a tie can choose other kept experts than before "
            "(prune --exact avoids it)"
        )
