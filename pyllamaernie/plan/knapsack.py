"""The multiple-choice knapsack: for each item one of its candidates, so that the sizes fit and the losses sum to least.

Lagrangian bound from the convex hulls, then a search through the core around it on exact sizes. Numbers only: what an
item is, `budget.py` knows. The bound and the pruning follow from duality; the order of the search follows D. Pisinger,
"A minimal algorithm for the multiple-choice knapsack problem", European Journal of Operational Research 83 (1995).

Item i has sizes[i], whole numbers that ascend, and losses[i], which descend; a solution is one number per item.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# states kept at each step in the first rounds of the search; it ends with the first that proves its best
_N_STATES = (500, 5000)
_N_EXPANDED_MAX = 5_000_000  # states made in a round, which bounds the time (seconds), and how many the last one keeps
_NOISE = 1e-13  # of the total loss: differences below it are float rounding


@dataclass(frozen=True)
class Solution:
    """The candidate of each item. `bound`: no solution has a smaller loss; `lp_bound`: the relaxed problem alone.

    `multiplier`: loss saved by one more unit of size. `optimal`: proven to be the best, but for float rounding.
    """

    picks: list[int]
    bound: float
    lp_bound: float
    multiplier: float
    optimal: bool


def solve(sizes: list[np.ndarray], losses: list[np.ndarray], budget: int, known: list[int] | None = None) -> Solution:
    """The best picks within the budget, which the smallest candidates must fit.

    The search begins at the better of its own first guess and `known`, if that fits, and never ends at worse.
    Shapes: sizes[i] (n_candidates,) int64, losses[i] (n_candidates,) float64.
    """
    relaxed = _relax(sizes, losses, budget)
    picks = [_fill(relaxed.picks, sizes, losses, budget)]
    if known is not None and sum(int(s[j]) for s, j in zip(sizes, known, strict=True)) <= budget:
        picks.append(known)
    best = min(picks, key=lambda p: _total(losses, p))
    bound, optimal = relaxed.bound, False
    n_moves = sum(len(s) for s in sizes)
    for n_states in (*_N_STATES, math.inf):
        best, bound, optimal = _search(relaxed, sizes, losses, best, int(min(n_states, _N_EXPANDED_MAX // n_moves)))
        if optimal:
            break
    return Solution(best, bound, relaxed.bound, relaxed.multiplier, optimal)


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
