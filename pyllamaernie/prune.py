"""`pyllamaernie prune`: drop the experts that contribute least, judged by an importance matrix.

Text and vision experts are ranked apart, each layer for itself, and every layer keeps the same number: a GGUF has one
`expert_count`. The scores are those of `expert_scores`; which one loses least is a question for `compare`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyllamaernie.errors import EXIT_USAGE, InputError
from pyllamaernie.expert_scores import SCORES, Importance, Ranking, expert_scores, read_importance, removed_mass
from pyllamaernie.prune_probe import BAND, N_CHUNKS, refine
from pyllamaernie.samples import QUESTION, folder_pictures
from pyllamaernie.slice_model import PLAN_FORMAT, SOFTMAX, SliceResult, check_output, show, slice_model
from pyllamaernie.slice_source import Source, open_source

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
    importance = read_importance(imatrix)
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
            read_importance(imatrix),
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
    from pyllamaernie._upstream import Key

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
    if int(source.get("expert_gating_func", SOFTMAX)) != SOFTMAX or any(r.removed_mass is None for r in rankings):
        return None
    scales: dict[str, dict[int, float]] = {}
    for r in rankings:
        scales.setdefault(r.pool, {})[r.layer] = 1 / max(1 - r.removed_mass, 1e-6)
    return scales


def write_plan(
    path: str | os.PathLike[str], source: Source, imatrix: str | os.PathLike[str], score: str, rankings: list[Ranking]
) -> None:
    """The decision as JSON, with the scores it came from; `slice --experts` takes it. Written beside and renamed."""
    path = Path(path)
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
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.absolute().parent) as folder:
        (Path(folder) / path.name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(Path(folder) / path.name, path)


def _n_keep(source: Source, keep: int | None, ratio: float | None) -> int:
    n, n_group = source.n_expert, source.n_group
    if (keep is None) == (ratio is None):
        raise InputError("give either how many experts to keep or their share, not both and not neither")
    if ratio is not None:
        if not 0 < ratio <= 1:
            raise InputError(f"the share of experts to keep is above 0 and at most 1, got {ratio}")
        # 0.7 x 10 is 7.000000000000001
        return min(n, math.ceil(math.ceil(round(ratio * n, 6)) / n_group) * n_group)
    if not 1 <= keep <= n or keep % n_group:
        groups = f", a multiple of its {n_group} routing groups" if n_group > 1 else ""
        raise InputError(f"{keep} experts cannot be kept; {source.path} has {n}, so 1 to {n}{groups}")
    return keep


def _ranking(
    source: Source,
    importance: Importance,
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


# ---- the verb

_LIST = "\n".join(f"  {name:<9} {text}" for name, text in SCORES.items())

EPILOG = f"""examples:
  pyllamaernie imatrix -m ernie-21b.gguf -f calibration.txt -o imatrix.gguf
  pyllamaernie prune ernie-21b.gguf --imatrix imatrix.gguf --ratio 0.75 -o ernie-21b-48e.gguf
  pyllamaernie prune ernie-vl.gguf --imatrix imatrix.gguf --keep 48 --plan plan.json -o ernie-vl-48e.gguf
  pyllamaernie prune ernie-21b.gguf --imatrix imatrix.gguf --keep 48 --probe selection.txt -o ernie-21b-48e.gguf
  pyllamaernie compare ernie-21b.gguf ernie-21b-48e.gguf -f test.txt

Every layer keeps the same number of experts, each its own best; a vision model keeps as many for pictures as for text,
chosen by what pictures and text use, so its importance matrix needs pictures. Shared experts stay. Kept experts are
copied byte for byte, in every type. Measure on text that is not the calibration text.

scores; g is the weight that a token gives to an expert, y the expert's output (default: {DEFAULT})
{_LIST}
All but count, energy and norm need an importance matrix of `pyllamaernie imatrix`. Removing a quarter of the experts by
output cost the two trained models that we have 0.57 and 0.36 of the KL of removing them by count (docs/prune.md); no
score is best for every model, and `pyllamaernie compare` tells. Experts that no calibration token reached go first. An
expert whose largest output is {SUPER} times the layer's median stays, and {PER_TOKEN} experts for each one that a token
uses; --force insists.

Scores near the cut hardly differ. --probe masks those experts in the loaded model, one at a time, and keeps the ones
that the output misses most: a run over {N_CHUNKS // 2} chunks of the text for a quarter of all experts. As many further
chunks judge: if they get no better, the scores' choice stays. The text should hold many kinds of what the model is for.

The router's softmax then runs over the kept experts. Mixing weights stay exact, since they are renormalised over the
chosen ones. With a correction bias (ERNIE 4.5 has one), which is scaled by the average growth of the probabilities, a
token near a tie can choose another of the kept experts. --exact keeps the routers whole, so that this never happens:
the file is the model with the experts masked, but only this package loads it, not other builds of llama.cpp.
An importance matrix for quantizing the pruned file must be measured on the pruned file.
exit codes: 0 done, 1 failed, 2 bad usage, 4 a file is missing or unreadable, 5 not enough disk, 130 interrupted"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="MODEL", help="GGUF file of a model with experts, of any type")
    parser.add_argument("--imatrix", metavar="FILE", required=True, help="its importance matrix (pyllamaernie imatrix)")
    parser.add_argument("-o", "--output", metavar="OUT.gguf", required=True, help="the smaller file")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--keep", type=int, metavar="N", help="experts that every layer keeps")
    size.add_argument("--ratio", type=float, metavar="R", help="share of the experts that every layer keeps, 0 to 1")
    parser.add_argument("--score", default=DEFAULT, metavar="NAME", help=f"one of the scores (default: {DEFAULT})")
    parser.add_argument("--top-k", type=int, metavar="K", help="experts that a token uses (default: as before)")
    parser.add_argument("--exact", action="store_true", help="keep the routers whole; only this package loads the file")
    parser.add_argument("--force", action="store_true", help="remove experts that should stay")
    probe = parser.add_argument_group("experts near the cut by what masking them costs (runs the model)")
    probe.add_argument("--probe", metavar="TEXT", help="a text, not the calibration's")
    probe.add_argument("--probe-images", metavar="FOLDER", help="pictures, for the experts for vision")
    probe.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    parser.add_argument("--plan", metavar="FILE", help="write the decision and its scores here as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> int:
    if args.score not in SCORES:
        print(f"pyllamaernie prune: --score is one of {', '.join(SCORES)}, got {args.score}", file=sys.stderr)
        return EXIT_USAGE
    if args.threads is not None and args.threads < 1:
        print(f"pyllamaernie prune: --threads is a positive whole number, got {args.threads}", file=sys.stderr)
        return EXIT_USAGE
    if args.plan is not None and not Path(args.plan).absolute().parent.is_dir():
        raise InputError(f"{Path(args.plan).parent} is not a folder")  # before the work, not after it
    result, rankings = prune(
        args.model,
        args.imatrix,
        args.output,
        keep=args.keep,
        ratio=args.ratio,
        score=args.score,
        top_k=args.top_k,
        exact=args.exact,
        force=args.force,
        probe=args.probe,
        pictures=[(path, QUESTION) for path in folder_pictures(args.probe_images)],
        n_threads=args.threads,
        plan=args.plan,
        overwrite=args.overwrite,
        progress=sys.stderr.isatty(),
    )
    for line in report(result, rankings):
        print(f"pyllamaernie prune: warning: {line}", file=sys.stderr)
    show("prune", result)
    return 0


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
