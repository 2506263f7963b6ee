"""What each quantization type costs each tensor, and a byte budget -> one type per tensor.

Tables, ties and rules become groups of tensors with candidates, `knapsack.py` chooses among them, and the choice is a
plan. It measures nothing, reads and writes no file, and knows no type by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pyllamaernie.errors import BudgetError, InputError
from pyllamaernie.plan import knapsack

ALIGNMENT = 32  # of tensor data in a GGUF without the key general.alignment
PLAN_SCHEMA = 1
RULE_KINDS = ("pin", "min", "max")

_REGEX_SPECIAL = re.compile(r"[\\^$.*+?()\[\]{}|]")


@dataclass(frozen=True)
class Candidate:
    """One type that a tensor can have: its bytes in the file, padding included, and the loss predicted for it."""

    type: str
    size_bytes: int
    loss: float


@dataclass(frozen=True)
class Tensor:
    """A tensor and its candidates. One that is stored as it is has a single candidate and `quantizable` False."""

    name: str
    n_weights: int
    candidates: tuple[Candidate, ...]
    quantizable: bool = True


@dataclass(frozen=True)
class Rule:
    """A limit for the quantizable tensors in whose name `pattern` is found.

    `kind` pin: this type; min, max: no type with fewer, or more, bits than this one.
    """

    pattern: str
    kind: str
    type: str


@dataclass(frozen=True)
class Group:
    """Tensors that receive the same type, and what is left to choose from: fewest bytes first, each better than the
    one before it."""

    tensors: tuple[str, ...]
    n_weights: int
    candidates: tuple[Candidate, ...]
    quantizable: bool


@dataclass(frozen=True)
class Choice:
    """What the plan gives to one group."""

    tensors: tuple[str, ...]
    n_weights: int
    type: str
    size_bytes: int
    loss: float
    quantizable: bool


@dataclass(frozen=True)
class Plan:
    """One type per group, by name of the group's first tensor, and how good that is.

    `bound`: no choice within the budget has a smaller loss. `lp_bound`: the same, from the relaxed problem alone.
    `multiplier`: loss saved by one more byte. `optimal`: the bound is met but for float rounding.
    """

    choices: tuple[Choice, ...]
    budget_bytes: int
    fixed_bytes: int
    size_bytes: int
    loss: float
    bound: float
    lp_bound: float
    multiplier: float
    optimal: bool

    @property
    def types(self) -> dict[str, str]:
        """Tensor name -> type, sorted by name."""
        return dict(sorted((name, c.type) for c in self.choices for name in c.tensors))

    @property
    def gap(self) -> float:
        """How much larger than the bound the loss is at most, as a share of the bound."""
        return _relative_gap(self.loss, self.bound)

    @property
    def lp_gap(self) -> float:
        return _relative_gap(self.loss, self.lp_bound)

    @property
    def unused_bytes(self) -> int:
        return self.budget_bytes - self.size_bytes

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors, without `fixed_bytes`."""
        return 8 * (self.size_bytes - self.fixed_bytes) / sum(c.n_weights for c in self.choices)

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON; `from_dict` gives the same plan back, floats to the last bit."""
        return {"schema": PLAN_SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` described, also inside of what `pyllamaernie plan` writes.

        Raises: InputError when the schema is another one, a field is missing or unknown, or the sums contradict.
        """
        if isinstance(data, Mapping) and isinstance(data.get("solved"), Mapping):
            data = data["solved"]
        if not isinstance(data, Mapping) or data.get("schema") != PLAN_SCHEMA:
            found = data.get("schema") if isinstance(data, Mapping) else type(data).__name__
            raise InputError(f"plan schema is {found!r}, this version reads {PLAN_SCHEMA}; make the plan again")
        try:
            fields = {key: value for key, value in data.items() if key != "schema"}
            choices = [Choice(**{**c, "tensors": tuple(c["tensors"])}) for c in fields.pop("choices")]
            plan = cls(choices=tuple(choices), **fields)
            size_bytes = plan.fixed_bytes + sum(c.size_bytes for c in choices)
            names = [name for c in choices for name in c.tensors]
            same_loss = math.isclose(math.fsum(c.loss for c in choices), plan.loss, rel_tol=1e-9, abs_tol=1e-300)
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"not a plan of schema {PLAN_SCHEMA}: {error}; make the plan again") from error
        if size_bytes != plan.size_bytes or size_bytes > plan.budget_bytes:
            raise InputError(
                f"the plan's parts are {size_bytes} bytes, but it says {plan.size_bytes} within {plan.budget_bytes}"
            )
        if not same_loss:
            raise InputError(f"the losses of the plan's parts do not add up to its loss of {plan.loss}")
        if len(set(names)) != len(names):
            raise InputError("the plan names a tensor twice")
        return plan

    def recipe(self) -> str:
        """Lines for `llama-quantize --tensor-type-file`, one per quantizable tensor; the base type has to be quantized.

        Raises: InputError for a name that the file's syntax cannot hold.
        Source: llama.cpp `tools/quantize/quantize.cpp`, parse_tensor_type, and `src/llama-quant.cpp` at b11549.
        """
        lines = []
        for name, type_name in sorted((n, c.type) for c in self.choices if c.quantizable for n in c.tensors):
            # that tool splits at white space and at the first =, and makes the pattern (but not the name) lower case
            if name != name.lower() or "=" in name or name.split() != [name]:
                raise InputError(f"{name!r} cannot stand in a recipe: only lower case, no white space and no '='")
            lines.append(f"^{_REGEX_SPECIAL.sub(lambda m: chr(92) + m[0], name)}$={type_name.lower()}\n")
        return "".join(lines)


