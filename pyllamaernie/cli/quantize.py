"""`pyllamaernie quantize`: a model, GGUF or Hugging Face folder, in smaller types, in one go."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pyllamaernie.cli.messages import bad_usage, warn
from pyllamaernie.cli.options import (
    add_budget,
    add_limits,
    add_pictures,
    add_threads,
    local_source,
    not_positive,
    wrong_prompts,
)
from pyllamaernie.errors import EXIT_INTERRUPTED
from pyllamaernie.plan.quantize import Options, finish, prepare, write
from pyllamaernie.quant.choice import RECIPE_BASE
from pyllamaernie.quant.job import Job
from pyllamaernie.quant.writer import Progress, WriteResult

if TYPE_CHECKING:
    from tqdm import tqdm

EPILOG = """examples:
  pyllamaernie quantize ernie-21b-bf16.gguf -o ernie-12g.gguf --size 12GiB -f text.txt
  pyllamaernie quantize ernie-21b-bf16.gguf -o ernie-fit.gguf --fit --ctx 16384 -f text.txt
  pyllamaernie quantize ernie-21b-bf16.gguf -o ernie-q4.gguf --type Q4_K_M
  pyllamaernie quantize ERNIE-4.5-21B-A3B-PT -o ernie-q4.gguf --type Q4_K_M --imatrix imatrix.gguf
  pyllamaernie quantize ernie-21b-bf16.gguf -o mixed.gguf --recipe recipe.txt --imatrix imatrix.gguf

MODEL is a GGUF file (of several parts: any of them) in F32, F16 or BF16, or a Hugging Face folder, which is converted
on the way: no 16-bit GGUF is written in between. The mmproj and mtp files of a folder are written beside OUT.

  --size     bytes of the whole file, or --bpw, bits per weight: importance is measured, a plan is made (see
             `pyllamaernie plan --help`), and the best file of that size is written
  --fit      the same for as many bytes as this machine's memory holds beside the context and its buffers
  --type     a preset of llama-quantize (Q4_K_M, IQ3_XXS, ...) or one type for all matrices (CCQ2_5, NVFP4, ...)
  --recipe   lines REGEX=TYPE as for `llama-quantize --tensor-type-file`; the first that is found in a name decides, and
             names in no line get what --base gives them
  --plan     the OUT.plan.json of an earlier run, or of `pyllamaernie plan`

Ctrl-C keeps what is done in OUT.part and OUT.part.journal, and the same command goes on from there; so it does after a
crash. --no-resume starts again and keeps nothing. OUT.gguf appears when it is whole. Beside it: OUT.recipe.txt, which
llama-quantize takes too; for a size also OUT.plan.json, OUT.plan.md (a report) and, if measured, OUT.imatrix.gguf.
For a size, a folder becomes a 16-bit GGUF in a hidden folder beside OUT while it is measured.

