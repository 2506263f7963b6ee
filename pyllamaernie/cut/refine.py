"""Ranking the experts near the cut again, for `prune --probe`: by what masking each of them does to the output.

The model is loaded once. An expert is masked by its correction bias, in memory: a token then chooses the next one, as
in the pruned file. The scores decide about clear cases; around the cut, where they hardly differ, the KL to the whole
model decides, measured while all other layers are pruned as planned.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pyllamaernie.cut.scores import ExpertStatistics, Ranking, removed_mass
from pyllamaernie.cut.source import BIAS_REMOVED, Source
from pyllamaernie.errors import InputError, UnsupportedInputError

if TYPE_CHECKING:
    import numpy as np

    from pyllamaernie.plan.probe import Probe

BAND = 0.125  # of the experts of a layer, on either side of the cut
N_CHUNKS = 32  # half of them to choose by, half to judge the choice


def refine(
    source: Source,
    rankings: Sequence[Ranking],
    importance: ExpertStatistics,
    text: str | os.PathLike[str] | None,
    *,
    pictures: Sequence[tuple[Any, str]] = (),
    mmproj: str | os.PathLike[str] | None = "auto",
    band: float = BAND,
    n_chunks: int = N_CHUNKS,
    n_threads: int | None = None,
    progress: bool = False,
) -> tuple[list[Ranking], float, float]:
    """The rankings with the experts around each cut chosen by KL, and the KL before and after on what did not choose.

    `band` is the share of a layer's experts on either side of the cut that are tried. The first half of the text and of
    the pictures chooses, the other half judges: everything stays as it was unless that half gets better too. Pools that
    nothing here reaches stay as they are.
    Raises: InputError, UnsupportedInputError without correction biases, the load errors of `Llama`.
    """
    from tqdm import tqdm

    from pyllamaernie.plan.probe import Probe
    from pyllamaernie.quant.source import gguf_source

    if not 0 < band <= 1:
        raise InputError(f"the band is a share of the experts, above 0 and at most 1, got {band}")
    if source.n_group > 1:
        raise UnsupportedInputError(f"{source.path} has {source.n_group} routing groups, which --probe does not know")
    reached = {"text"} | ({"vision"} if pictures else set())
    width = max(1, math.ceil(band * source.n_expert))
    now = list(rankings)
    tries = [_band(r, width) if r.pool in reached else ((), ()) for r in now]
    with Probe(
        gguf_source(source.path), None, text, pictures=pictures, mmproj=mmproj, n_chunks=n_chunks, n_threads=n_threads
    ) as probe:
        masks = _Masks(source, probe)
        for r in now:
            masks.set(r, r.removed)
        halves = _halves(len(probe.chunks), len(probe.prompts))
        before = _kl(probe.kl_parts(), halves[1])
        n_runs = sum(len(weak) + len(strong) for weak, strong in tries)
        with tqdm(total=n_runs, unit="run", disable=not progress, file=sys.stderr) as bar:
            for i, (weak, strong) in enumerate(tries):
                if not weak or not strong:
                    continue
                sure = [e for e in now[i].removed if e not in strong]
                costs = {}
                for e in (*weak, *strong):
                    masks.set(now[i], [*sure, e])
                    costs[e] = _kl(probe.kl_parts(len(probe.chunks) // 2), halves[0])
                    bar.update()
                gone = {*sure, *sorted(costs, key=lambda e: (costs[e], e))[: len(strong)]}
                kept = tuple(e for e in range(source.n_expert) if e not in gone)
                mass = removed_mass(source, importance, now[i].pool, now[i].layer, kept)
                now[i] = replace(now[i], kept=kept, removed_mass=mass)
                masks.set(now[i], now[i].removed)
        after = _kl(probe.kl_parts(), halves[1])
    return (now, before, after) if after < before else (list(rankings), before, before)


def _halves(n_chunks: int, n_pictures: int) -> tuple[list[int], list[int]]:
    """Numbers of the parts that choose and of those that judge. Chunks come first, then pictures."""
    chunks, pictures = range(n_chunks), range(n_chunks, n_chunks + n_pictures)
    first = [*chunks[: n_chunks // 2], *pictures[: n_pictures // 2]]
    second = [*chunks[n_chunks // 2 :], *pictures[n_pictures // 2 :]]
    if not first:
        raise InputError(f"{n_chunks} chunks and {n_pictures} pictures cannot be halved; give two of one at least")
    return first, second


def _kl(parts: tuple[np.ndarray, np.ndarray], chosen: list[int]) -> float:
    """Mean over the rows of some parts."""
    sums, rows = parts
    return float(sums[chosen].sum() / rows[chosen].sum())


def _band(r: Ranking, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The weakest kept and the strongest removed experts: those that may change places, as many of each at most."""
    weak = sorted((e for e in r.kept if e not in r.supers), key=lambda e: (r.scores[e], -e))[:width]
    strong = sorted((e for e in r.removed if r.counts[e] > 0), key=lambda e: (-r.scores[e], e))[:width]
    return tuple(weak), tuple(strong)


class _Masks:
    """The correction biases of a loaded model."""

    def __init__(self, source: Source, probe: Probe) -> None:
        self.model = probe.model
        self.biases: dict[tuple[str, int], tuple[str, np.ndarray]] = {}
        for pool, layers in source.pools().items():
            for il in layers:
                tensor = source.bias(pool, il)
                if tensor is None or tensor.type.name != "F32":
                    raise UnsupportedInputError(
                        f"{source.path}: layer {il} has no correction bias in F32 for {pool} to mask experts with"
                    )
                self.biases[pool, il] = (tensor.name, tensor.data)

    def set(self, ranking: Ranking, removed: Sequence[int]) -> None:
        import numpy as np

        name, bias = self.biases[ranking.pool, ranking.layer]
        masked = np.array(bias, np.float32).reshape(-1)
        masked[list(removed)] = BIAS_REMOVED
        self.model.set_tensor(name, masked.view(np.uint8))