def disk_bytes(n_rows: int, n_per_row: int, block_size: int, block_bytes: int, *, alignment: int = ALIGNMENT) -> int:
    """Bytes that a tensor takes in a GGUF: whole blocks, then padding up to the alignment, after the last one too.

    Raises: InputError when the blocks do not divide the row.
    """
    if n_per_row % block_size:
        raise InputError(f"a row of {n_per_row} weights is not a multiple of the block of {block_size}")
    return -(-(n_rows * (n_per_row // block_size) * block_bytes) // alignment) * alignment


def solve(
    tensors: Iterable[Tensor],
    budget_bytes: int,
    *,
    fixed_bytes: int = 0,
    ties: Iterable[Iterable[str]] = (),
    rules: Iterable[Rule] = (),
    start: Mapping[str, str] | None = None,
) -> Plan:
    """The plan of least total loss within the budget. The same table, in whatever order, gives the same plan.

    `fixed_bytes` is what the file holds beside the tensors' data. `start`, a known choice of types (`Plan.types`),
    is where the search begins: the plan is never worse than it, if it fits.

    Units: bytes on disk; loss in whatever unit the table has.
    Raises: BudgetError (naming the smallest possible size) when nothing fits; InputError for a table, tie or rule
        that contradicts itself.
    """
    budget_bytes, fixed_bytes = int(budget_bytes), int(fixed_bytes)
    groups = make_groups(tensors, ties, rules)
    sizes = [np.array([c.size_bytes for c in g.candidates], np.int64) for g in groups]
    losses = [np.array([c.loss for c in g.candidates], np.float64) for g in groups]
    smallest = fixed_bytes + sum(int(s[0]) for s in sizes)
    if smallest > budget_bytes:
        raise BudgetError(
            f"the budget of {budget_bytes} bytes is too small: with these tensors, types and rules the smallest file "
            f"is {smallest} bytes ({smallest / 2**30:.3f} GiB); raise the budget to that, allow smaller types, "
            "or prune experts",
            budget_bytes=budget_bytes,
            smallest_bytes=smallest,
        )
    found = knapsack.solve(sizes, losses, budget_bytes - fixed_bytes, _known_picks(groups, start or {}))
    choices = tuple(
        Choice(g.tensors, g.n_weights, c.type, c.size_bytes, c.loss, g.quantizable)
        for g, c in ((g, g.candidates[j]) for g, j in zip(groups, found.picks, strict=True))
    )
    loss = math.fsum(c.loss for c in choices)
    return Plan(
        choices=choices,
        budget_bytes=budget_bytes,
        fixed_bytes=fixed_bytes,
        size_bytes=fixed_bytes + sum(c.size_bytes for c in choices),
        loss=loss,
        bound=loss if found.optimal else min(loss, max(found.bound, found.lp_bound)),
        lp_bound=min(loss, found.lp_bound),
        multiplier=found.multiplier,
        optimal=found.optimal,
    )


def solve_all(tensors: Iterable[Tensor], budgets: Iterable[int], **options: Any) -> list[Plan]:
    """A plan for each budget, smallest budget first; the loss never rises with the budget. Options as for `solve`."""
    tensors = tuple(tensors)
    plans: list[Plan] = []
    for budget_bytes in sorted(set(budgets)):
        if plans:
            options["start"] = plans[-1].types
        plans.append(solve(tensors, budget_bytes, **options))
    return plans


def make_groups(
    tensors: Iterable[Tensor], ties: Iterable[Iterable[str]] = (), rules: Iterable[Rule] = ()
) -> list[Group]:
    """What there is to decide, sorted by name: rules applied, tied tensors merged, useless candidates removed.

    A tied group has the types that all its tensors allow; bytes and losses add. Ties that share a tensor are one tie.
    Raises: InputError naming the tensors for which nothing is left, or the value that is not possible.
    """
    table: dict[str, Tensor] = {}
    for tensor in sorted(tensors, key=lambda t: t.name):
        if tensor.name in table:
            raise InputError(f"tensor {tensor.name} is in the table twice")
        _check_tensor(tensor)
        table[tensor.name] = tensor
    if not table:
        raise InputError("the table has no tensors")
    allowed = {name: {c.type: c for c in tensor.candidates} for name, tensor in table.items()}
    for rule in rules:
        _apply_rule(rule, table, allowed)
    return [_merge([table[n] for n in names], [allowed[n] for n in names]) for names in _tied(table, ties)]


def _check_tensor(tensor: Tensor) -> None:
    types = [c.type for c in tensor.candidates]
    if not types or len(set(types)) != len(types):
        raise InputError(f"tensor {tensor.name}: needs candidates with different types, has {types}")
    if not tensor.quantizable and len(types) != 1:
        raise InputError(f"tensor {tensor.name} is not quantizable, so it needs one candidate, not {types}")
    if tensor.n_weights <= 0:
        raise InputError(f"tensor {tensor.name}: {tensor.n_weights} weights, must be positive")
    for c in tensor.candidates:
        if c.size_bytes <= 0 or c.size_bytes != int(c.size_bytes) or not math.isfinite(c.loss):
            raise InputError(
                f"tensor {tensor.name}, type {c.type}: {c.size_bytes} bytes with loss {c.loss}; "
                "bytes must be a positive integer and the loss finite"
            )


def _apply_rule(rule: Rule, table: Mapping[str, Tensor], allowed: dict[str, dict[str, Candidate]]) -> None:
    if rule.kind not in RULE_KINDS:
        raise InputError(f"rule kind {rule.kind!r}: must be one of {', '.join(RULE_KINDS)}")
    try:
        names = [n for n, t in table.items() if t.quantizable and re.search(rule.pattern, n)]
    except re.error as error:
        raise InputError(f"rule pattern {rule.pattern!r} is not a regular expression: {error}") from error
    if not names:
        raise InputError(f"rule pattern {rule.pattern!r} is found in no quantizable tensor, such as {min(table)}")
    for name in names:
        if rule.kind == "pin":
            keep = [rule.type]
        else:
            limit = _bits(rule.type, table[name], table)
            sign = 1 if rule.kind == "min" else -1
            keep = [t for t in allowed[name] if sign * _bits(t, table[name], table) >= sign * limit]
        left = {t: c for t, c in allowed[name].items() if t in keep}
        if not left:
            raise InputError(
                f"rule {rule.kind} {rule.pattern}={rule.type} leaves nothing for {name}: "
                f"it can have {', '.join(sorted(allowed[name]))}"
            )
        allowed[name] = left


def _bits(type_name: str, tensor: Tensor, table: Mapping[str, Tensor]) -> float:
    """Bits per weight of a type: at this tensor, or else at the largest that can have it."""
    for t in (tensor, *sorted(table.values(), key=lambda t: (-t.n_weights, t.name))):
        for c in t.candidates:
            if c.type == type_name:
                return 8 * c.size_bytes / t.n_weights
    known = sorted({c.type for t in table.values() for c in t.candidates})
    raise InputError(f"type {type_name!r} is a candidate of no tensor; known: {', '.join(known)}")


def _tied(table: Mapping[str, Tensor], ties: Iterable[Iterable[str]]) -> list[list[str]]:
    leader = {name: name for name in table}
    for tie in ties:
        names = sorted(tie)
        if unknown := [n for n in names if n not in table]:
            raise InputError(f"tie of {', '.join(names)}: {', '.join(unknown)} not in the table")
        leaders = {leader[n] for n in names}
        for n in [n for n in leader if leader[n] in leaders]:
            leader[n] = min(leaders)
    members: dict[str, list[str]] = {}
    for n in sorted(leader):
        members.setdefault(leader[n], []).append(n)
    return [members[n] for n in sorted(members)]


def _merge(tensors: Sequence[Tensor], allowed: Sequence[Mapping[str, Candidate]]) -> Group:
    common = set.intersection(*(set(a) for a in allowed))
    if not common:
        parts = "; ".join(f"{t.name}: {', '.join(sorted(a))}" for t, a in zip(tensors, allowed, strict=True))
        raise InputError(f"tied tensors have no type in common ({parts})")
    merged = [
        Candidate(t, sum(int(a[t].size_bytes) for a in allowed), math.fsum(float(a[t].loss) for a in allowed))
        for t in common
    ]
    useful: list[Candidate] = []
    for c in sorted(merged, key=lambda c: (c.size_bytes, c.loss, c.type)):
        if not useful or c.loss < useful[-1].loss:
            useful.append(c)
    names = tuple(t.name for t in tensors)
    return Group(names, sum(int(t.n_weights) for t in tensors), tuple(useful), any(t.quantizable for t in tensors))


def _known_picks(groups: Sequence[Group], types: Mapping[str, str]) -> list[int] | None:
    """Candidate numbers of a known choice, or None when it is not one for these groups."""
    picks = []
    for g in groups:
        numbers = [j for j, c in enumerate(g.candidates) if {c.type} == {types.get(n) for n in g.tensors}]
        if not numbers:
            return None
        picks += numbers
    return picks


def _relative_gap(loss: float, bound: float) -> float:
    if loss <= bound:
        return 0.0
    return (loss - bound) / abs(bound) if bound else math.inf
