"""`pyllamaernie quantize`: a model, GGUF or Hugging Face folder, in smaller types, in one go.

The parts: which types (`quant/stock.py` asks llama-quantize for its presets, `quant/plan.py` measures and solves for a
size), importance of the columns (`imatrix`), and the writer (`quant/writer.py`), which goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyllamaernie.errors import EXIT_INTERRUPTED, EXIT_USAGE, InputError

if TYPE_CHECKING:
    from pyllamaernie._upstream import Key
    from pyllamaernie.quant.importance import Importance
    from pyllamaernie.quant.job import Job
    from pyllamaernie.quant.source import ModelSource
    from pyllamaernie.quant.writer import Progress, WriteResult

RECIPE_BASE = "Q8_0"  # of tensors that no line of a recipe names
VIA = ("auto", "f16", "bf16", "f32")


@dataclass(frozen=True)
class Choice:
    """Types by tensor name, further metadata, and what a person should know."""

    types: Mapping[str, str]
    keys: tuple[Key, ...] = ()
    warnings: tuple[str, ...] = ()


def choose_types(
    source: ModelSource,
    *,
    type: str | None = None,
    recipe: str | None = None,
    plan: Mapping[str, Any] | None = None,
    base: str = RECIPE_BASE,
    pins: Sequence[str] = (),
    pure: bool = False,
    imatrix: Path | None = None,
) -> Choice:
    """The types of exactly one of: a preset or type, the text of a recipe, a plan as JSON. `pins` come first.

    Raises: InputError, QuantizeError.
    """
    from pyllamaernie._upstream import Key
    from pyllamaernie.quant import native, stock

    if sum(x is not None for x in (type, recipe, plan)) != 1:
        raise InputError("give exactly one of a type, a recipe and a plan")
    for pin in pins:
        stock.check_recipe(pin)
    if plan is not None:
        from pyllamaernie.quant.budget import Plan

        chosen = Plan.from_dict(plan).types
        return Choice(_pinned(chosen, pins))
    if type is not None and type.upper() in stock.presets():
        lines = "\n".join(pins) or None
        found = stock.stock_types(source, type, recipe=lines, imatrix=imatrix, pure=pure)
        keys = () if pins else (Key("general.file_type", "u32", stock.presets()[type.upper()]),)
        return Choice(found.types, keys, found.warnings)
    if type is not None:
        if type.upper() not in native.TYPES:
            raise InputError(
                f"type {type!r} is not known; presets are {', '.join(stock.presets())}, types are "
                f"{', '.join(native.TYPES)}"
            )
        recipe = f".*={type}"
    entries = [*pins, *stock.check_recipe(recipe)]
    found = stock.stock_types(source, base, recipe="\n".join(entries), imatrix=imatrix)
    unused = stock.unused_entries(entries, [w.name for w in source.weights])
    notes = tuple(f"recipe entry {entry!r} is found in no tensor's name" for entry in unused)
    return Choice(found.types, (), (*found.warnings, *notes))


def _pinned(types: Mapping[str, str], pins: Sequence[str]) -> dict[str, str]:
    out = dict(types)
    for pin in reversed(pins):
        pattern, _, name = pin.partition("=")
        out.update({tensor: name.upper() for tensor in out if re.search(pattern.lower(), tensor)})
    return out


def recipe_text(job: Job) -> str:
    """Lines for `llama-quantize --tensor-type-file`: the type of every tensor that was quantized, by its whole name."""
    from pyllamaernie.quant import native

    lines = [
        f"^{re.escape(t.weights.name)}$={t.type.lower()}\n"
        for t in job.tensors
        if t.type != t.weights.type or native.TYPES[t.type].is_quantized
    ]
    return "".join(sorted(lines))


def beside(output: Path, suffix: str) -> Path:
    """A file that goes with an output: NAME.gguf -> NAME.recipe.txt."""
    return output.with_name(output.name.removesuffix(".gguf") + suffix)


# ---- the verb

EPILOG = """examples:
  pyllamaernie quantize ernie-21b-bf16.gguf -o ernie-q4.gguf --type Q4_K_M
  pyllamaernie quantize ERNIE-4.5-21B-A3B-PT -o ernie-q4.gguf --type Q4_K_M --imatrix imatrix.gguf
  pyllamaernie quantize ernie-21b-bf16.gguf -o mixed.gguf --recipe recipe.txt --imatrix imatrix.gguf

MODEL is a GGUF file (of several parts: any of them) in F32, F16 or BF16, or a Hugging Face folder, which is converted
on the way: no 16-bit GGUF is written in between. The mmproj and mtp files of a folder are written beside OUT.

  --type     a preset of llama-quantize (Q4_K_M, IQ3_XXS, ...) or one type for all matrices (CCQ2_5, NVFP4, ...)
  --recipe   lines REGEX=TYPE as for `llama-quantize --tensor-type-file`; the first that is found in a name decides, and
             names in no line get what --base gives them
  --plan     the NAME.plan.json of an earlier run

Ctrl-C keeps what is done in OUT.part and OUT.part.journal, and the same command goes on from there; so it does after a
crash. --no-resume starts again and keeps nothing. OUT appears when it is whole. Beside it: OUT's recipe, which
llama-quantize takes too.

