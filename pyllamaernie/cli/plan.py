"""`pyllamaernie plan`: a type for every tensor of a model, so that the file has a given size and loses least.

The verb around `plan.planner`, which does the work; `plan.report` shows the result. Nothing of the model is written:
`pyllamaernie quantize --plan` carries a plan out, and so does llama-quantize with the recipe.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pyllamaernie.cli.messages import bad_usage
from pyllamaernie.cli.options import (
    add_budget,
    add_limits,
    add_pictures,
    add_threads,
    asked_pictures,
    not_positive,
    take_model,
    too_small,
    wrong_prompts,
)
from pyllamaernie.errors import InputError
from pyllamaernie.files import check_output, parse_size, write_text
from pyllamaernie.hub.choice import UNQUANTIZED

EPILOG = """examples:
  pyllamaernie plan ernie-21b-bf16.gguf --size 8GiB --imatrix imatrix.gguf -f selection.txt -o ernie-8g.plan.json
  pyllamaernie plan ernie-vl-bf16.gguf --bpw 3 --imatrix imatrix.gguf -f text.txt --images photos/ -o vl.plan.json
  pyllamaernie plan ernie-0.3b-bf16.gguf --bpw 4.5 --pin '^output=Q8_0' --max ffn_.*_exps=IQ4_XS -o small.plan.json
  pyllamaernie quantize ernie-21b-bf16.gguf --plan ernie-8g.plan.json --imatrix imatrix.gguf -o ernie-8g.gguf

MODEL is a GGUF file in F32, F16 or BF16. Three steps:
  errors   every tensor in every type, by the real encoders on sampled rows, weighted as the calibration data use them
  probes   groups of tensors get coarser weights in the loaded model, and the output on TEXT and pictures is compared
  plans    the best choice of types is computed (a proof says how much better another could be), run, and improved where
           losses do not add; the stock presets and single types that fit run too, and if one is better, it is used
Use a text that is neither in the importance matrix nor in your final comparison; 16 chunks of 512 tokens are read.
Without a text and pictures nothing is run, and losses are guessed from other models: quick, and less good.

Beside OUT.plan.json: OUT.recipe.txt, which `llama-quantize --tensor-type-file` takes (with any quantized base type,
such as Q8_0), and OUT.plan.md, a report, with pictures where matplotlib is there (pip install 'pyllamaernie[plot]').
exit codes: 0 done, 1 failed, 2 bad usage, 3 nothing fits the size, 4 a file is missing or unreadable, 5 not enough
memory or disk, 6 network needed, 130 interrupted"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "model", metavar="MODEL", help="GGUF file that is not quantized, or org/name or org/name:TYPE on a hub"
    )
    add_budget(parser.add_argument_group("how large (one of these)").add_mutually_exclusive_group(required=True))
    parser.add_argument("-o", "--output", metavar="OUT.plan.json", required=True, help="the plan")
    data = parser.add_argument_group("data")
    data.add_argument("--imatrix", metavar="FILE", help="importance of the columns, from `pyllamaernie imatrix`")
    data.add_argument("-f", "--file", metavar="TEXT", help="UTF-8 text that plans are measured on")
    add_pictures(data)
    data.add_argument(
        "--mmproj", metavar="FILE", default="auto", help="projector for pictures (default: the one beside the model)"
    )
    add_limits(parser.add_argument_group("types"))
    work = parser.add_argument_group("work")
    work.add_argument(
        "--probe",
        choices=("auto", "none", "groups", "each"),
        default="auto",
        help="what is probed together: a kind of tensor in a quarter of the layers (groups), every tensor alone "
        "(each), nothing (none); auto: groups where there is a text or a picture",
    )
    work.add_argument("--trials", type=int, metavar="N", help="varied plans that are run too (default: 8)")
    work.add_argument("--cache", metavar="FOLDER", help="keep the errors here: the next plan of the model starts there")
    add_threads(work)
    work.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    work.add_argument("--no-report", action="store_true", help="only the plan and the recipe")
    work.add_argument("--no-progress", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    if wrong := not_positive(args, "threads") or too_small(args, trials=0) or wrong_prompts(args):
        return bad_usage("plan", wrong)
    output = Path(args.output)
    if not output.absolute().parent.is_dir():
        raise InputError(f"{output.parent} is not a folder")
    stem = output.name.removesuffix(".json").removesuffix(".plan")
    recipe, report = (output.with_name(stem + ending) for ending in (".recipe.txt", ".plan.md"))
    for path in (output, recipe, *(() if args.no_report else (report,))):
        check_output(path, args.overwrite)
    size_bytes = None if args.size is None else parse_size(args.size)
    pictures = asked_pictures(args)

    take_model("plan", args, prefer=UNQUANTIZED)
    from pyllamaernie.plan.planner import N_TRIALS, Planner
    from pyllamaernie.plan.rules import parse_rules

    with Planner(
        args.model,
        importance=args.imatrix,
        text=args.file,
        pictures=pictures,
        mmproj=args.mmproj,
        probe=args.probe,
        rules=parse_rules(pin=args.pin, min=args.min, max=args.max),
        types=None if args.types is None else args.types.split(","),
        n_trials=N_TRIALS if args.trials is None else args.trials,
        n_threads=args.threads,
        cache=args.cache,
        progress=sys.stderr.isatty() and not args.no_progress,
    ) as planner:
        plan = planner.plan(planner.size_of(args.bpw) if size_bytes is None else size_bytes)
        for note in plan.notes:
            print(f"pyllamaernie plan: note: {note}", file=sys.stderr)
        write_text(output, plan.to_json())
        write_text(recipe, plan.recipe())
        if not args.no_report:
            from pyllamaernie.plan.report import write_report

            write_report(plan, planner, report)
    kl = "" if plan.kl_measured is None else f", mean KL {plan.kl_measured:.4g} on the selection data"
    print(
        f"{output}: {plan.size_bytes} bytes of {plan.budget_bytes} ({plan.budget_bytes - plan.size_bytes} unused), "
        f"{plan.bpw:.3f} bits per weight{kl}"
    )
    return 0
