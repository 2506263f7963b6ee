"""`pyllamaernie prune`: drop the experts that contribute least, judged by an importance matrix."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pyllamaernie.cli.messages import bad_usage, show_cut, warn
from pyllamaernie.cli.options import add_threads, not_positive
from pyllamaernie.compare.samples import QUESTION, folder_pictures
from pyllamaernie.cut.prune import DEFAULT, PER_TOKEN, SUPER, prune, report
from pyllamaernie.cut.refine import N_CHUNKS
from pyllamaernie.cut.scores import SCORES
from pyllamaernie.errors import InputError

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
    add_threads(probe)
    parser.add_argument("--plan", metavar="FILE", help="write the decision and its scores here as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> int:
    if args.score not in SCORES:
        return bad_usage("prune", f"--score is one of {', '.join(SCORES)}, got {args.score}")
    if wrong := not_positive(args, "threads"):
        return bad_usage("prune", wrong)
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
        warn("prune", line)
    show_cut("prune", result)
    return 0
