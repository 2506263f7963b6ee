"""What removing experts costs, by each score of `pyllamaernie prune`, and what the router's rows are worth.

    python bench/prune.py MODEL.gguf --calibration A.txt --selection B.txt --test C.txt [--ratios 0.75 0.5]
    python bench/prune.py models/ernie-4.5-vl-tiny --pictures 200 [--ratios 0.75 0.5]

A checkpoint folder is converted first; with --pictures the sets are questions about pictures of the shapes world.
Scores are computed on the calibration set, `probed` chooses by the selection set, and all files are compared with the
whole model on the test set, which nothing else sees. Printed: mean KL on the test set, its ratio to that of `count`
with the paired 95 % interval over chunks, and for the best score KL and largest difference of logits between the file
and the model with masked experts, for both kinds of files. `bench/text_moe.py` makes a model and three texts.
"""

from __future__ import annotations

import argparse
import functools
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import paths  # noqa: F401

import numpy as np
import shapes_world as world
from turns import medians, seconds, take_turns

from pyllamaernie import Llama
from pyllamaernie.compare.comparison import compare
from pyllamaernie.compare.divergence import kl_rows, ratio_interval
from pyllamaernie.convert import convert
from pyllamaernie.cut.prune import rank_experts, write_pruned
from pyllamaernie.cut.refine import refine
from pyllamaernie.cut.scores import SCORES, Ranking, read_statistics
from pyllamaernie.cut.source import Source, open_source
from pyllamaernie.gguf import file as _upstream
from pyllamaernie.quant.imatrix import compute_imatrix

SEED = 7_000_000_000
MASK = -1e9


def pictures(n: int, seed: int) -> list[tuple[Any, str]]:
    """Fresh pictures of the shapes world, each with a question."""
    out: list[tuple[Any, str]] = []
    rng = random.Random(seed)
    while len(out) < n:
        scene = world.random_scene(rng)
        found = world.ask(scene, ("what", "many", "colour", "where", "there")[len(out) % 5], rng)
        if found is not None:
            out.append((np.asarray(world.draw_scene(scene)), found[0]))
    return out


def masked(source: Source, rankings: list[Ranking], out: Path) -> Path:
    """The model with the removed experts' biases so low that no token chooses them: the oracle."""
    lost = {(r.pool, r.layer): list(r.removed) for r in rankings}
    tensors = []
    for t in source.tensors:
        data = t.data
        if "exp_probs_b" in t.name:
            data = np.array(data)
            data.reshape(-1)[lost["vision" if "_vl" in t.name else "text", int(t.name.split(".")[1])]] = MASK
        tensors.append(_upstream.OutTensor(t.name, t.shape, t.type, lambda data=data: iter((data,))))
    keys = [key for name, key in source.keys.items() if name != "general.architecture"]
    _upstream.write_gguf(out, source.arch, keys, tensors)
    return out


