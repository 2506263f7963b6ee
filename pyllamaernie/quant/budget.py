"""Pure solver: what each quantization type costs each tensor, and a byte budget -> one type per tensor.

A multiple-choice knapsack over whole tensors and their true sizes: Lagrangian bound from the convex hulls, then a
search through the core around it on exact byte counts. It measures nothing, reads and writes no file, and knows no type
by name. The bound and the pruning follow from duality; the order of the search follows D. Pisinger, "A minimal
algorithm for the multiple-choice knapsack problem", European Journal of Operational Research 83 (1995).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pyllamaernie.errors import BudgetError, InputError

ALIGNMENT = 32  # of tensor data in a GGUF without the key general.alignment
PLAN_SCHEMA = 1
RULE_KINDS = ("pin", "min", "max")

_N_STATES = (
    500,
    5000,
)  # kept at each step in the first rounds of the search; it ends with the first that proves its best
_N_EXPANDED_MAX = 5_000_000  # states made in a round, which bounds the time (seconds), and how many the last one keeps
_NOISE = 1e-13  # of the total loss: differences below it are float rounding
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
    relaxed = _relax(sizes, losses, budget_bytes - fixed_bytes)
    picks = [_fill(relaxed.picks, sizes, losses, budget_bytes - fixed_bytes)]
    if (known := _known_picks(groups, start or {})) is not None:
        if sum(int(s[j]) for s, j in zip(sizes, known, strict=True)) <= budget_bytes - fixed_bytes:
            picks.append(known)
    best = min(picks, key=lambda p: _total(losses, p))
    bound = relaxed.bound
    n_moves = sum(len(s) for s in sizes)
    for n_states in (*_N_STATES, math.inf):
        best, bound, optimal = _search(relaxed, sizes, losses, best, int(min(n_states, _N_EXPANDED_MAX // n_moves)))
        if optimal:
            break
    choices = tuple(
        Choice(g.tensors, g.n_weights, c.type, c.size_bytes, c.loss, g.quantizable)
        for g, c in ((g, g.candidates[j]) for g, j in zip(groups, best, strict=True))
    )
    loss = math.fsum(c.loss for c in choices)
    return Plan(
        choices=choices,
        budget_bytes=budget_bytes,
        fixed_bytes=fixed_bytes,
        size_bytes=fixed_bytes + sum(c.size_bytes for c in choices),
        loss=loss,
        bound=loss if optimal else min(loss, max(bound, relaxed.bound)),
        lp_bound=min(loss, relaxed.bound),
        multiplier=relaxed.multiplier,
        optimal=optimal,
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


# from tensors, ties and rules to groups


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


# the solver: item i has sizes[i] ascending and losses[i] descending; a solution is one number per item


@dataclass(frozen=True)
class _Relaxed:
    """The relaxed problem's solution without its one fractional step: `picks`, `slack` bytes left, `bound`.

    `excess[i][j]` >= 0 is what picking j costs beyond the item's best at the price `multiplier` per byte.
    """

    picks: list[int]
    slack: int
    bound: float
    multiplier: float
    excess: list[np.ndarray]


def _relax(sizes: list[np.ndarray], losses: list[np.ndarray], budget: int) -> _Relaxed:
    steps = []  # along the lower convex hulls: (-loss saved per byte, item, step, to, bytes)
    for i, (size, loss) in enumerate(zip(sizes, losses, strict=True)):
        hull = [0]
        for j in range(1, len(size)):
            while len(hull) > 1 and _slope(size, loss, hull[-2], hull[-1]) >= _slope(size, loss, hull[-1], j):
                hull.pop()
            hull.append(j)
        for n, (a, b) in enumerate(itertools.pairwise(hull)):
            steps.append((_slope(size, loss, a, b), i, n, b, int(size[b] - size[a])))
    steps.sort()
    picks, slack, multiplier = [0] * len(sizes), budget - sum(int(s[0]) for s in sizes), 0.0
    for slope, i, _, j, n_bytes in steps:
        if n_bytes > slack:
            multiplier = -slope
            break
        picks[i], slack = j, slack - n_bytes
    excess = [
        np.maximum((loss - loss[j]) + multiplier * (size - size[j]), 0.0)
        for size, loss, j in zip(sizes, losses, picks, strict=True)
    ]
    return _Relaxed(picks, slack, _total(losses, picks) - multiplier * slack, multiplier, excess)


def _slope(size: np.ndarray, loss: np.ndarray, a: int, b: int) -> float:
    return float(loss[b] - loss[a]) / int(size[b] - size[a])


def _total(losses: list[np.ndarray], picks: Sequence[int]) -> float:
    return math.fsum(float(loss[j]) for loss, j in zip(losses, picks, strict=True))


def _fill(picks: Sequence[int], sizes: list[np.ndarray], losses: list[np.ndarray], budget: int) -> list[int]:
    """Picks with the best single change made while one fits and helps."""
    picks = list(picks)
    item = np.repeat(np.arange(len(sizes)), [len(s) for s in sizes])
    number = np.concatenate([np.arange(len(s)) for s in sizes])
    size, loss = np.concatenate(sizes), np.concatenate(losses)
    while True:
        at_size = np.array([s[j] for s, j in zip(sizes, picks, strict=True)])
        at_loss = np.array([v[j] for v, j in zip(losses, picks, strict=True)])
        gain = np.where(size - at_size[item] <= budget - at_size.sum(), at_loss[item] - loss, 0.0)
        best = int(np.argmax(gain))
        if gain[best] <= 0.0:
            return picks
        picks[item[best]] = int(number[best])


def _search(
    relaxed: _Relaxed, sizes: list[np.ndarray], losses: list[np.ndarray], known: list[int], n_states_max: int
) -> tuple[list[int], float, bool]:
    """The best picks found from `known` on, a lower bound, and whether they are proven best.

    States are partial deviations from the relaxed picks: (bytes left, excess). A state's full cost over the relaxed
    bound is its excess + multiplier x bytes left; those that cannot beat the best are dropped, exactly. Beyond
    `n_states_max` those with the largest bound go as well, and the smallest bound among them limits what is proven.
    """
    price = relaxed.multiplier
    noise = _NOISE * math.fsum(abs(float(loss[j])) for loss, j in zip(losses, relaxed.picks, strict=True))
    base = relaxed.picks
    moves = {i: (size - size[base[i]], relaxed.excess[i]) for i, size in enumerate(sizes) if len(size) > 1}
    rate_up = {i: _rate(d, e, d > 0) for i, (d, e) in moves.items()}
    rate_down = {i: _rate(-d, e, d < 0) for i, (d, e) in moves.items()}
    order = sorted(moves, key=lambda i: (min(rate_up[i], rate_down[i]), i))
    up, down = _suffix_min([rate_up[i] for i in order]), _suffix_min([rate_down[i] for i in order])

    best_value = max(_total(losses, known) - relaxed.bound, 0.0)
    best_at: tuple[int, int] | None = None
    lost = math.inf
    left, excess = np.array([relaxed.slack], np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for n, i in enumerate(order):
        change, extra = moves[i]
        use = np.flatnonzero(extra <= best_value)
        left = (left[:, None] - change[use]).ravel()
        excess = (excess[:, None] + extra[use]).ravel()
        # nothing that follows makes good a byte over the budget, or fills one below it, cheaper than at these rates
        bound = excess + np.where(left >= 0, left * min(price, up[n + 1]), 0.0)
        over = left < 0
        bound[over] += -left[over] * down[n + 1]
        keep = np.flatnonzero(bound < best_value - noise)
        keep = keep[_undominated(left[keep], excess[keep] + price * left[keep])]
        if len(keep) > n_states_max:
            keep = keep[np.argsort(bound[keep], kind="stable")]
            lost = min(lost, float(bound[keep[n_states_max]]))
            keep = keep[:n_states_max]
        left, excess = left[keep], excess[keep]
        trail.append(((keep // len(use)).astype(np.int32), use[keep % len(use)].astype(np.int16)))
        value = np.where(left >= 0, excess + price * left, math.inf)
        if len(value) and value.min() < best_value - noise:
            best_at = (n, int(np.argmin(value)))
            best_value = float(value.min())
        if not len(keep):
            break
    picks = list(known) if best_at is None else list(base)
    if best_at is not None:
        n, state = best_at
        for m in range(n, -1, -1):
            parent, number = trail[m]
            picks[order[m]], state = int(number[state]), int(parent[state])
    return picks, relaxed.bound + min(lost, best_value), lost >= best_value - noise


def _rate(n_bytes: np.ndarray, excess: np.ndarray, mask: np.ndarray) -> float:
    return float((excess[mask] / n_bytes[mask]).min()) if mask.any() else math.inf


def _suffix_min(values: Sequence[float]) -> list[float]:
    """Entry n is the least of values[n:]; there is one entry more than values, infinity."""
    out = [math.inf]
    for value in reversed(values):
        out.append(min(value, out[-1]))
    return out[::-1]


def _undominated(left: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Numbers of the states for which no other leaves as many bytes and has no larger loss."""
    order = np.lexsort((value, -left))
    least = np.minimum.accumulate(value[order])
    first = np.ones(len(order), bool)
    first[1:] = value[order][1:] < least[:-1]
    return order[first]


def _relative_gap(loss: float, bound: float) -> float:
    if loss <= bound:
        return 0.0
    return (loss - bound) / abs(bound) if bound else math.inf
