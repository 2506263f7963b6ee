"""`pyllamaernie compare`: what smaller files of a model lose and gain, on the same text and pictures.

A text is scored as llama-perplexity scores it, the second half of each chunk. A picture goes through the chat template
with its question; the rows behind it count, and those of the answer that the first file gives. `compare_run` runs the
files, `divergence` holds the figures, `compare_table` shows them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyllamaernie.errors import EXIT_USAGE, InputError
from pyllamaernie.samples import add_pictures, asked_pictures, read_text, wrong_prompts

if TYPE_CHECKING:
    from pyllamaernie.compare_table import ComparisonTable

N_CTX = 512
N_SPEED_RUNS = 3
INSTALL = "pip install 'pyllamaernie[plot]'"


def compare(
    models: Sequence[str | os.PathLike[str]],
    text: str | os.PathLike[str] | None,
    *,
    images: Sequence[tuple[Any, str]] = (),
    n_ctx: int = N_CTX,
    n_chunks: int | None = None,
    mmproj: str | os.PathLike[str] | None = "auto",
    n_threads: int | None = None,
    speed_runs: int = N_SPEED_RUNS,
    progress: bool = False,
) -> ComparisonTable:
    """Run GGUF files of one vocabulary on a text file and on (picture, question) pairs; the first is the reference.

    `mmproj` "auto" takes the projector beside each file, or the reference's; a path serves all. Files run side by side
    as far as memory allows; the reference runs again for each further group. `speed_runs` 0 leaves the timing out.
    Raises: InputError (nothing to run, other vocabulary, text too short), UnsupportedInputError, MediaError, the load
        errors of `Llama`, PyllamaernieError for logits that are not finite.
    """
    from pyllamaernie.compare_run import Run, check_vocabulary
    from pyllamaernie.media import Image
    from pyllamaernie.model import check_text_model, read_header

    if len(models) < 2:
        raise InputError(f"a comparison takes at least two files, got {len(models)}")
    if text is None and not images:
        raise InputError("nothing to run: give a text, pictures, or both")
    if n_ctx < 4 or speed_runs < 0 or (n_chunks is not None and n_chunks < 1):
        raise InputError(
            f"n_ctx is at least 4, n_chunks at least 1, speed_runs at least 0; got {n_ctx}, {n_chunks}, {speed_runs}"
        )
    words = None if text is None else read_text(Path(text))
    for source, _ in images:  # a wrong one should not cost the work before it; they are not kept, a folder may be large
        Image.of(source)
    headers = [read_header(path) for path in models]
    for header in headers:
        check_text_model(header)
    for header in headers[1:]:
        check_vocabulary(headers[0], header)
    run = Run(headers, words, images, n_ctx=n_ctx, n_chunks=n_chunks, mmproj=mmproj, n_threads=n_threads)
    return run.table(speed_runs, progress)


# ---- the verb

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
exit codes: 0 done, 1 failed, 2 bad usage, 4 a file is missing or unreadable, 5 not enough memory, 130 interrupted"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("reference", metavar="REFERENCE", help="GGUF file that the others are compared with")
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
    model.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
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
    wrong = _wrong_usage(args)
    if wrong:
        print(f"pyllamaernie compare: {wrong}", file=sys.stderr)
        return EXIT_USAGE
    images = asked_pictures(args)
    if args.file is None and not images:
        print("pyllamaernie compare: nothing to run; give -f TEXT, --image or --images", file=sys.stderr)
        return EXIT_USAGE
    for path in (args.json, args.plot):  # before the work, not after it
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise InputError(f"{Path(path).parent} is not a folder")
    if args.plot is not None:
        from pyllamaernie.compare_table import check_plot

        check_plot(args.plot)
    table = compare(
        [args.reference, *args.others],
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
        _write(Path(args.json), table.to_json())
    if args.plot is not None:
        table.plot(args.plot)
    return 0


def _wrong_usage(args: argparse.Namespace) -> str | None:
    for name, least in (("threads", 1), ("ctx", 4), ("chunks", 1), ("speed_runs", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            return f"--{name.replace('_', '-')} is a whole number from {least} up, got {value}"
    return wrong_prompts(args)


def _write(path: Path, text: str) -> None:
    """The file appears only when it is whole."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.absolute().parent) as folder:
        (Path(folder) / path.name).write_text(text, encoding="utf-8")
        os.replace(Path(folder) / path.name, path)