exit codes: 0 done, 1 failed, 2 bad usage, 3 nothing fits the size, 4 a file is missing or unreadable, 5 not enough disk
or memory, 6 network needed, 130 interrupted"""

VIA = ("auto", "f16", "bf16", "f32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="MODEL", help="GGUF file, Hugging Face folder, or org/name on a hub")
    parser.add_argument("-o", "--output", metavar="OUT.gguf", required=True, help="the smaller file")
    what = parser.add_argument_group("what to make (one of these)").add_mutually_exclusive_group(required=True)
    add_budget(what)
    what.add_argument("--fit", action="store_true", help="as large as this machine can run, with its context")
    what.add_argument("--type", metavar="NAME", help="a preset such as Q4_K_M, or one type for all matrices")
    what.add_argument("--recipe", metavar="FILE", help="lines REGEX=TYPE")
    what.add_argument("--plan", metavar="FILE", help="a plan.json")
    more = parser.add_argument_group("types")
    add_limits(more)
    more.add_argument("--pure", action="store_true", help="with a preset: its basic type for all matrices")
    more.add_argument(
        "--base", default=RECIPE_BASE, metavar="PRESET", help="for names in no line of a recipe (default: Q8_0)"
    )
    more.add_argument(
        "--allow-requantize", action="store_true", help="also change tensors that are quantized already, at a loss"
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--imatrix",
        metavar="FILE",
        help="importance of the columns, from `pyllamaernie imatrix`; measured if left out and there is a size, a "
        "text, or a type below three bits",
    )
    data.add_argument("-f", "--file", metavar="TEXT", help="UTF-8 text to measure on (default: one from this package)")
    add_pictures(data)
    fit = parser.add_argument_group("the machine (--fit)")
    fit.add_argument("--ctx", type=int, default=4096, metavar="N", help="tokens of context (default: 4096)")
    fit.add_argument("--kv-type", default="f16", metavar="NAME", help="type of the KV cache (default: f16)")
    fit.add_argument("--reserve", metavar="BYTES", help="memory to leave free (default: 5 %%, at least 1 GiB)")
    folder = parser.add_argument_group("Hugging Face folders")
    folder.add_argument(
        "--via", choices=VIA, default="auto", help="type before quantization (default: auto, the folder's 16-bit type)"
    )
    folder.add_argument("--mmproj-type", choices=("f32", "f16", "bf16", "q8_0"), help="of the mmproj (default: f16)")
    folder.add_argument("--no-mmproj", action="store_true", help="leave the vision side out")
    folder.add_argument("--no-mtp", action="store_true", help="leave the multi-token-prediction layers out")
    work = parser.add_argument_group("work")
    add_threads(work)
    work.add_argument("--dry-run", action="store_true", help="print every tensor's type and the size, write nothing")
    work.add_argument("--no-resume", action="store_true", help="start again, and keep nothing when interrupted")
    work.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    work.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    output = Path(args.output)
    if wrong := _wrong_usage(args, output):
        return bad_usage("quantize", wrong)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a polite kill can be resumed too
    options = _options(args)
    args.model = local_source("quantize", args.model)
    prepared = prepare(args.model, output, options, say=_say)
    for line in prepared.warnings:
        warn("quantize", line)
    if args.dry_run:
        _show(prepared.job)
        return 0
    bar = _Bar(options.progress)
    try:
        result = write(prepared, options, on_progress=bar.show)
    except KeyboardInterrupt:
        bar.close()
        _say(_interrupted(output, bar.share, options.resume))
        return EXIT_INTERRUPTED
    finally:
        bar.close()
    for path in finish(prepared, options):
        print(path)
    _report(result)
    return 0


def _say(text: str) -> None:
    print(f"pyllamaernie quantize: {text}", file=sys.stderr)


def _wrong_usage(args: argparse.Namespace, output: Path) -> str | None:
    if wrong := not_positive(args, "threads") or wrong_prompts(args):
        return wrong
    if (args.min or args.max or args.types) and (args.type or args.recipe or args.plan):
        return "--min, --max and --types go with --size, --bpw and --fit"
    if args.pin and args.plan:
        return "--pin does not go with --plan, whose types are chosen"
    if output.suffix != ".gguf":
        return f"{output}: the output's name must end in .gguf"
    return None


def _options(args: argparse.Namespace) -> Options:
    return Options(
        size=args.size,
        bpw=args.bpw,
        fit=args.fit,
        type=args.type,
        recipe=args.recipe,
        plan=args.plan,
        pins=tuple(args.pin),
        at_least=tuple(args.min),
        at_most=tuple(args.max),
        types=None if args.types is None else tuple(args.types.split(",")),
        pure=args.pure,
        base=args.base,
        allow_requantize=args.allow_requantize,
        imatrix=args.imatrix,
        text=args.file,
        images=tuple(args.image),
        image_folder=args.images,
        questions=tuple(args.prompt),
        n_ctx=args.ctx,
        kv_type=args.kv_type,
        reserve=args.reserve,
        via=args.via,
        mmproj=not args.no_mmproj,
        mmproj_type=args.mmproj_type,
        mtp=not args.no_mtp,
        n_threads=args.threads,
        dry_run=args.dry_run,
        resume=not args.no_resume,
        overwrite=args.overwrite,
        progress=sys.stderr.isatty() and not args.no_progress,
    )


def _report(result: WriteResult) -> None:
    kept = f", {result.n_bytes_kept / 1e6:.1f} MB of them from before" if result.n_bytes_kept else ""
    print(
        f"{result.path}: {result.n_tensors} tensors, {result.n_bytes / 1e6:.1f} MB{kept}, {result.bpw:.3f} bits per "
        f"weight, {result.seconds:.1f} s"
    )


def _show(job: Job) -> None:
    for tensor in job.tensors:
        dims = "x".join(map(str, reversed(tensor.weights.shape)))
        kinds = tensor.type if tensor.type == tensor.weights.type else f"{tensor.weights.type} -> {tensor.type}"
        print(f"{tensor.weights.name:40}  {dims:>20}  {kinds:18}  {tensor.n_bytes:>14}")
    print(f"total: {job.n_params / 1e9:.4g} billion parameters, {job.bpw:.3f} bits per weight, {job.n_bytes} bytes")


def _interrupted(output: Path, share: float, is_kept: bool) -> str:
    if not is_kept:
        return "interrupted; nothing is kept"
    return (
        f"interrupted at {share:.0%}; {output}.part and its journal keep that, and the same command goes on from there "
        "(--no-resume starts again; delete the two files to give up)"
    )


class _Bar:
    """Percent, time left and the current tensor on a terminal; remembers how far the work came."""

    def __init__(self, is_shown: bool) -> None:
        self.share, self._is_shown, self._stage = 0.0, is_shown, ""
        self._bar: tqdm[NoReturn] | None = None

    def show(self, progress: Progress) -> None:
        self.share = progress.share if progress.stage == "write" else 0.0
        if not self._is_shown:
            return
        if self._bar is None or progress.stage != self._stage:
            self._stage = progress.stage
            self._bar = self._opened()
        if progress.seconds_left is not None:
            minutes, seconds = divmod(int(progress.seconds_left), 60)
            left = f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"
        else:
            left = "..."
        done, total = progress.n_bytes / 1e6, progress.n_bytes_total / 1e6
        self._bar.n = progress.share
        self._bar.set_description_str(progress.stage, refresh=False)
        self._bar.set_postfix_str(f"{left}, {done:.0f}/{total:.0f} MB {progress.tensor}")

    def _opened(self) -> tqdm[NoReturn]:
        from tqdm import tqdm

        self.close()
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
        return tqdm(total=1.0, bar_format=form, file=sys.stderr, leave=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
