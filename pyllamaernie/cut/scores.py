"""How much each expert, and each neuron of it, adds: scores out of an importance matrix, for `prune` and `slice`.

`count`, `energy` and `norm` need what every GGUF importance matrix holds; the others need what `pyllamaernie imatrix`
stores beside. g is the weight that a token gives to an expert, y the expert's output.
Source: REAP is arXiv 2510.13999, equation of its saliency; `paper` is arXiv 2509.25689 with alpha = 0.5.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyllamaernie.cut.source import Source
from pyllamaernie.errors import InputError, UnsupportedInputError

if TYPE_CHECKING:
    import numpy as np

    from pyllamaernie.gguf.file import InTensor

SCORES = {
    "count": "how many tokens chose the expert",
    "weight": "sum of g: tokens, each counted with its weight",
    "paper": "half the share of tokens, half the mean g, each relative to the layer's best",
    "energy": "squared output norm, summed over the tokens; estimated from squared inputs",
    "norm": "root of the mean of the same: strong but rare experts stay",
    "reap": "mean of g |y| over the expert's tokens: strong but rare experts stay",
    "reap_sum": "sum of g |y|: what the expert adds over all tokens",
    "output": "sum of g^2 |y|^2: the same, squared",
}
_ESTIMATED = ("energy", "norm")
_MEASURED = ("weight", "paper", "reap", "reap_sum", "output")


@dataclass(frozen=True)
class ExpertStatistics:
    """The tensors of an importance matrix as they are stored: counts and sums, not yet the means that quantizers take.

    `quant.importance` reads those; it knows nothing of single experts, and this nothing of other matrices.
    """

    path: Path
    tensors: Mapping[str, np.ndarray]

    def of(self, down: InTensor, pool: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and squared inputs of a down projection. Shapes: -> (n_expert,), (n_expert, n_ff) float64.

        Raises: InputError when they are missing, of another shape or not finite.
        """
        import numpy as np

        if f"{down.name}.counts" not in self.tensors or f"{down.name}.in_sum2" not in self.tensors:
            hint = "; experts for vision need pictures (imatrix --images)" if pool == "vision" else ""
            raise InputError(f"{self.path} has no statistics for {down.name}{hint}")
        counts = np.asarray(self.tensors[f"{down.name}.counts"], np.float64).reshape(-1)
        sums = np.asarray(self.tensors[f"{down.name}.in_sum2"], np.float64)
        n_expert, n_cols = down.shape[0], down.shape[2]
        if len(counts) != n_expert or sums.size != n_expert * n_cols:
            raise InputError(
                f"{self.path} is of another model: {down.name} has {len(counts)} counts and sums of shape {sums.shape} "
                f"there, {n_expert} experts with {n_cols} columns in the model"
            )
        _check_finite(self.path, down.name, counts, sums)
        return counts, sums.reshape(n_expert, n_cols)

    def experts(self, down: InTensor) -> dict[str, np.ndarray]:
        """What `imatrix` measured of each expert: see its EXPERT_SUMS. Empty if nothing. Shapes: (n_expert,) float64.

        Raises: InputError for values of another shape or not finite.
        """
        import numpy as np

        stem = f"{down.name}.experts."
        out = {
            name.removeprefix(stem): np.asarray(data, np.float64).reshape(-1)
            for name, data in self.tensors.items()
            if name.startswith(stem)
        }
        for key, values in out.items():
            if len(values) != down.shape[0]:
                raise InputError(f"{self.path} is of another model: {stem}{key} has {len(values)} values")
            _check_finite(self.path, stem + key, values)
        return out


def _check_finite(path: Path, name: str, *arrays: np.ndarray) -> None:
    import numpy as np

    if not all(np.isfinite(values).all() and (values >= 0).all() for values in arrays):
        raise InputError(f"{path}: the statistics of {name} are not all finite and positive")


@dataclass(frozen=True)
class Ranking:
    """One layer of one pool. Shapes: counts, scores (n_expert,). `kept` and `removed` are ascending.

    `supers`: experts that stay because of their largest output. `removed_mass`: share of the router's probability that
    the removed experts had, None if it was not measured.
    """

    pool: str
    layer: int
    counts: np.ndarray
    scores: np.ndarray
    kept: tuple[int, ...]
    supers: tuple[int, ...] = ()
    removed_mass: float | None = None

    @property
    def removed(self) -> tuple[int, ...]:
        return tuple(e for e in range(len(self.counts)) if e not in self.kept)

    @property
    def unused(self) -> tuple[int, ...]:
        """Experts that no calibration token reached."""
        return tuple(e for e, count in enumerate(self.counts) if count == 0)


