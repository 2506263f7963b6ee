"""Items, roles and losses: what there is to decide in a model, and what each choice is expected to cost.

Between measured errors and the solver: tensors that must have one type, groups that are probed together, the curve from
a tensor's error to the model's KL, and the bytes that a file has beside its weights. Nothing is measured here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pyllamaernie.plan.budget import Candidate, Tensor, disk_bytes
from pyllamaernie.plan.measure import ErrorTable, is_quantizable
from pyllamaernie.quant.importance import Importance
from pyllamaernie.quant.job import plan_job
from pyllamaernie.quant.native import TYPES
from pyllamaernie.quant.source import ModelSource

N_BINS = 4  # of depth: layers of one role in one bin share a curve
ERROR_MAX = 1.0  # a type with such an error is worse than a tensor of zeros
POWER_RANGE = (0.6, 1.6)

# KL per unit of relative error where the model cannot be run, by role; only the ratios matter. Medians of the probes of
# the text MoE of bench/text_moe.py at two bits, printed by `bench/mixed_precision.py --priors PLAN`. A small model.
PRIORS = {
    "attn_k": 3.4,
    "attn_output": 1.6,
    "attn_q": 2.7,
    "attn_v": 2.3,
    "ffn_down": 6.8,
    "ffn_down_exps": 0.88,
    "ffn_down_shexp": 0.42,
    "ffn_gate": 7.7,  # with its up projection, as below
    "ffn_gate_exps": 1.0,
    "ffn_gate_shexp": 1.1,
    "output": 41.0,
    "token_embd": 16.0,
}
PRIOR = 1.0

_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.weight")


@dataclass(frozen=True)
class Item:
    """Tensors that receive one type. `role` is the first tensor's name without its layer; `layer` None outside."""

    names: tuple[str, ...]
    role: str
    layer: int | None


@dataclass(frozen=True)
class Curve:
    """KL = scale * error ** power, for each item of a group."""

    scale: float
    power: float = 1.0

    def loss(self, error: float) -> float:
        return self.scale * error**self.power if error > 0 else 0.0


def items_of(names: Iterable[str]) -> list[Item]:
    """Every tensor alone, but gate and up projections together: fused kernels want both in one type."""
    have = set(names)
    out = []
    for name in sorted(have):
        up = name.replace(".ffn_gate", ".ffn_up")
        gate = name.replace(".ffn_up", ".ffn_gate")
        if name != gate and gate in have:
            continue
        found = _LAYER.fullmatch(name)
        role = found[2] if found else name.removesuffix(".weight")
        tied = (name, up) if up != name and up in have else (name,)
        out.append(Item(tied, role, int(found[1]) if found else None))
    return out


def groups_of(items: Sequence[Item], *, each: bool = False) -> dict[str, list[Item]]:
    """Items that are probed together, by label: a role in a quarter of the depth, or with `each` a single item."""
    n_layer = 1 + max((item.layer for item in items if item.layer is not None), default=0)
    out: dict[str, list[Item]] = {}
    for item in items:
        label = item.role
        if item.layer is not None:
            label += f", layer {item.layer}" if each else f", depth {item.layer * N_BINS // n_layer + 1}/{N_BINS}"
        out.setdefault(label, []).append(item)
    return out


def by_role(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Items by their role, both sorted; in a role those outside of the layers come first."""
    out: dict[str, list[Item]] = {}
    for item in sorted(items, key=lambda i: (i.role, -1 if i.layer is None else i.layer)):
        out.setdefault(item.role, []).append(item)
    return out


def item_error(item: Item, errors: ErrorTable, type_name: str) -> float:
    """Mean error of the item's tensors in a type. Raises KeyError when one cannot have it."""
    return sum(errors.errors[name][type_name].error for name in item.names) / len(item.names)


def item_types(item: Item, errors: ErrorTable) -> list[str]:
    """Types that all its tensors can have with errors below ERROR_MAX."""
    common = set.intersection(*(set(errors.errors[name]) for name in item.names))
    return sorted(t for t in common if item_error(item, errors, t) < ERROR_MAX)


def fit_curve(points: Sequence[tuple[float, Sequence[float]]]) -> Curve:
    """The curve of a group from one or two probes, each (KL of all its items together, their errors)."""
    points = [(kl, errors) for kl, errors in points if kl > 0 and sum(errors) > 0]
    if not points:
        return Curve(0.0)
    power = 1.0
    if len(points) > 1:
        (kl_a, errors_a), (kl_b, errors_b) = points[0], points[-1]
        ratio = math.log(sum(errors_a) / sum(errors_b))
        if abs(ratio) > 0.3:
            power = min(max(math.log(kl_a / kl_b) / ratio, POWER_RANGE[0]), POWER_RANGE[1])
    kl, errors = points[0]
    return Curve(kl / sum(e**power for e in errors), power)


def prior_curves(groups: Mapping[str, Sequence[Item]]) -> dict[str, Curve]:
    """Curves for a model that is not run."""
    return {label: Curve(PRIORS.get(items[0].role, PRIOR)) for label, items in groups.items()}


def solver_table(
    source: ModelSource, errors: ErrorTable, groups: Mapping[str, Sequence[Item]], curves: Mapping[str, Curve]
) -> list[Tensor]:
    """All tensors with their sizes on disk and expected losses; an item's loss is spread evenly over its tensors."""
    place = {name: (label, item) for label, items in groups.items() for item in items for name in item.names}
    out = []
    for w in source.weights:
        n_weights = math.prod(w.shape)
        if w.name not in place:
            out.append(Tensor(w.name, n_weights, (Candidate(w.type, -(-w.n_bytes // 32) * 32, 0.0),), False))
            continue
        label, item = place[w.name]
        candidates = [
            Candidate(
                t,
                disk_bytes(w.n_rows, w.n_cols, TYPES[t].block_size, TYPES[t].block_bytes),
                curves[label].loss(item_error(item, errors, t)) / len(item.names),
            )
            for t in item_types(item, errors)
        ]
        out.append(Tensor(w.name, n_weights, tuple(candidates)))
    return out


def scaled(curves: Mapping[str, Curve], factors: Mapping[str, float]) -> dict[str, Curve]:
    return {label: replace(c, scale=c.scale * factors.get(label, 1.0)) for label, c in curves.items()}


def header_bytes(source: ModelSource, importance: Importance | None, types: Mapping[str, str]) -> int:
    """Bytes of the file in front of its weights."""
    return len(plan_job(source, types, "plan.gguf", importance=importance).header)


def file_bytes(source: ModelSource, importance: Importance | None, types: Mapping[str, str]) -> int:
    """Size on disk of the file with these types."""
    return plan_job(source, types, "plan.gguf", importance=importance).n_bytes


def quantizable_names(source: ModelSource) -> list[str]:
    return [w.name for w in source.weights if is_quantizable(w)]
