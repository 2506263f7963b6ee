"""Sub-models that a model was trained for, as its file names them.

ERNIE 5.0 (arXiv 2602.04705) trains one model so that cuts of it in depth, in experts and in experts per token are whole
models. No published GGUF says which, so the keys are ours: `elastic.names` lists the names, and for each name
`elastic.NAME.layers` (numbers of the kept layers), `.expert_count` (the first so many), `.expert_feed_forward_length`
and `.expert_feed_forward_length_vl` (the first so many neurons) and `.expert_used_count` say what stays. What a
sub-model does not name it keeps whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pyllamaernie.cut.source import Source
from pyllamaernie.cut.width import WIDTH_KEYS
from pyllamaernie.errors import CorruptModelError, InputError

NAMES = "elastic.names"
CHOSEN = "elastic.chosen"  # in a cut file: the name of the sub-model that it is


@dataclass(frozen=True)
class SubModel:
    """What stays: layers, the first experts and neurons, experts per token. None: all."""

    name: str
    layers: tuple[int, ...] | None
    n_expert: int | None
    widths: Mapping[str, int]
    n_expert_used: int | None


def sub_models(source: Source) -> list[SubModel]:
    """The sub-models that a file says it was trained for. Raises: CorruptModelError for keys that do not fit."""
    if NAMES not in source.keys:
        return []
    out = []
    for word in source.keys[NAMES].value:
        name = word.decode("utf-8", "replace") if isinstance(word, bytes) else str(word)

        def number(part: str, name: str = name) -> int | None:
            key = source.keys.get(f"elastic.{name}.{part}")
            if key is not None and (isinstance(key.value, bool) or not isinstance(key.value, int)):
                raise CorruptModelError(f"{source.path}: {key.name} is {key.value!r}, expected a whole number")
            return None if key is None else key.value

        layers = source.keys.get(f"elastic.{name}.layers")
        if layers is not None and not (isinstance(layers.value, list) and all(type(i) is int for i in layers.value)):
            raise CorruptModelError(f"{source.path}: {layers.name} is {layers.value!r}, expected numbers of layers")
        widths = {pool: n for pool, part in WIDTH_KEYS.items() if (n := number(part)) is not None}
        kept = None if layers is None else tuple(layers.value)
        out.append(SubModel(name, kept, number("expert_count"), widths, number("expert_used_count")))
    return out


def sub_model(source: Source, name: str) -> SubModel:
    """The sub-model of a name. Raises: InputError naming those that the file has."""
    known = sub_models(source)
    if not known:
        raise InputError(
            f"{source.path} does not say that it was trained to be cut (no key {NAMES}), so it has no presets; "
            "--layers, --experts, --expert-ff and --top-k cut any model, and cost it quality"
        )
    found = next((sub for sub in known if sub.name == name), None)
    if found is None:
        raise InputError(f"{source.path} has no preset {name!r}; it was trained for {', '.join(s.name for s in known)}")
    return found


def matching(
    source: Source, order: Sequence[int], n_expert: int | None, widths: Mapping[str, int], n_used: int | None
) -> SubModel | None:
    """The sub-model that a cut is, if any. `n_expert` is None when the kept experts are not simply the first."""
    pools = source.pools()
    full = {pool: source.down(pool, layers[0]).shape[2] for pool, layers in pools.items()}
    cut = (list(order), n_expert, {**full, **widths}, n_used or source.n_expert_used)
    for sub in sub_models(source):
        layers = list(range(source.n_layer))
        if sub.layers is not None:
            layers = sorted(sub.layers) + layers[source.n_layer - source.n_next :]
        experts = source.n_expert if sub.n_expert is None else sub.n_expert
        used = source.n_expert_used if sub.n_expert_used is None else sub.n_expert_used
        if cut == (layers, experts, {**full, **sub.widths}, used):
            return sub
    return None
