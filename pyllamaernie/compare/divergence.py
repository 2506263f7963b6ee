"""How far the next-token distributions of one model are from those of another: rows of logits in, figures out.

Softmax and sums in float64 from float32 logits, every row kept, so that a model against itself gives exactly 0 and
differences far below Q8_0 still show. Upstream's llama-perplexity stores the reference in 16 bits and loses those.
Source of the formulas: llama.cpp tools/perplexity/perplexity.cpp at the pin (rows, quantiles, error of a perplexity).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

N_RESAMPLES = 4000
N_CHUNKS_MIN = 8  # resampling fewer chunks than this gives intervals that are far too narrow
BLOCK_VALUES = 4_000_000  # logits turned to float64 at once: 32 MB


@dataclass(frozen=True)
class Divergence:
    """KL of a model to the reference over rows, in nats, and how often both name the same likeliest token.

    `interval`: 95 % interval of the mean, by resampling whole chunks; None below N_CHUNKS_MIN of them.
    `chunk_sums`, `chunk_rows`: of each chunk or picture, for intervals of other figures.
    """

    mean: float
    interval: tuple[float, float] | None
    median: float
    p99: float
    p999: float
    max: float
    same_top: float
    n_rows: int
    chunk_sums: tuple[float, ...]
    chunk_rows: tuple[int, ...]


@dataclass
class Rows:
    """Gathers rows of one model against the reference, chunk by chunk."""

    kl: list[np.ndarray] = field(default_factory=list)
    same_top: list[np.ndarray] = field(default_factory=list)
    nll: list[np.ndarray] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)

    def add(self, chunk: int, kl: np.ndarray, same_top: np.ndarray) -> None:
        """Rows of the chunk with this number; a chunk may come in pieces."""
        self.kl.append(kl)
        self.same_top.append(same_top)
        self.chunks.append(chunk)

    def divergence(self, seed: int = 0) -> Divergence:
        """The figures over all rows so far; needs at least one."""
        kl, same = np.concatenate(self.kl), np.concatenate(self.same_top)
        ids = np.repeat(self.chunks, [len(rows) for rows in self.kl])
        n_rows = np.bincount(ids)
        sums = np.bincount(ids, weights=kl)
        median, p99, p999 = (float(x) for x in np.quantile(kl, (0.5, 0.99, 0.999)))
        return Divergence(
            mean=float(kl.mean()),
            interval=mean_interval(sums, n_rows, seed),
            median=median,
            p99=p99,
            p999=p999,
            max=float(kl.max()),
            same_top=float(same.mean()),
            n_rows=len(kl),
            chunk_sums=tuple(float(x) for x in sums),
            chunk_rows=tuple(int(n) for n in n_rows),
        )

    def perplexity(self) -> tuple[float, float]:
        """Perplexity and its standard error, which like upstream's takes the rows for independent."""
        nll = np.concatenate(self.nll)
        value = math.exp(nll.mean())
        return value, value * math.sqrt(nll.var() / (len(nll) - 1)) if len(nll) > 1 else math.nan


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Shapes: (n, n_vocab) float32 -> (n, n_vocab) float64."""
    x = logits.astype(np.float64)
    x -= x.max(1, keepdims=True)
    x -= np.log(np.exp(x).sum(1, keepdims=True))
    return x


def row_blocks(logits: np.ndarray) -> list[slice]:
    """Slices of rows whose float64 copies stay small."""
    step = max(1, BLOCK_VALUES // logits.shape[1])
    return [slice(i, min(i + step, len(logits))) for i in range(0, len(logits), step)]


def kl_rows(reference: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KL(reference || other) of each row, and whether both have the same likeliest token.

    Shapes: twice (n, n_vocab) float32 -> (n,) float64, (n,) bool.
    """
    kl = np.empty(len(reference))
    for rows in row_blocks(reference):
        p, q = log_softmax(reference[rows]), log_softmax(other[rows])
        kl[rows] = (np.exp(p) * (p - q)).sum(1)
    # never below zero but for the last bits of the sum
    return np.maximum(kl, 0.0), reference.argmax(1) == other.argmax(1)


def nll_rows(logits: np.ndarray, targets: Sequence[int] | np.ndarray) -> np.ndarray:
    """Minus the log-probability of the token that came. Shapes: (n, n_vocab) float32, (n,) -> (n,) float64."""
    targets = np.asarray(targets)
    nll = np.empty(len(logits))
    for rows in row_blocks(logits):
        p = log_softmax(logits[rows])
        nll[rows] = -p[np.arange(len(p)), targets[rows]]
    return nll


def resamples(n: int, seed: int) -> np.ndarray:
    """How often each of n chunks is drawn. Shapes: -> (N_RESAMPLES, n)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES).astype(np.float64)


def mean_interval(sums: np.ndarray, n_rows: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of the mean over all rows when whole chunks are drawn anew; None below N_CHUNKS_MIN chunks."""
    if len(sums) < N_CHUNKS_MIN:
        return None
    draws = resamples(len(sums), seed)
    low, high = np.quantile((draws @ sums) / (draws @ n_rows), (0.025, 0.975))
    return float(low), float(high)


def ratio_interval(a: Divergence, b: Divergence, seed: int = 0) -> tuple[float, tuple[float, float] | None]:
    """Mean KL of `a` over that of `b`, measured on the same chunks, and the paired 95 % interval."""
    sums_a, sums_b = np.asarray(a.chunk_sums), np.asarray(b.chunk_sums)
    ratio = float(sums_a.sum() / sums_b.sum())
    if len(sums_a) < N_CHUNKS_MIN:
        return ratio, None
    draws = resamples(len(sums_a), seed)
    low, high = np.quantile((draws @ sums_a) / (draws @ sums_b), (0.025, 0.975))
    return ratio, (float(low), float(high))
