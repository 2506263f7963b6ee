"""Types that anybody could choose without a plan, for the planner to be measured against."""

from __future__ import annotations

from collections.abc import Sequence

from pyllamaernie.errors import QuantizeError
from pyllamaernie.plan.measure import ErrorTable
from pyllamaernie.plan.table import Item, item_types
from pyllamaernie.quant.importance import Importance
from pyllamaernie.quant.native import TYPES
from pyllamaernie.quant.source import ModelSource
from pyllamaernie.quant.stock import stock_types

PRESETS = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "Q2_K", "IQ3_XXS", "IQ3_XS", "IQ3_S"),
    *("IQ3_M", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_XS", "IQ4_NL", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"),
    "Q8_0",
)
REST_TYPES = ("Q4_K", "Q6_K", "Q8_0")  # of everything but the experts, in the files that people make by hand


def known_plans(
    source: ModelSource, importance: Importance | None, errors: ErrorTable, items: Sequence[Item]
) -> dict[str, dict[str, str]]:
    """Types by name: presets of llama-quantize, single types, low types for experts with high ones for the rest.

    Presets with types that `errors` does not have are left out.
    """
    out: dict[str, dict[str, str]] = {}
    allowed = {t for row in errors.errors.values() for t in row}
    names = {name for item in items for name in item.names}
    for preset in PRESETS:
        try:
            imatrix = None if importance is None else importance.path
            types = dict(stock_types(source, preset, imatrix=imatrix).types)
        except QuantizeError:  # without an importance matrix there are none below three bits
            continue
        if all(types[name] in allowed for name in names):
            out[f"stock {preset}"] = types
    experts = [item for item in items if "_exps" in item.role]
    others = [item for item in items if "_exps" not in item.role]
    for t in sorted(allowed):
        out[f"all {t}"] = _single(items, errors, t)
        for rest in REST_TYPES if experts else ():
            if rest in allowed and TYPES[t].bpw < TYPES[rest].bpw:
                out[f"experts {t}, rest {rest}"] = _single(experts, errors, t) | _single(others, errors, rest)
    return out


def _single(items: Sequence[Item], errors: ErrorTable, type_name: str) -> dict[str, str]:
    """One type for these items, or the next with more bits that an item can have."""
    out: dict[str, str] = {}
    for item in items:
        larger = [t for t in item_types(item, errors) if TYPES[t].bpw >= TYPES[type_name].bpw]
        if larger:
            chosen = type_name if type_name in larger else min(larger, key=lambda t: (TYPES[t].bpw, t))
            out |= dict.fromkeys(item.names, chosen)
    return out
