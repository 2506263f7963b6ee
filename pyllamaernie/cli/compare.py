"""`pyllamaernie compare`: what smaller files of a model lose and gain, on the same text and pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pyllamaernie.cli.messages import bad_usage
from pyllamaernie.cli.options import add_pictures, add_threads, asked_pictures, local_model, too_small, wrong_prompts
from pyllamaernie.compare.comparison import N_CTX, N_SPEED_RUNS, compare
from pyllamaernie.errors import InputError
from pyllamaernie.files import write_text

INSTALL = "pip install 'pyllamaernie[plot]'"

EPILOG = """examples:
  pyllamaernie compare ernie-f16.gguf ernie-q8_0.gguf ernie-q4_k_m.gguf -f test.txt
  pyllamaernie compare ernie-vl-f16.gguf ernie-vl-q4_k_m.gguf -f test.txt --images photos/ --json out.json
  pyllamaernie compare f16.gguf q4.gguf --image a.jpg --prompt "What is this?" --plot sizes.svg

The first file is the reference, usually the unquantized model; the others must have its vocabulary.
  mean KL      how far the next-token probabilities are from the reference's, in nats; 0 is no difference.
               In brackets the 95 % interval, by resampling whole chunks. The figure to choose a file by.
  p99, max     the worst hundredth of the rows, the worst row: what a good mean can hide
  same top     how often both files name the same likeliest token
  same answers pictures about which the file gives the reference's answer, token for token
  perplexity   of the text, with its standard error; it can fall by luck, so trust the KL
  t/s          tokens per second of a prompt of 512 tokens and of 32 tokens after it, median of several runs
Use a text that was not used to make the files (importance matrix, plan). A few dozen chunks give useful intervals.
exit codes: 0 done, 1 failed, 2 bad usage, 4 a file is missing or unreadable, 5 not enough memory or
disk, 6 network needed, 130 interrupted"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "reference", metavar="REFERENCE", help="GGUF file, or org/name:TYPE on a hub, that the others are compared with"
    )
    parser.add_argument("others", nargs="+", metavar="OTHER", help="GGUF files of the same model")
    data = parser.add_argument_group("what to run")
    data.add_argument("-f", "--file", metavar="TEXT", help="UTF-8 text, cut into chunks; what is left over is dropped")
    data.add_argument("--ctx", type=int, default=N_CTX, metavar="N", help=f"tokens in a chunk (default: {N_CTX})")
    data.add_argument("--chunks", type=int, metavar="N", help="at most this many chunks of the text (default: all)")
    add_pictures(data)
    model = parser.add_argument_group("models")
    model.add_argument(
        "--mmproj",
        metavar="FILE",
        default="auto",
        help="projector of all files (default: the one beside each file, else the reference's)",
    )
    add_threads(model)
    model.add_argument(
        "--speed-runs",
        type=int,
        default=N_SPEED_RUNS,
        metavar="N",
        help=f"timed runs for each file, 0 for none (default: {N_SPEED_RUNS})",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="write every figure here, those of each chunk too")
    output.add_argument("--plot", metavar="FILE", help=f"size against mean KL, as .png, .svg or .pdf ({INSTALL})")
    output.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    wrong = too_small(args, threads=1, ctx=4, chunks=1, speed_runs=0) or wrong_prompts(args)
    if wrong:
        return bad_usage("compare", wrong)
    images = asked_pictures(args)
    if args.file is None and not images:
        return bad_usage("compare", "nothing to run; give -f TEXT, --image or --images")
    for path in (args.json, args.plot):  # before the work, not after it
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise InputError(f"{Path(path).parent} is not a folder")
    if args.plot is not None:
        from pyllamaernie.compare.table import check_plot

        check_plot(args.plot)
    found = [local_model("compare", text) for text in (args.reference, *args.others)]
    if args.mmproj == "auto" and found[0][1] is not None:
        args.mmproj = found[0][1]
    table = compare(
        [model for model, _ in found],
        args.file,
        images=images,
        n_ctx=args.ctx,
        n_chunks=args.chunks,
        mmproj=args.mmproj,
        n_threads=args.threads,
        speed_runs=args.speed_runs,
        progress=sys.stderr.isatty() and not args.no_progress,
    )
    print(table.to_markdown())
    if args.json is not None:
        write_text(Path(args.json), table.to_json())
    if args.plot is not None:
        table.plot(args.plot)
    return 0
