"""`pyllamaernie imatrix`: how strongly each column of each weight matrix is used, on text and on pictures."""

from __future__ import annotations

import argparse
import sys

from pyllamaernie.cli.messages import bad_usage, warn
from pyllamaernie.cli.options import (
    add_model,
    add_pictures,
    add_threads,
    add_workers,
    asked_pictures,
    not_positive,
    take_model,
    too_small,
    wrong_prompts,
)
from pyllamaernie.hub.choice import UNQUANTIZED
from pyllamaernie.quant.imatrix import CHUNK, compute_imatrix, report

EPILOG = """examples:
  pyllamaernie imatrix -m ernie-vl.gguf -f calibration.txt --images photos/ -o imatrix.gguf
  pyllamaernie imatrix -m ernie-vl.gguf -f calibration.txt --image a.jpg --prompt "What is this?" -o imatrix.gguf
  pyllamaernie imatrix -m ernie-0.3b.gguf -f calibration.txt -o imatrix.gguf
  pyllamaernie tool llama-quantize --imatrix imatrix.gguf ernie-vl.gguf ernie-vl-q4.gguf Q4_K_M

A text uses the experts for text only. The experts for vision are measured on pictures, each asked about through the
chat template; a few hundred pictures of the kind that the model will see reach most of them. Experts that nothing
reached are named at the end: quantization treats their columns as equally important.
The file also says how much each expert adds to the output, which `pyllamaernie prune` reads and quantization skips.
exit codes: 0 done, 1 failed, 2 bad usage, 4 a file is missing or unreadable, 5 not enough memory or
disk, 6 network needed, 130 interrupted"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    model = parser.add_argument_group("model")
    add_model(model)
    add_threads(model)
    add_workers(model)
    data = parser.add_argument_group("calibration data")
    data.add_argument("-f", "--file", metavar="TEXT", help="UTF-8 text, cut into chunks; what is left over is dropped")
    add_pictures(data)
    data.add_argument("--chunk", type=int, default=CHUNK, metavar="N", help=f"tokens in a chunk (default: {CHUNK})")
    data.add_argument("--chunks", type=int, metavar="N", help="at most this many chunks of the text (default: all)")
    output = parser.add_argument_group("output")
    output.add_argument("-o", "--output", metavar="FILE", required=True, help="the importance matrix, a .gguf file")
    output.add_argument("--overwrite", action="store_true", help="replace an existing output")
    output.add_argument("--process-output", action="store_true", help="measure output.weight as well")
    output.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    wrong = not_positive(args, "threads") or too_small(args, chunk=16) or not_positive(args, "chunks")
    if wrong := wrong or wrong_prompts(args):
        return bad_usage("imatrix", wrong)
    images = asked_pictures(args)
    if args.file is None and not images:
        return bad_usage("imatrix", "nothing to run; give -f TEXT, --image or --images")
    take_model("imatrix", args, prefer=UNQUANTIZED)
    result = compute_imatrix(
        args.model,
        args.file,
        args.output,
        pictures=images,
        mmproj=args.mmproj,
        chunk=args.chunk,
        n_chunks=args.chunks,
        n_threads=args.threads,
        rpc_servers=args.rpc,
        process_output=args.process_output,
        overwrite=args.overwrite,
        progress=sys.stderr.isatty() and not args.no_progress,
    )
    for line in report(result):
        warn("imatrix", line)
    print(
        f"{result.path}: {len(result.entries)} matrices, {result.n_chunks} chunks of {args.chunk} tokens, "
        f"{result.n_pictures} pictures"
    )
    return 0
