"""From a model and a size to a type for every tensor: errors measured, effects probed, a plan solved and measured too.

The loss of a choice is KL of the whole model: error of the tensor (`measure.py`) through a curve that probes give
(`probe.py`). What the solver finds is then run; with few bits, where losses do not add, the curves are corrected at
that point and the best plan that was measured is kept. Stock presets and single types of the same size run too: if one
of them is better, it is the plan, and the plan says so.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllamaernie.errors import InputError, OutOfMemoryError, PyllamaernieError
from pyllamaernie.files import size_text
from pyllamaernie.machine import free_memory_bytes, n_cpu
from pyllamaernie.plan import budget
from pyllamaernie.plan.baselines import known_plans
from pyllamaernie.plan.measure import ErrorTable, is_quantizable, measure
from pyllamaernie.plan.model_plan import Baseline, ModelPlan
from pyllamaernie.plan.table import (
    Curve,
    Item,
    file_bytes,
    fit_curve,
    groups_of,
    header_bytes,
    item_error,
    item_types,
    items_of,
    prior_curves,
    quantizable_names,
    scaled,
    solver_table,
)
from pyllamaernie.quant.importance import Importance, read_importance
from pyllamaernie.quant.native import TYPES
from pyllamaernie.quant.source import ModelSource, Weights, gguf_source

if TYPE_CHECKING:
    from pyllamaernie.plan.probe import Probe

PROBES = ("auto", "none", "groups", "each")
N_OPERATING = 1  # rounds of correcting the curves at the plan itself
OPERATING_BPW = 3.5  # below this many bits the losses of tensors do not add
N_TRIALS = 8  # plans from varied curves that are run as well
SPREAD = 0.25  # of the logarithm of a curve, when it is varied
N_CHUNKS_PROBE = 4
PROBE_TYPES = ("IQ1_M", "Q2_K", "Q3_K", "Q4_0", "Q4_K", "Q5_0", "Q6_K", "Q8_0")  # whose encoders are fast
MEMORY_SHARE = 0.9  # of the free memory may be the model itself
N_KEYS_BYTES = 1024  # what our keys take at most in a file's header
HIGHER = 1.5  # bits between the two probes of a group


def make_plan(
    source: ModelSource | str | os.PathLike[str],
    *,
    size_bytes: int | None = None,
    bpw: float | None = None,
    importance: Importance | str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    pictures: Sequence[tuple[Any, str]] = (),
    **options: Any,
) -> ModelPlan:
    """The best plan for a size: `size_bytes` of the whole file on disk, or `bpw`, bits of all tensors per weight.

    `text` and `pictures`, (picture, question) pairs, are what plans are measured on; without them, or with
    `probe="none"`, losses are judged by what such tensors meant in other models. Options as for `Planner`.
    Raises: InputError, BudgetError (naming the smallest size), QuantizeError, the load errors of `Llama`.
    """
    if (size_bytes is None) == (bpw is None):
        raise InputError(f"give size_bytes or bpw, one of both; got {size_bytes!r} and {bpw!r}")
    with Planner(source, importance=importance, text=text, pictures=pictures, **options) as planner:
        if size_bytes is None:
            assert bpw is not None
            size_bytes = planner.size_of(bpw)
        return planner.plan(size_bytes)


class Planner:
    """Everything about a model that plans for several sizes share: errors, the loaded model, what was probed.

    `probe`: none; groups (a role in a quarter of the depth), each (every tensor alone), auto (groups if there is
    something to run). `rules` pin or limit types, `types` are the only ones that tensors may have. `baselines`: also
    run stock presets and single types. `cache`: a folder that keeps the errors between runs. Progress goes to stderr.
    """

    def __init__(
        self,
        source: ModelSource | str | os.PathLike[str],
        *,
        importance: Importance | str | os.PathLike[str] | None = None,
        text: str | os.PathLike[str] | None = None,
        pictures: Sequence[tuple[Any, str]] = (),
        mmproj: str | os.PathLike[str] | None = "auto",
        probe: str = "auto",
        rules: Sequence[budget.Rule] = (),
        types: Sequence[str] | None = None,
        baselines: bool = True,
        n_trials: int = N_TRIALS,
        n_chunks: int | None = None,
        n_threads: int | None = None,
        seed: int = 0,
        cache: str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> None:
        if probe not in PROBES:
            raise InputError(f"probe {probe!r}: must be one of {', '.join(PROBES)}")
        if probe in ("groups", "each") and text is None and not pictures:
            raise InputError(f"probe {probe!r} runs the model: give a text, pictures, or both")
        self.source = source if isinstance(source, ModelSource) else gguf_source(source)
        if isinstance(importance, (str, os.PathLike)):
            importance = read_importance(importance)
        self.importance: Importance | None = importance
        self.rules, self.baselines, self.n_trials, self.seed = tuple(rules), baselines, n_trials, seed
        self.n_params = sum(math.prod(w.shape) for w in self.source.weights)
        self._close: list[str] = []
        self.runs: list[tuple[float, float]] = []  # see ModelPlan
        self._known: dict[str, dict[str, str]] | None = None
        self._bar = _Bar(progress)
        self.header = header_bytes(self.source, self.importance, {})  # also notices a foreign importance matrix
        self.n_threads = n_threads or n_cpu()
        with self._bar.stage("errors of types", len(quantizable_names(self.source))) as step:
            self.errors: ErrorTable = measure(
                self.source,
                self.importance,
                types=types,
                seed=seed,
                n_threads=self.n_threads,
                cache=cache,
                on_tensor=lambda done, total: step(),
            )
        self.items = items_of(quantizable_names(self.source))
        self.groups = groups_of(self.items, each=probe == "each")
        self._probed: dict[tuple[str, tuple[str, ...]], float] = {}
        self._standing: list[str] = []
        self.probe: Probe | None = None
        if probe != "none" and (text is not None or pictures) and self._fits_memory(probe):
            self.probe = self._opened(text, pictures, mmproj, n_chunks)

    def _opened(
        self,
        text: str | os.PathLike[str] | None,
        pictures: Sequence[tuple[Any, str]],
        mmproj: str | os.PathLike[str] | None,
        n_chunks: int | None,
    ) -> Probe:
        from pyllamaernie.plan.probe import N_CHUNKS, Probe

        return Probe(
            self.source,
            self.importance,
            text,
            pictures=pictures,
            mmproj=mmproj,
            n_chunks=n_chunks or N_CHUNKS,
            n_threads=self.n_threads,
            errors=self.errors,
        )

    def _fits_memory(self, probe: str) -> bool:
        """Whether the model can be run. Raises: OutOfMemoryError where that was asked for by name."""
        n_bytes, free = sum(w.n_bytes for w in self.source.weights), free_memory_bytes()
        if n_bytes <= MEMORY_SHARE * free:
            return True
        too_large = f"the model takes {size_text(n_bytes)} of memory and {size_text(free)} are free"
        if probe != "auto":
            raise OutOfMemoryError(f"{too_large}: it cannot be run for probes; use --probe none")
        self._standing.append(f"{too_large}, so it was not run")
        return False

    def close(self) -> None:
        if self.probe is not None:
            self.probe.close()

    def __enter__(self) -> Planner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def size_of(self, bpw: float) -> int:
        """Bytes of a file whose tensors have so many bits per weight."""
        if not bpw > 0:
            raise InputError(f"bpw is a positive number, got {bpw}")
        return self.header + int(bpw * self.n_params / 8)

    def solve(self, curves: Mapping[str, Curve], size_bytes: int) -> budget.Plan:
        """The best choice for a size by these curves; nothing is run. Raises: BudgetError, InputError."""
        return self._solve(curves, size_bytes, self.header)

    def size_with(self, types: Mapping[str, str]) -> int:
        """Bytes of the file with these types; what has none keeps its own."""
        return self.header + sum(_stored(w, types.get(w.name, w.type)) for w in self.source.weights)

    def plan(self, size_bytes: int) -> ModelPlan:
        """The best plan for a file of at most this size. Raises: BudgetError, InputError."""
        header = self.header
        self._close, self.runs = [], []
        bits = 8 * (size_bytes - header) / self.n_params
        curves = self._curves(bits)
        solved = self._solve(curves, size_bytes, header)
        predicted = solved.loss if self.probe is not None else None
        found: list[Baseline] = []
        source, measured = "solved", None
        if self.probe is not None:
            measured, curves, solved = self._measured(curves, solved, size_bytes, header, bits)
        if self.baselines and measured is not None:
            found, better = self._baselines(size_bytes, measured)
            if better is not None:
                source, types, measured = better
                solved = self._fixed(types, size_bytes, header)
        types = solved.types
        n_bytes = file_bytes(self.source, self.importance, types)
        if n_bytes > size_bytes:
            raise PyllamaernieError(f"the plan needs {n_bytes} bytes, more than {size_bytes}: a fault of the planner")
        return ModelPlan(
            model=self.source.path.name,
            fingerprint=self.source.fingerprint,
            importance=None if self.importance is None else self.importance.digest(),
            budget_bytes=size_bytes,
            size_bytes=n_bytes,
            n_params=self.n_params,
            source=source,
            types=types,
            kl_predicted=predicted,
            kl_measured=measured,
            baselines=tuple(found),
            curves=curves,
            notes=tuple(self._notes(source)),
            solved=solved,
            runs=tuple(self.runs),
        )

    def _solve(self, curves: Mapping[str, Curve], size_bytes: int, header: int) -> budget.Plan:
        table = solver_table(self.source, self.errors, self.groups, curves)
        ties = [item.names for item in self.items if len(item.names) > 1]
        return budget.solve(table, size_bytes, fixed_bytes=header, ties=ties, rules=self.rules)

    def _fixed(self, types: Mapping[str, str], size_bytes: int, header: int) -> budget.Plan:
        """A known choice of types in the form of a solved plan."""
        rows = []
        for w in self.source.weights:
            t = types.get(w.name, w.type)
            candidate = budget.Candidate(t, _stored(w, t), 0.0)
            rows.append(budget.Tensor(w.name, math.prod(w.shape), (candidate,), is_quantizable(w)))
        return budget.solve(rows, size_bytes, fixed_bytes=header)

    def _curves(self, bits: float) -> dict[str, Curve]:
        """The curve of every group, from two probes with errors like those of types of about so many bits."""
        if self.probe is None:
            return prior_curves(self.groups)
        curves = {}
        with self._bar.stage("probes", 2 * len(self.groups)) as step:
            for label, items in self.groups.items():
                points = []
                for target in (bits, bits + HIGHER):
                    chosen = [self._probe_type(item, target) for item in items]
                    key = (label, tuple(chosen))
                    if key not in self._probed:
                        types = {n: t for item, t in zip(items, chosen, strict=True) for n in item.names}
                        self.probe.restore()
                        self.probe.set_types(types)
                        self._probed[key] = self.probe.kl(N_CHUNKS_PROBE)
                    errors = [item_error(i, self.errors, t) for i, t in zip(items, chosen, strict=True)]
                    points.append((self._probed[key], errors))
                    step()
                curves[label] = fit_curve(points)
        self.probe.restore()
        return curves

    def _probe_type(self, item: Item, bits: float) -> str:
        """A type with a fast encoder and about the error of the item's best type of at most so many bits."""
        names = item_types(item, self.errors)
        usual = [t for t in names if TYPES[t].bpw <= bits] or [min(names, key=lambda t: (TYPES[t].bpw, t))]
        target = math.log(max(min(item_error(item, self.errors, t) for t in usual), 1e-12))
        fast = [t for t in names if t in PROBE_TYPES] or names
        return min(fast, key=lambda t: (abs(math.log(max(item_error(item, self.errors, t), 1e-12)) - target), t))

    def _measured(
        self, curves: dict[str, Curve], solved: budget.Plan, size_bytes: int, header: int, bits: float
    ) -> tuple[float, dict[str, Curve], budget.Plan]:
        """The best of the plans that were run: the first, those of corrected curves, those of varied ones."""
        assert self.probe is not None
        n_rounds = N_OPERATING if bits < OPERATING_BPW else 1
        rng = np.random.default_rng(self.seed)
        best = (self._run(solved.types), curves, solved)
        self.runs.append((solved.loss, best[0]))
        seen = {tuple(solved.types.items())}
        with self._bar.stage("plans", n_rounds + self.n_trials) as step:
            for turn in range(n_rounds + self.n_trials):
                if turn < n_rounds:
                    curves = self._corrected(curves, solved.types)
                else:
                    curves = scaled(best[1], self._variation(rng))
                solved = self._solve(curves, size_bytes, header)
                if tuple(solved.types.items()) not in seen:
                    seen.add(tuple(solved.types.items()))
                    found = (self._run(solved.types), curves, solved)
                    self.runs.append((solved.loss, found[0]))
                    best = min(best, found, key=lambda x: x[0])
                step()
        return best

    def _variation(self, rng: np.random.Generator) -> dict[str, float]:
        """Factors for curves: one for each role, one for each bin of depth, a small one for each group."""
        roles = {items[0].role: 0.0 for items in self.groups.values()}
        roles = {role: rng.normal(0, SPREAD) for role in sorted(roles)}
        slope = rng.normal(0, SPREAD)
        n_layer = 1 + max((i.layer for i in self.items if i.layer is not None), default=0)
        out = {}
        for label, items in sorted(self.groups.items()):
            depth = 0.0 if items[0].layer is None else 2 * items[0].layer / n_layer - 1
            out[label] = math.exp(roles[items[0].role] + slope * depth + rng.normal(0, SPREAD / 2))
        return out

    def _run(self, types: Mapping[str, str], n_chunks: int | None = None) -> float:
        assert self.probe is not None
        names = {w.name for w in self.source.weights if is_quantizable(w)}
        self.probe.set_types({name: t for name, t in types.items() if name in names})
        return self.probe.kl(n_chunks)

    def _corrected(self, curves: Mapping[str, Curve], types: Mapping[str, str]) -> dict[str, Curve]:
        """Curves moved towards what exact weights for one group save inside of the plan."""
        assert self.probe is not None
        whole = self._run(types, N_CHUNKS_PROBE)
        factors = {}
        for label, items in self.groups.items():
            names = [name for item in items for name in item.names]
            expected = sum(curves[label].loss(item_error(i, self.errors, types[i.names[0]])) for i in items)
            self.probe.restore(names)
            saved = whole - self.probe.kl(N_CHUNKS_PROBE)
            self.probe.set_types({name: types[name] for name in names})
            if expected > 0:
                factors[label] = min(max(saved / expected, 0.1), 10.0) ** 0.7
        return scaled(curves, factors)

    def _baselines(
        self, size_bytes: int, measured: float
    ) -> tuple[list[Baseline], tuple[str, dict[str, str], float] | None]:
        """The two largest known plans of each kind that fit, and the best if it beats the plan.

        The preset one size up is run as well, for the report.
        """
        known = [(self.size_with(types), name, types) for name, types in self.known_plans().items()]
        known.sort(key=lambda row: (-row[0], row[1]))
        kept = []
        for kind in ("stock", "all", "experts"):
            rows = [row for row in known if row[1].startswith(kind)]
            n_larger = sum(row[0] > size_bytes for row in rows)
            kept += rows[max(n_larger - (kind == "stock"), 0) : n_larger + 2]
        found, better = [], None
        with self._bar.stage("stock presets", len(kept)) as step:
            for n_bytes, name, types in kept:
                kl = self._run(types)
                found.append(Baseline(name, n_bytes, kl))
                if n_bytes <= size_bytes and kl < (better[2] if better else measured):
                    better = (name, types, kl)
                step()
        for b in found:
            # llama-quantize writes fewer keys than we do, so a preset's own size may be too small for its own types
            if size_bytes < b.size_bytes <= size_bytes + N_KEYS_BYTES and b.kl < measured:
                self._close.append(f"{b.name} would be better and takes {b.size_bytes - size_bytes} bytes more")
        return found, better

    def known_plans(self) -> dict[str, dict[str, str]]:
        """Types by name that anybody could choose; none where rules limit the types."""
        if self._known is None:
            allowed = not self.rules
            self._known = known_plans(self.source, self.importance, self.errors, self.items) if allowed else {}
        return self._known

    def _notes(self, source: str) -> list[str]:
        notes = [*self._standing, *self._close]
        if source != "solved":
            notes.append(f"{source} was better than every plan that was solved and is used instead")
        if self.probe is None:
            notes.append("nothing was run: losses are guessed from another model; give a text to measure them")
        elif self.runs and not 0.5 <= self.runs[0][1] / self.runs[0][0] <= 2:
            notes.append("losses do not add at this size: trust the measured KL, not those expected of other sizes")
        if self.importance is None:
            notes.append("no importance matrix: every column counts alike, and types below three bits are left out")
        return notes


def _stored(weights: Weights, type_name: str) -> int:
    """Bytes of a tensor in the file, with its padding."""
    n = weights.n_bytes if type_name == weights.type else TYPES[type_name].row_bytes(weights.n_cols) * weights.n_rows
    return -(-n // budget.ALIGNMENT) * budget.ALIGNMENT


class _Bar:
    """Progress bars on stderr, one for each stage."""

    def __init__(self, show: bool) -> None:
        self.show = show

    @contextmanager
    def stage(self, text: str, total: int) -> Iterator[Callable[[], None]]:
        from tqdm import tqdm

        with tqdm(total=total, desc=text, disable=not self.show, file=sys.stderr) as bar:

            def step() -> None:
                bar.update()

            yield step
