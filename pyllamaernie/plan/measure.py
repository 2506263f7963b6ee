"""What each type does to each tensor: error of the real quantizers on sampled rows, weighted as the inputs use them.

The error of a tensor in a type is the squared error of its output over the squared output, expected over the
calibration data: columns count by their mean squared input, experts by the tokens that reach them. Nothing is inferred
from a type's name or bits. `probe.py` says what such an error does to the model; `planner.py` puts both together.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pyllamaernie.errors import InputError
from pyllamaernie.files import write_text
from pyllamaernie.quant import native
from pyllamaernie.quant.importance import Importance
from pyllamaernie.quant.source import ModelSource, Weights

N_ROWS = 512  # sampled from a tensor at first
N_ROWS_SLICE = 4  # at least, of each expert
STANDARD_ERROR = 0.03  # sampling doubles until the error is known to this share of it
# Encoders of microseconds a weight, sampled on SLOW times fewer rows at first. Candidates only when asked for: probes
# imitate them, and the KL of a real file was 1.9 times that of imitated weights of the same error (docs/quantize.md).
SLOW_TYPES = frozenset({"CCQ2", "CCQ2_25", "CCQ2_5", "CCQ2_75"})
SLOW = 8

# Not candidates unless asked for: on trained weights another type is smaller and better (bench/ccq_error.py, docs).
DOMINATED = frozenset({"Q1_0", "Q2_0", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "CCQ2_B", "Q8_1", "Q8_K"})

# Upstream's rule for what is quantized at all, as far as it says something about names.
# Source: `tensor_allows_quantization` in llama.cpp src/llama-quant.cpp at the pin.
_KEPT = ("_norm.weight", "ffn_gate_inp", "ssm_conv1d", "position_embd", "token_types", "patch_embd", "rel_pos")


@dataclass(frozen=True)
class Sampled:
    """Error of one tensor in one type: `error` relative (0 exact, 1 as bad as zeros), its standard error, rows seen."""

    error: float
    standard_error: float
    n_rows: int


def is_quantizable(weights: Weights) -> bool:
    """Whether llama-quantize would quantize a tensor of this name and shape."""
    name = weights.name
    return name.endswith("weight") and len(weights.shape) > 1 and not any(part in name for part in _KEPT)


def candidate_types(weights: Weights, importance: Importance | None, allowed: Sequence[str] | None = None) -> list[str]:
    """Types that a tensor can have, fewest bits first, without a fallback: blocks divide the row.

    Types that need importance data are left out where there are none for this tensor.
    Raises: InputError for a type that does not exist.
    """
    if allowed is None:
        names = [name for name in native.TYPES if name not in DOMINATED | SLOW_TYPES and name != "F32"]
    else:
        names = [native.ggml_type(name).name for name in allowed]
    informed = importance is not None and weights.name in importance.columns
    found = [
        native.TYPES[name]
        for name in names
        if native.TYPES[name].fits(weights.n_cols)
        and (informed or not (native.TYPES[name].needs_importance or name in native.WANT_IMPORTANCE))
        and native.TYPES[name].bpw <= native.TYPES[weights.type].bpw
    ]
    return [row.name for row in sorted(found, key=lambda row: (row.bpw, row.name))]


def sample_tensor(
    weights: Weights,
    types: Iterable[str],
    columns: np.ndarray | None,
    shares: np.ndarray | None,
    *,
    seed: int = 0,
    n_rows: int = N_ROWS,
    n_rows_max: int | None = None,
) -> dict[str, Sampled]:
    """Error of every type on the same rows of a tensor, twice as many until all are known well enough.

    Types with a slow encoder start with fewer rows and end where the others start, known well or not.

    Shapes: columns (n_matrices, n_cols), shares (n_matrices,), how much each matrix counts.
    """
    shares = np.ones(weights.n_matrices) if shares is None else np.asarray(shares, np.float64)
    if not shares.sum() > 0:
        shares = np.ones(weights.n_matrices)
    types = list(types)
    if (slow := [t for t in types if t in SLOW_TYPES]) and len(slow) < len(types):
        quick = [t for t in types if t not in SLOW_TYPES]
        found = sample_tensor(weights, quick, columns, shares, seed=seed, n_rows=n_rows)
        few = max(n_rows // SLOW, 1)
        found |= sample_tensor(weights, slow, columns, shares, seed=seed, n_rows=few, n_rows_max=n_rows)
        return {name: found[name] for name in types}
    done: dict[str, Sampled] = {}
    while True:
        rows = _sample(weights, shares, n_rows, seed)
        whole = all(len(numbers) == weights.rows_per_matrix for numbers in rows.values())
        whole = whole or (n_rows_max is not None and n_rows >= n_rows_max)
        values = _load(weights, rows)
        for name in types:
            if name not in done:
                one = _error(name, weights, values, columns, shares)
                if whole or one.standard_error <= STANDARD_ERROR * one.error:
                    done[name] = one
        if len(done) == len(types) or whole:
            return {name: done[name] for name in types}
        n_rows *= 2


def _sample(weights: Weights, shares: np.ndarray, n_rows: int, seed: int) -> dict[int, np.ndarray]:
    """Rows of each matrix by a stride from a seeded start, in proportion to its share; matrices with none are out."""
    n_per = weights.rows_per_matrix
    rng = np.random.default_rng([seed, zlib.crc32(weights.name.encode())])
    starts = rng.random(weights.n_matrices)
    out = {}
    for i, share in enumerate(shares / shares.sum()):
        n = min(n_per, max(N_ROWS_SLICE, math.ceil(share * n_rows)))
        if share > 0:
            out[i] = np.unique(((np.arange(n) + starts[i]) * n_per / n).astype(np.int64))
    return out


def _load(weights: Weights, rows: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """The sampled rows as float32, by matrix."""
    n_per = weights.rows_per_matrix
    wanted = np.concatenate([i * n_per + numbers for i, numbers in rows.items()])
    found = []
    for piece in weights.pieces():
        a, b = np.searchsorted(wanted, [piece.first_row, piece.first_row + piece.n_rows])
        if a < b:
            data = piece.load()[wanted[a:b] - piece.first_row]
            found.append(native.dequantize(weights.type, np.ascontiguousarray(data), weights.n_cols))
    values = np.concatenate(found)
    ends = np.cumsum([len(numbers) for numbers in rows.values()])
    return dict(zip(rows, np.split(values, ends[:-1]), strict=True))


def _error(
    name: str, weights: Weights, values: Mapping[int, np.ndarray], columns: np.ndarray | None, shares: np.ndarray
) -> Sampled:
    """A ratio of sums over matrices and rows, with the standard error of sampled ratios."""
    lost, whole, weight = [], [], []
    for i, x in values.items():
        m = np.ones(weights.n_cols, np.float32) if columns is None else columns[i]
        data = native.quantize(name, x, m if columns is not None and native.TYPES[name].is_quantized else None)
        d = native.dequantize(name, data, weights.n_cols) - x
        lost.append((d * d) @ m.astype(np.float64))
        whole.append((x * x) @ m.astype(np.float64))
        weight.append(np.full(len(x), shares[i] * weights.rows_per_matrix / len(x)))
    a, b, w = (np.concatenate(parts) for parts in (lost, whole, weight))
    total = float((w * b).sum())
    if not total > 0:
        return Sampled(0.0, 0.0, len(a))
    error = float((w * a).sum()) / total
    spread = float(np.sqrt((w * w * (a - error * b) ** 2).sum())) / total
    return Sampled(error, spread, len(a))


@dataclass(frozen=True)
class ErrorTable:
    """Errors by tensor and type, and `key`, which changes with everything that they were measured on."""

    key: str
    errors: Mapping[str, Mapping[str, Sampled]]

    def to_json(self) -> str:
        errors = {name: {t: asdict(s) for t, s in row.items()} for name, row in self.errors.items()}
        return json.dumps({"key": self.key, "errors": errors})

    @classmethod
    def from_json(cls, text: str) -> ErrorTable:
        data = json.loads(text)
        return cls(data["key"], {n: {t: Sampled(**s) for t, s in row.items()} for n, row in data["errors"].items()})


def measure(
    source: ModelSource,
    importance: Importance | None = None,
    *,
    types: Sequence[str] | None = None,
    n_rows: int = N_ROWS,
    seed: int = 0,
    n_threads: int = 1,
    cache: str | os.PathLike[str] | None = None,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> ErrorTable:
    """Errors of all quantizable tensors in all types they can have. `cache` is a folder that keeps the table.

    Raises: InputError for a source that is quantized already, an unknown type, an importance matrix of another model;
        QuantizeError for weights that are not finite.
    """
    chosen = [w for w in source.weights if is_quantizable(w)]
    if quantized := next((w for w in chosen if native.TYPES[w.type].is_quantized), None):
        raise InputError(
            f"{source.path}: {quantized.name} is {quantized.type} already; plan from the model in F32, F16 or BF16"
        )
    if importance is not None:
        _check_importance(importance, chosen)
    jobs = [(w, candidate_types(w, importance, types)) for w in chosen]
    about = [source.fingerprint, importance.digest() if importance else "", n_rows, seed, [t for _, t in jobs]]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    path = None if cache is None else Path(cache) / f"errors-{key}.json"
    if path is not None and path.is_file():
        return ErrorTable.from_json(path.read_text(encoding="utf-8"))
    counts = itertools.count(1)

    def one(job: tuple[Weights, list[str]]) -> dict[str, Sampled]:
        weights, names = job
        columns = None if importance is None else importance.columns.get(weights.name)
        if columns is not None:
            columns = columns.reshape(weights.n_matrices, weights.n_cols)
        found = sample_tensor(weights, names, columns, expert_shares(weights, importance), seed=seed, n_rows=n_rows)
        on_tensor(next(counts), len(jobs))
        return found

    with ThreadPoolExecutor(n_threads) as pool:
        found = list(pool.map(one, jobs))
    table = ErrorTable(key, {w.name: row for (w, _), row in zip(jobs, found, strict=True)})
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, table.to_json())
    return table


def _check_importance(importance: Importance, chosen: Sequence[Weights]) -> None:
    for w in chosen:
        n = importance.columns[w.name].size if w.name in importance.columns else w.n_matrices * w.n_cols
        if n != w.n_matrices * w.n_cols:
            raise InputError(
                f"{importance.path}: {w.name} has importance of {n} columns, the model has {w.n_matrices} x "
                f"{w.n_cols}; it was made with another model"
            )


def expert_shares(weights: Weights, importance: Importance | None) -> np.ndarray | None:
    """How much each expert counts: by the tokens that reached it. None for one matrix or without counts."""
    counts = None if importance is None else importance.counts.get(weights.name)
    if weights.n_matrices == 1 or counts is None or len(counts) != weights.n_matrices:
        return None
    return counts.astype(np.float64)
