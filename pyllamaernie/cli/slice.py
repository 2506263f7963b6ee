"""`pyllamaernie slice`: fewer layers, fewer or narrower experts, fewer experts per token."""

from __future__ import annotations

import argparse
import re

from pyllamaernie.cli.messages import bad_usage, show_cut
from pyllamaernie.cut import elastic
from pyllamaernie.cut.scores import read_statistics
from pyllamaernie.cut.slice import PLAN_FORMAT, read_plan, slice_model, slice_preset
from pyllamaernie.cut.source import Kept
from pyllamaernie.errors import InputError

N_LAYER_MAX = 9999

EPILOG = f"""examples:
  pyllamaernie slice ernie-21b.gguf -o ernie-21b-top4.gguf --top-k 4
  pyllamaernie slice ernie-21b.gguf -o small.gguf --layers 0-20,25-27
  pyllamaernie slice ernie-21b.gguf -o half.gguf --experts 32
  pyllamaernie slice ernie-21b-q4.gguf -o pruned-q4.gguf --experts plan.json
  pyllamaernie slice ernie-21b.gguf -o narrow.gguf --expert-ff 1024 --imatrix imatrix.gguf
  pyllamaernie slice ernie-5.gguf -o small.gguf --preset half

Layers and experts are numbered from 0 as in MODEL; kept layers are renumbered. What stays is copied byte for byte, in
every type, so a quantized file can be cut as well as its source. The projector of a vision model stays the same.

  --layers   `leading_dense_block_count` and the arrays by layer follow; a cut that the file's keys cannot express is
             refused.
  --experts  N keeps experts 0 to N-1 of every layer, for text and vision alike: right for a model trained so that its
             first experts are complete, a blind guess otherwise. A plan from `pyllamaernie prune` names the ones that
             were used. It is JSON:
             {{"format": "{PLAN_FORMAT}", "pools": {{"text": {{"1": [0, 2], "2": [1, 3]}}}}}}
             pools are text and vision, keys are layers, every list has the same length.
  --expert-ff, --expert-ff-vl
             neurons of each expert for text, for vision: the first N, or with --imatrix the N that add most. Columns of
             a quantized type come in blocks, so N is a multiple of the block (32, or 256 for the K and IQ types).
  --top-k    experts per token; fewer are faster and worse.
  --preset   a sub-model that MODEL was trained for, as ERNIE 5.0 is. Its file names them in {elastic.NAMES}; a file
             without that key has none.

A model that was not trained to be cut loses quality; `pyllamaernie compare MODEL OUT.gguf -f test.txt` says how much.
exit codes: 0 done, 1 failed, 2 bad usage, 4 a file is missing or unreadable, 5 not enough disk, 130 interrupted"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="MODEL", help="GGUF file of a language model, of any type")
    parser.add_argument("-o", "--output", metavar="OUT.gguf", required=True, help="the smaller file")
    cut = parser.add_argument_group("what to keep (at least one)")
    cut.add_argument("--layers", metavar="LIST", help="these layers, such as 0-20,25-27")
    cut.add_argument("--experts", metavar="N|PLAN", help="the first N experts, or those of a JSON plan")
    cut.add_argument("--expert-ff", type=int, metavar="N", help="neurons of each expert for text")
    cut.add_argument("--expert-ff-vl", type=int, metavar="N", help="neurons of each expert for vision")
    cut.add_argument("--top-k", type=int, metavar="K", help="experts that a token uses")
    cut.add_argument("--preset", metavar="NAME", help="a sub-model that the file says it was trained for")
    parser.add_argument("--imatrix", metavar="FILE", help="choose neurons by it (pyllamaernie imatrix)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(args: argparse.Namespace) -> int:
    asked = (args.layers, args.experts, args.expert_ff, args.expert_ff_vl, args.top_k)
    if args.preset is None and all(value is None for value in asked):
        return bad_usage("slice", "nothing to cut; give --layers, --experts, --expert-ff, --top-k or --preset")
    if args.preset is not None and any(value is not None for value in (*asked, args.imatrix)):
        return bad_usage("slice", "--preset says all that is cut; give it alone")
    if args.imatrix is not None and args.expert_ff is None and args.expert_ff_vl is None:
        return bad_usage("slice", "--imatrix chooses neurons; give --expert-ff or --expert-ff-vl too")
    if args.preset is not None:
        show_cut("slice", slice_preset(args.model, args.output, args.preset, overwrite=args.overwrite))
        return 0
    experts: int | Kept | None = None
    if args.experts is not None:
        experts = int(args.experts) if re.fullmatch(r"-?\d+", args.experts) else read_plan(args.experts)
    layers = None if args.layers is None else parse_layers(args.layers)
    widths = {"text": args.expert_ff, "vision": args.expert_ff_vl}
    result = slice_model(
        args.model,
        args.output,
        layers=layers,
        experts=experts,
        top_k=args.top_k,
        expert_ff={pool: n for pool, n in widths.items() if n is not None},
        importance=None if args.imatrix is None else read_statistics(args.imatrix),
        overwrite=args.overwrite,
    )
    show_cut("slice", result)
    return 0


def parse_layers(text: str) -> list[int]:
    """`0-3,7` -> [0, 1, 2, 3, 7]. Raises InputError."""
    out: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if ends is None or (ends[2] is not None and int(ends[2]) < int(ends[1])):
            raise InputError(f"--layers {text}: {part!r} is not a layer or a range such as 4 or 0-20")
        if int(ends[2] or ends[1]) > N_LAYER_MAX:
            raise InputError(f"--layers {text}: {part!r} is beyond {N_LAYER_MAX}, more layers than any model has")
        out += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return out