exit codes: 0 done, 1 failed, 2 bad usage, 3 nothing fits the size, 4 a file is missing or unreadable, 5 not enough disk
or memory, 130 interrupted"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="MODEL", help="GGUF file, or Hugging Face folder")
    parser.add_argument("-o", "--output", metavar="OUT.gguf", required=True, help="the smaller file")
    what = parser.add_argument_group("what to make (one of these)").add_mutually_exclusive_group(required=True)
    what.add_argument("--type", metavar="NAME", help="a preset such as Q4_K_M, or one type for all matrices")
    what.add_argument("--recipe", metavar="FILE", help="lines REGEX=TYPE")
    what.add_argument("--plan", metavar="FILE", help="a plan.json")
    more = parser.add_argument_group("types")
    more.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="REGEX=TYPE",
        help="this type for the tensors in whose name the pattern is found; may be repeated, the first one decides",
    )
    more.add_argument("--pure", action="store_true", help="with a preset: its basic type for all matrices")
    more.add_argument(
        "--base", default=RECIPE_BASE, metavar="PRESET", help="for names in no line of a recipe (default: Q8_0)"
    )
    more.add_argument("--imatrix", metavar="FILE", help="importance of the columns, from `pyllamaernie imatrix`")
    more.add_argument(
        "--allow-requantize", action="store_true", help="also change tensors that are quantized already, at a loss"
    )
    folder = parser.add_argument_group("Hugging Face folders")
    folder.add_argument(
        "--via", choices=VIA, default="auto", help="type before quantization (default: auto, the folder's 16-bit type)"
    )
    folder.add_argument("--mmproj-type", choices=("f32", "f16", "bf16", "q8_0"), help="of the mmproj (default: f16)")
    folder.add_argument("--no-mmproj", action="store_true", help="leave the vision side out")
    folder.add_argument("--no-mtp", action="store_true", help="leave the multi-token-prediction layers out")
    work = parser.add_argument_group("work")
    work.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    work.add_argument("--dry-run", action="store_true", help="print every tensor's type and the size, write nothing")
    work.add_argument("--no-resume", action="store_true", help="start again, and keep nothing when interrupted")
    work.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    work.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    if args.threads is not None and args.threads < 1:
        print(f"pyllamaernie quantize: --threads is a positive whole number, got {args.threads}", file=sys.stderr)
        return EXIT_USAGE
    output = Path(args.output)
    if output.suffix != ".gguf":
        print(f"pyllamaernie quantize: {output}: the output's name must end in .gguf", file=sys.stderr)
        return EXIT_USAGE
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a polite kill can be resumed too
    return _run(args, output)


def _run(args: argparse.Namespace, output: Path) -> int:
    from pyllamaernie.quant.importance import read_importance
    from pyllamaernie.quant.job import plan_job
    from pyllamaernie.quant.source import gguf_source
    from pyllamaernie.quant.writer import check_output, run_job

    model, folder = Path(args.model), None
    if model.is_dir():
        from pyllamaernie.quantize_hf import hf_model

        options = {"type": args.via, "mmproj": not args.no_mmproj, "mmproj_type": args.mmproj_type}
        folder = hf_model(model, output, mtp=not args.no_mtp, **options)
    source = gguf_source(model) if folder is None else folder.source
    imatrix = None if args.imatrix is None else Path(args.imatrix)
    importance: Importance | None = None if imatrix is None else read_importance(imatrix)
    choice = choose_types(
        source,
        type=args.type,
        recipe=None if args.recipe is None else _read_text(args.recipe),
        plan=None if args.plan is None else _read_json(args.plan),
        base=args.base,
        pins=args.pin,
        pure=args.pure,
        imatrix=imatrix,
    )
    job = plan_job(
        source,
        choice.types,
        output,
        importance=importance,
        keys=choice.keys,
        allow_requantize=args.allow_requantize,
    )
    for line in (*choice.warnings, *job.warnings):
        print(f"pyllamaernie quantize: warning: {line}", file=sys.stderr)
    if args.dry_run:
        _show(job)
        return 0
    check_output(job, args.overwrite)
    if folder is not None:
        from pyllamaernie.quantize_hf import check_beside, write_beside

        check_beside(folder, args.overwrite)
    bar = _Bar(sys.stderr.isatty() and not args.no_progress)
    try:
        result = run_job(
            job,
            n_threads=args.threads,
            overwrite=args.overwrite,
            resume=not args.no_resume,
            on_progress=bar.show,
        )
    except KeyboardInterrupt:
        bar.close()
        print(f"pyllamaernie quantize: {_interrupted(output, bar.share, not args.no_resume)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        bar.close()
    if folder is not None:
        for path in write_beside(folder, args.overwrite):
            print(path)
    _write_text(beside(output, ".recipe.txt"), recipe_text(job))
    _report(result)
    return 0


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


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: byte {error.start}") from None


def _read_json(path: str) -> Any:
    try:
        return json.loads(_read_text(path))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def _write_text(path: Path, text: str) -> None:
    """Written beside and renamed."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.absolute().parent) as folder:
        (Path(folder) / path.name).write_text(text, encoding="utf-8")
        os.replace(Path(folder) / path.name, path)


class _Bar:
    """Percent, time left and the current tensor on a terminal; remembers how far the work came."""

    def __init__(self, is_shown: bool) -> None:
        self.share, self._is_shown, self._bar, self._stage = 0.0, is_shown, None, ""

    def show(self, progress: Progress) -> None:
        self.share = progress.share if progress.stage == "write" else 0.0
        if not self._is_shown:
            return
        from tqdm import tqdm

        if progress.stage != self._stage:
            self.close()
            self._stage = progress.stage
            form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
            self._bar = tqdm(total=1.0, bar_format=form, file=sys.stderr, leave=False)
        if progress.seconds_left is not None:
            minutes, seconds = divmod(int(progress.seconds_left), 60)
            left = f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"
        else:
            left = "..."
        done, total = progress.n_bytes / 1e6, progress.n_bytes_total / 1e6
        self._bar.n = progress.share
        self._bar.set_description_str(progress.stage, refresh=False)
        self._bar.set_postfix_str(f"{left}, {done:.0f}/{total:.0f} MB {progress.tensor}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
