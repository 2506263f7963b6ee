"""Limits for types as people write them, REGEX=TYPE, to rules for the solver."""

from __future__ import annotations

from collections.abc import Iterable

from pyllamaernie.errors import InputError
from pyllamaernie.plan.budget import Rule
from pyllamaernie.quant.native import ggml_type


def parse_rules(*, pin: Iterable[str] = (), min: Iterable[str] = (), max: Iterable[str] = ()) -> list[Rule]:
    """A rule for each entry. Raises: InputError for one that is not REGEX=TYPE, and for an unknown type."""
    rules = []
    for kind, entries in (("pin", pin), ("min", min), ("max", max)):
        for entry in entries:
            pattern, _, name = entry.rpartition("=")
            if not pattern or not name:
                raise InputError(f"--{kind} {entry!r}: expected REGEX=TYPE, such as ffn_down_exps=IQ4_XS")
            rules.append(Rule(pattern, kind, ggml_type(name).name))
    return rules
