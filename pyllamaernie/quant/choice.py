"""Which type each tensor gets: by a preset, a type or the lines of a recipe, and the recipe that a job amounts to.

Presets and recipes are llama-quantize's, which is asked (`stock`). Types that fit a size are not chosen here: `plan`
measures and solves for them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyllamaernie.errors import InputError

if TYPE_CHECKING:
    from pyllamaernie.gguf.file import Key
    from pyllamaernie.quant.job import Job
    from pyllamaernie.quant.source import ModelSource

RECIPE_BASE = "Q8_0"  # of tensors that no line of a recipe names


@dataclass(frozen=True)
class Choice:
    """Types by tensor name, further metadata, and what a person should know."""

    types: Mapping[str, str]
    keys: tuple[Key, ...] = ()
    warnings: tuple[str, ...] = ()


def choose_types(
    source: ModelSource,
    *,
    type: str | None = None,
    recipe: str | None = None,
    base: str = RECIPE_BASE,
    pins: Sequence[str] = (),
    pure: bool = False,
    imatrix: Path | None = None,
) -> Choice:
    """The types of a preset or type, or of the text of a recipe. `pins`, REGEX=TYPE, come first.

    Raises: InputError, QuantizeError.
    """
    from pyllamaernie.gguf.file import Key
    from pyllamaernie.quant import native, stock

    if (type is None) == (recipe is None):
        raise InputError("give a type or a recipe, one of both")
    for pin in pins:
        stock.check_recipe(pin)
    if type is not None and type.upper() in stock.presets():
        found = stock.stock_types(source, type, recipe="\n".join(pins) or None, imatrix=imatrix, pure=pure)
        number = Key("general.file_type", "u32", stock.presets()[type.upper()])
        return Choice(found.types, () if pins else (number,), found.warnings)
    if type is not None:
        if type.upper() not in native.TYPES:
            raise InputError(
                f"type {type!r} is not known; presets are {', '.join(stock.presets())}, types are "
                f"{', '.join(native.TYPES)}"
            )
        recipe = f".*={type}"
    entries = [*pins, *stock.check_recipe(recipe or "")]
    found = stock.stock_types(source, base, recipe="\n".join(entries), imatrix=imatrix)
    unused = stock.unused_entries(entries, [w.name for w in source.weights])
    notes = tuple(f"recipe entry {entry!r} is found in no tensor's name" for entry in unused)
    return Choice(found.types, (), (*found.warnings, *notes))


def recipe_text(job: Job) -> str:
    """Lines for `llama-quantize --tensor-type-file`: the type of every tensor that was quantized, by its whole name."""
    from pyllamaernie.quant import native

    lines = [
        f"^{re.escape(t.weights.name)}$={t.type.lower()}\n"
        for t in job.tensors
        if t.type != t.weights.type or native.TYPES[t.type].is_quantized
    ]
    return "".join(sorted(lines))


def needs_importance(types: Mapping[str, str]) -> bool:
    """Whether some tensor gets a type that gives nothing usable without importance data."""
    from pyllamaernie.quant.job import OUTPUTS
    from pyllamaernie.quant.native import TYPES, WANT_IMPORTANCE

    return any(
        TYPES[t].needs_importance or (t in WANT_IMPORTANCE and name not in OUTPUTS)
        for name, t in types.items()
        if t in TYPES
    )
