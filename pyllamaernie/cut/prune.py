"""Dropping the experts that contribute least, judged by an importance matrix: `prune`, and the parts it is made of.

Text and vision experts are ranked apart, each layer for itself, and every layer keeps the same number: a GGUF has one
`expert_count`. The scores are those of `scores.py`; which one loses least is a question for `compare`.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyllamaernie.cut.refine import BAND, N_CHUNKS, refine
from pyllamaernie.cut.scores import SCORES, ExpertStatistics, Ranking, expert_scores, read_statistics, removed_mass
from pyllamaernie.cut.slice import PLAN_FORMAT, SOFTMAX, SliceResult, check_output, slice_model
from pyllamaernie.cut.source import Source, open_source
from pyllamaernie.errors import InputError
from pyllamaernie.files import write_text

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger("pyllamaernie.quant")

DEFAULT = "output"  # bench/prune.py
SUPER = 10  # an expert whose largest output is this many times the layer's median stays
PER_TOKEN = 2  # experts to keep for each one that a token uses


def rank_experts(
    model: str | os.PathLike[str] | Source,
    imatrix: str | os.PathLike[str],
    *,
    keep: int | None = None,
    ratio: float | None = None,
    score: str = DEFAULT,
    top_k: int | None = None,
    force: bool = False,
) -> list[Ranking]:
    """For each pool and layer the scores of its experts and the `keep` best (or ceil(`ratio` x experts)).

    Never-used experts go first; ties go to the lower number. With routing groups each keeps as many. Without `force`
    at least PER_TOKEN experts stay for each of the `top_k` that a token uses, and every expert whose largest output is
    SUPER times the layer's median.
    Raises: InputError, UnsupportedInputError, CorruptModelError, the errors of `open_source`.
    """
    source = model if isinstance(model, Source) else open_source(model)
    if score not in SCORES:
        raise InputError(f"score {score!r} is not known; take one of {', '.join(SCORES)}")
    pools = source.pools()
    if not pools:
        raise InputError(f"{source.path} ({source.arch}) has no experts to prune")
    source.require_whole()
    n_keep = _n_keep(source, keep, ratio)
    n_used = source.n_expert_used if top_k is None else top_k
    least = min(PER_TOKEN * n_used, source.n_expert)
    if not force and n_used <= n_keep < least:
        raise InputError(
            f"{n_keep} experts are less than {PER_TOKEN} for each of the {n_used} that a token uses, which leaves "
            f"hardly a choice; keep at least {least}, use fewer per token (--top-k), or insist (--force)"
        )
    importance = read_statistics(imatrix)
    rankings = []
    for pool, layers in pools.items():
        for il in layers:
            counts, scores = expert_scores(source, importance, pool, il, score)
            rankings.append(_ranking(source, importance, pool, il, counts, scores, n_keep, force))
    return rankings


def prune(
    model: str | os.PathLike[str],
    imatrix: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    keep: int | None = None,
    ratio: float | None = None,
    score: str = DEFAULT,
    top_k: int | None = None,
    exact: bool = False,
    force: bool = False,
    probe: str | os.PathLike[str] | None = None,
    pictures: Sequence[tuple[Any, str]] = (),
    band: float = BAND,
    n_chunks: int = N_CHUNKS,
    n_threads: int | None = None,
    plan: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> tuple[SliceResult, list[Ranking]]:
    """Write `model` without its least contributing experts, and with `plan` the decision as JSON.

    `exact`: the routers stay whole, so the file is the same as the model with those experts masked, and only this
    package loads it. Otherwise a correction bias is scaled by what the router's probabilities grow on average.
    `probe` is a text, `pictures` holds (picture, question) pairs, by which experts near the cut are chosen as `refine`
    does; neither should be the calibration's.
    Raises: as `rank_experts` and `slice_model`. No file is left then.
    """
    source = open_source(model)
    check_output(source, Path(output), overwrite)
    rankings = rank_experts(source, imatrix, keep=keep, ratio=ratio, score=score, top_k=top_k, force=force)
    if probe is not None or pictures:
        rankings, before, after = refine(
            source,
            rankings,
            read_statistics(imatrix),
            probe,
            pictures=pictures,
            band=band,
            n_chunks=n_chunks,
            n_threads=n_threads,
            progress=progress,
        )
        logger.info("mean KL on %s: %.5f by %s, %.5f after probing", probe or "pictures", before, score, after)
    result = write_pruned(source, output, rankings, score, top_k=top_k, exact=exact, overwrite=overwrite)
    if plan is not None:
        write_plan(plan, source, imatrix, score, rankings)
    return result, rankings


def write_pruned(
    source: Source,
    output: str | os.PathLike[str],
    rankings: list[Ranking],
    score: str,
    *,
    top_k: int | None = None,
    exact: bool = False,
    overwrite: bool = False,
) -> SliceResult:
    """Write the kept experts of `rankings`, however they were ranked. Raises: as `slice_model`."""
    from pyllamaernie.gguf.file import Key

    kept = {pool: {r.layer: r.kept for r in rankings if r.pool == pool} for pool in source.pools()}
    notes = [Key("prune.score", "str", score)]
    scales = None if exact else bias_scales(source, rankings)
    return slice_model(
        source,
        output,
        experts=kept,
        top_k=top_k,
        exact=exact,
        bias_scales=scales,
        notes=notes,
        overwrite=overwrite,
    )


def bias_scales(source: Source, rankings: list[Ranking]) -> Mapping[str, Mapping[int, float]] | None:
    """How much the probabilities of the kept experts grow on average, so that their bias can grow with them.

    A softmax over fewer experts multiplies all probabilities of a token by 1 / (1 - what the removed ones had). None
    without such a softmax, or when the probabilities were not measured.
    """
    if int(source.get("expert_gating_func", SOFTMAX)) != SOFTMAX:
        return None
    scales: dict[str, dict[int, float]] = {}
    for r in rankings:
        if r.removed_mass is None:
            return None
        scales.setdefault(r.pool, {})[r.layer] = 1 / max(1 - r.removed_mass, 1e-6)
    return scales


def write_plan(
    path: str | os.PathLike[str], source: Source, imatrix: str | os.PathLike[str], score: str, rankings: list[Ranking]
) -> None:
    """The decision as JSON, with the scores it came from; `slice --experts` takes it. Written beside and renamed."""
    pools: dict[str, dict[str, Any]] = {}
    for r in rankings:
        pools.setdefault(r.pool, {})[str(r.layer)] = {
            "kept": list(r.kept),
            "removed": list(r.removed),
            "counts": [int(n) for n in r.counts],
            "scores": [float(f"{x:.6g}") for x in r.scores],
        }
    value = {
        "format": PLAN_FORMAT,
        "model": source.path.name,
        "imatrix": Path(imatrix).name,
        "score": score,
        "n_expert": source.n_expert,
        "n_kept": len(rankings[0].kept),
        "pools": pools,
    }
    write_text(Path(path), json.dumps(value, indent=1) + "\n")


def _n_keep(source: Source, keep: int | None, ratio: float | None) -> int:
    n, n_group = source.n_expert, source.n_group
    if keep is None and ratio is not None:
        if not 0 < ratio <= 1:
            raise InputError(f"the share of experts to keep is above 0 and at most 1, got {ratio}")
        # 0.7 x 10 is 7.000000000000001
        return min(n, math.ceil(math.ceil(round(ratio * n, 6)) / n_group) * n_group)
    if keep is None or ratio is not None:
        raise InputError("give either how many experts to keep or their share, not both and not neither")
    if not 1 <= keep <= n or keep % n_group:
        groups = f", a multiple of its {n_group} routing groups" if n_group > 1 else ""
        raise InputError(f"{keep} experts cannot be kept; {source.path} has {n}, so 1 to {n}{groups}")
    return keep


def _ranking(
    source: Source,
    importance: ExpertStatistics,
    pool: str,
    il: int,
    counts: np.ndarray,
    scores: np.ndarray,
    n_keep: int,
    force: bool,
) -> Ranking:
    """The best of a layer: first those that must stay, then by score, those that nothing reached last."""
    import numpy as np

    n, n_group, parts = source.n_expert, source.n_group, importance.experts(source.down(pool, il))
    supers: tuple[int, ...] = ()
    if "out_max" in parts and (counts > 0).any() and not force:
        out_max = parts["out_max"]
        supers = tuple(np.flatnonzero(out_max > SUPER * np.median(out_max[counts > 0])).tolist())
    kept: list[int] = []
    for begin in range(0, n, n // n_group):
        order = sorted(
            range(begin, begin + n // n_group), key=lambda e: (e not in supers, counts[e] == 0, -scores[e], e)
        )
        best = order[: n_keep // n_group]
        if lost := [e for e in supers if begin <= e < begin + n // n_group and e not in best]:
            raise InputError(
                f"pool {pool}, layer {il}: expert {lost[0]} would have to go, whose largest output is more than "
                f"{SUPER} times the layer's median; keep more, or insist (--force)"
            )
        kept += best
    kept.sort()
    return Ranking(pool, il, counts, scores, tuple(kept), supers, removed_mass(source, importance, pool, il, kept))


def report(result: SliceResult, rankings: list[Ranking]) -> Iterator[str]:
    """What the data leave open: experts that nothing reached, and a choice that became narrow."""
    for pool in sorted({r.pool for r in rankings}):
        rows = [r for r in rankings if r.pool == pool and r.unused]
        if rows:
            n = sum(len(r.unused) for r in rows)
            left = sum(e in r.kept for r in rows for e in r.unused)
            some = "; ".join(f"layer {r.layer}: {', '.join(map(str, r.unused[:8]))}" for r in rows[:3])
            yield (
                f"pool {pool}: the calibration data never reached {n} experts of {len(rows)} layers ({some}"
                f"{', ...' if len(rows) > 3 else ''}), {left} of them kept; more data would rank them"
            )
    if result.n_expert < 2 * result.n_expert_used:
        yield (
            f"a token uses {result.n_expert_used} of {result.n_expert} experts, so routing hardly chooses any more; "
            "fewer per token (--top-k) may do as well"
        )