def against_mask(oracle: Path, pruned: Path, text: str, n_threads: int) -> str:
    """KL and largest difference of logits between the oracle and a pruned file, on some tokens."""
    rows = []
    for path in (oracle, pruned):
        with Llama(path, n_ctx=2048, n_threads=n_threads) as llm:
            rows.append(llm.logits(llm.tokenize(text)[:1024]))
    kl, same = kl_rows(*rows)
    worst = np.abs(rows[0] - rows[1]).max() / rows[0].std()
    return (
        f"KL {kl.mean():.2e}, same likeliest token {same.mean():.2%}, logits differ by at most {worst:.1e} deviations"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name in ("calibration", "selection", "test"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--pictures", type=int, default=0, help="of each set, instead of texts")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.75, 0.5])
    parser.add_argument("--scores", nargs="+", default=list(SCORES))
    parser.add_argument("--bands", type=float, nargs="*", default=[0.125])
    parser.add_argument("--probed", nargs="*", default=["output"], help="scores to refine by probing")
    parser.add_argument("--chunks", type=int, default=64, help="of the test text")
    parser.add_argument("--calibration-chunks", type=int, default=128)
    parser.add_argument("--probe-chunks", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home, model = Path(folder), Path(args.model)
        if model.is_dir():
            model = convert(model, home / "model.gguf", type="f16").model
        sets: dict[str, Any] = {}
        if args.pictures:
            for i, name in enumerate(("calibration", "selection", "test")):
                sets[name] = pictures(args.pictures, SEED + i * 1_000_000)
        source, imatrix = open_source(model), home / "imatrix.gguf"
        text = None if args.pictures else args.calibration
        few = {"pictures": sets["calibration"][: max(1, args.pictures // 10)]} if args.pictures else {}

        def cpu(experts: bool) -> dict[str, float]:
            n_chunks = max(1, args.calibration_chunks // 10)
            work = functools.partial(measure, model, text, imatrix, experts, args.threads, few, n_chunks)
            return {"cpu": seconds(work, time.process_time)}

        # some rounds on a tenth of the data for the cost of the experts' sums, then all of it
        took = medians(take_turns({"without": lambda: cpu(False), "with": lambda: cpu(True)}, 3))
        without, with_ = took["without"]["cpu"], took["with"]["cpu"]
        print(f"imatrix: {without:.2f} s of CPU without the experts' sums, {with_:.2f} s with them")
        measure(
            model, text, imatrix, True, args.threads, {"pictures": sets.get("calibration", ())}, args.calibration_chunks
        )
        for ratio in args.ratios:
            run(args, source, imatrix, ratio, sets, home)


def measure(
    model: Path, text: str | None, imatrix: Path, experts: bool, n_threads: int, data: dict, n_chunks: int
) -> None:
    compute_imatrix(
        model, text, imatrix, experts=experts, n_threads=n_threads, n_chunks=n_chunks, overwrite=True, **data
    )


def run(args: argparse.Namespace, source: Source, imatrix: Path, ratio: float, sets: dict, home: Path) -> None:
    """All files of one size, compared with the whole model."""
    rankings: dict[str, list[Ranking]] = {
        score: rank_experts(source, imatrix, ratio=ratio, score=score, force=True) for score in args.scores
    }
    for score in args.probed:
        for band in args.bands:
            start = time.perf_counter()
            ranked, before, after = refine(
                source,
                rankings[score],
                read_statistics(imatrix),
                None if args.pictures else args.selection,
                pictures=sets.get("selection", ()),
                band=band,
                n_chunks=args.probe_chunks,
                n_threads=args.threads,
            )
            rankings[f"{score} probed, band {band}"] = ranked
            took = time.perf_counter() - start
            print(f"{score} probed, band {band}: {before:.5f} -> {after:.5f} where it is judged, {took:.0f} s")
    files = {}
    for i, (name, ranked) in enumerate(rankings.items()):
        files[name] = write_pruned(source, home / f"{i}.gguf", ranked, name, exact=True, overwrite=True).path
    text = None if args.pictures else args.test
    table = compare(
        [source.path, *files.values()],
        text,
        images=sets.get("test", ()),
        n_chunks=args.chunks,
        n_threads=args.threads,
        speed_runs=0,
    )
    kls = {name: row.pictures if args.pictures else row.text for name, row in zip(files, table.models[1:], strict=True)}
    print(f"\nkeeping {len(rankings[args.scores[0]][0].kept)} of {source.n_expert} experts")
    print(f"{'score':<28} {'KL':>9} {'of count':>9} {'95 %':>16} {'same top':>9}")
    for name, kl in kls.items():
        value, interval = ratio_interval(kl, kls["count"])
        span = "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
        print(f"{name:<28} {kl.mean:>9.5f} {value:>9.3f} {span:>16} {kl.same_top:>9.2%}")
    best = min(kls, key=lambda name: kls[name].mean)
    oracle = masked(source, rankings[best], home / "masked.gguf")
    words = Path(args.test).read_text(encoding="utf-8") if args.test else "What is in the picture? " * 60
    compact = write_pruned(source, home / "compact.gguf", rankings[best], best, overwrite=True).path
    print(f"against the masked model ({best}):")
    print(f"  whole routers:  {against_mask(oracle, files[best], words, args.threads)}")
    print(f"  cut routers:    {against_mask(oracle, compact, words, args.threads)}")
    unscaled = [replace(r, removed_mass=None) for r in rankings[best]]
    plain = write_pruned(source, home / "unscaled.gguf", unscaled, best, overwrite=True).path
    print(f"  bias unscaled:  {against_mask(oracle, plain, words, args.threads)}", flush=True)


if __name__ == "__main__":
    main()
