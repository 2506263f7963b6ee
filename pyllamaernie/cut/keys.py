"""The metadata of a cut model: every key that says how many layers, experts or neurons there are follows the cut.

Source: key names are llama.cpp's, src/llama-arch.cpp at the pin; `slice.*`, `prune.*` and `elastic.*` are ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pyllamaernie.cut import elastic
from pyllamaernie.cut.source import Kept, Source, expert_place
from pyllamaernie.cut.width import WIDTH_KEYS, Width
from pyllamaernie.errors import InputError, UnsupportedInputError

if TYPE_CHECKING:
    from pyllamaernie.gguf.file import Key, OutTensor

# Arrays with one value for each layer. Another array of that length stops a cut in depth: it may be one, or not.
_PER_LAYER = {
    "feed_forward_length",
    "expert_feed_forward_length",
    "expert_used_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.sliding_window_pattern",
    "attention.rope_pattern",
    "attention.recurrent_layers",
    "attention.compress_ratios",
    "swiglu_clamp_exp",
    "swiglu_clamp_shexp",
}
_NOT_PER_LAYER = {"rope.dimension_sections"}
_PERIODS = ("full_attention_interval", "attention.sliding_window_pattern")  # scalars: layer kinds repeat every N layers
_BOUND_TO_LAYERS = ("attention.shared_kv_layers", "target_layers")


def _with(keys: dict[str, Key], name: str, value: Any) -> None:
    keys[name] = replace(keys[name], value=value)


def depth_keys(source: Source, order: Sequence[int]) -> dict[str, Key]:
    """The metadata with the number of layers, of leading dense ones, and each array by layer cut to `order`."""
    keys, prefix, n = dict(source.keys), f"{source.arch}.", source.n_layer
    if list(order) == list(range(n)):
        return keys
    for name in _BOUND_TO_LAYERS:
        if prefix + name in keys:
            raise UnsupportedInputError(f"{source.path}: {prefix}{name} ties layers together; their number is fixed")
    for name in [name for name in keys if name.startswith(prefix) and keys[name].kind.startswith("list")]:
        short, value = name.removeprefix(prefix), keys[name].value
        if short in _PER_LAYER and len(value) == n:
            _with(keys, name, [value[il] for il in order])
        elif short in _PER_LAYER or (len(value) == n and short not in _NOT_PER_LAYER):
            raise UnsupportedInputError(
                f"{source.path}: {name} has {len(value)} values for {n} layers; how to cut it is not known"
            )
    for name in _PERIODS:
        period = source.get(name, 1)
        if isinstance(period, int) and period > 1 and any(il % period != j % period for j, il in enumerate(order)):
            raise InputError(f"kinds of layers repeat every {period} ({prefix}{name}); keep whole repetitions")
    _set_lead(source, keys, order)
    _with(keys, prefix + "block_count", len(order))
    return keys


def _set_lead(source: Source, keys: dict[str, Key], order: Sequence[int]) -> None:
    """Which layers are dense follows from two numbers: the cut must still be one that they can express."""
    name = f"{source.arch}.leading_dense_block_count"
    sparse = {place[0] for t in source.tensors if (place := expert_place(source, t.name)) is not None}
    if not sparse:
        return
    step = max(1, int(source.get("interleave_moe_layer_step", 1)))

    def follows(layers: Sequence[int], lead: int) -> bool:
        return all((il in sparse) == (j >= lead and (j + 1) % step == 0) for j, il in enumerate(layers))

    lead = int(source.get("leading_dense_block_count", 0))
    if not follows(range(source.n_layer), lead):
        raise UnsupportedInputError(f"{source.path}: its keys do not say which layers are dense, so none can go")
    candidates = [sum(il < lead for il in order), *range(len(order) + 1)] if name in keys else [0]
    new = next((n for n in candidates if follows(order, n)), None)
    if new is None:
        dense = [il for il in range(source.n_layer) if il not in sparse]
        raise InputError(
            f"layers {list(order)} of {source.path} cannot be expressed: its dense layers are {dense}, and the keys "
            f"demand dense layers first, then a sparse one every {step}"
        )
    if name in keys:
        _with(keys, name, new)


def set_experts(source: Source, keys: dict[str, Key], n_expert: int, top_k: int | None, exact: bool) -> None:
    """The numbers of experts and of those that a token uses; `exact`: beside that of the routers' rows."""
    from pyllamaernie.gguf.file import Key

    name = f"{source.arch}.expert_stored_count"
    if exact:
        keys[name] = Key(name, "u32", n_expert)
    elif source.n_expert and name not in keys:
        _with(keys, f"{source.arch}.expert_count", n_expert)
    if top_k is not None:
        name = f"{source.arch}.expert_used_count"
        old = keys[name].value
        _with(keys, name, [min(top_k, n) for n in old] if isinstance(old, list) else top_k)


def set_widths(source: Source, keys: dict[str, Key], widths: Mapping[str, Width]) -> None:
    """The width of the experts of each pool that was cut."""
    for pool, width in widths.items():
        name = f"{source.arch}.{WIDTH_KEYS[pool]}"
        old = keys[name].value
        _with(keys, name, [min(width.n, n) for n in old] if isinstance(old, list) else width.n)


def set_elastic(keys: dict[str, Key], sub: elastic.SubModel | None) -> None:
    """A cut file has none of the sub-models of its source but perhaps is one."""
    from pyllamaernie.gguf.file import Key

    if elastic.NAMES in keys:
        for name in [name for name in keys if name.startswith("elastic.")]:
            del keys[name]
        if sub is not None:
            keys[elastic.CHOSEN] = Key(elastic.CHOSEN, "str", sub.name)


def describe(
    source: Source,
    keys: dict[str, Key],
    tensors: Sequence[OutTensor],
    order: Sequence[int],
    kept: Kept | None,
    notes: Sequence[Key],
    is_narrow: bool,
) -> None:
    """The size label, and where the layers and experts come from: their numbers in the file before."""
    from pyllamaernie.gguf.file import Key, size_label

    changed = is_narrow
    if list(order) != list(range(source.n_layer)):
        keys["slice.layers"] = Key("slice.layers", "list:u32", list(order))
        changed = True
    for pool, rows in (kept or {}).items():
        ids = [e for il in sorted(rows) if il in order for e in rows[il]]
        if ids:
            keys[f"prune.kept.{pool}"] = Key(f"prune.kept.{pool}", "list:u32", ids)
        changed = True
    for key in notes:
        keys[key.name] = key
    if changed and "general.size_label" in keys:
        n_all = sum(math.prod(t.shape) for t in tensors)
        n_experts = sum(math.prod(t.shape) for t in tensors if re.search(r"_exps(_vl)?\.weight$", t.name))
        stored = keys.get(f"{source.arch}.expert_stored_count", keys.get(f"{source.arch}.expert_count"))
        n = int(stored.value) if source.n_expert and stored is not None else 0
        _with(keys, "general.size_label", size_label(n_all, n_all - n_experts, n_experts // max(n, 1), n))