def read_statistics(path: str | os.PathLike[str]) -> ExpertStatistics:
    """The statistics of a file. Raises: InputError when it is no GGUF importance matrix, FileNotFoundError."""
    from pyllamaernie.gguf.file import read_gguf

    path = Path(path)
    with open(path, "rb") as file:  # FileNotFoundError names the path
        if file.read(4) != b"GGUF":
            raise InputError(f"{path} is not a GGUF importance matrix; `pyllamaernie imatrix` writes one")
    try:
        keys, tensors = read_gguf(path)
    except (ValueError, KeyError, IndexError) as error:
        raise InputError(f"{path} cannot be read as an importance matrix: {error}") from None
    kind = keys["general.type"].value if "general.type" in keys else None
    if kind != "imatrix":
        raise InputError(f"{path} is of type {kind!r}, expected 'imatrix'; `pyllamaernie imatrix` writes one")
    return ExpertStatistics(path, {tensor.name: tensor.data for tensor in tensors})


def expert_scores(
    source: Source, importance: ExpertStatistics, pool: str, il: int, score: str
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and score of each expert of a layer; an expert without tokens scores 0.

    Shapes: -> (n_expert,) int64, (n_expert,) float64.
    Raises: InputError, UnsupportedInputError, CorruptModelError.
    """
    import numpy as np

    down = source.down(pool, il)
    counts, sums = importance.of(down, pool)
    n = np.maximum(counts, 1)
    if score == "count":
        values = counts
    elif score in _ESTIMATED:
        energy = np.array([float(_column_norms(source, down, e) @ sums[e]) for e in range(len(counts))])
        values = energy if score == "energy" else np.sqrt(energy / n)
    else:
        parts = importance.experts(down)
        keys = {"weight": "gate", "paper": "gate", "reap": "gate_out", "reap_sum": "gate_out", "output": "gate2_out2"}
        if keys[score] not in parts:
            raise InputError(
                f"{importance.path} has no {down.name}.experts.{keys[score]}, which the score {score!r} needs; make "
                "the file with `pyllamaernie imatrix` of this version, or take --score count, energy or norm"
            )
        values = parts[keys[score]]
        if score == "reap":
            values = values / n
        elif score == "paper":
            mean = values / n
            values = 0.5 * counts / max(counts.max(), 1) + 0.5 * mean / max(mean.max(), 1e-30)
    return counts.astype(np.int64), np.where(counts > 0, values, 0.0)


def removed_mass(source: Source, importance: ExpertStatistics, pool: str, il: int, kept: Sequence[int]) -> float | None:
    """Share of the router's probability that the other experts had, None if it was not measured."""
    prob = importance.experts(source.down(pool, il)).get("prob")
    if prob is None or prob.sum() == 0:
        return None
    return float(1 - prob[list(kept)].sum() / prob.sum())


def neuron_energies(source: Source, importance: ExpertStatistics, pool: str, il: int) -> np.ndarray:
    """Expected squared output of each neuron, summed over its tokens. Shapes: -> (n_expert, n_ff) float64."""
    import numpy as np

    down = source.down(pool, il)
    _, sums = importance.of(down, pool)
    norms = np.stack([_column_norms(source, down, e) for e in range(len(sums))])
    return np.asarray(norms * sums)


def _column_norms(source: Source, down: InTensor, expert: int) -> np.ndarray:
    """Squared norms of the columns of one expert, which is in memory as float32. Shapes: -> (n_ff,) float64."""
    import numpy as np

    from pyllamaernie.quant.codec import dequantize

    if source.tensor(down.name.removesuffix("weight") + "scale") is not None:
        raise UnsupportedInputError(f"{down.name} has scales of its own, which this does not know; take --score count")
    try:
        weights = dequantize(down.data[expert], down.type)
    except NotImplementedError:
        raise UnsupportedInputError(
            f"{down.name} is {down.type.name}, which cannot be decoded; take --score count"
        ) from None
    norms: np.ndarray = np.square(weights, dtype=np.float64).sum(axis=0)
    return norms
