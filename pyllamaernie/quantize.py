"""`pyllamaernie quantize`: a model, GGUF or Hugging Face folder, in smaller types, in one go.

The parts: which types (`quant/stock.py` asks llama-quantize for its presets, `quant/plan.py` measures and solves for a
size), importance of the columns (`imatrix`), and the writer (`quant/writer.py`), which goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyllamaernie.errors import EXIT_INTERRUPTED, EXIT_USAGE, InputError
from pyllamaernie.plan import add_budget, add_limits
from pyllamaernie.samples import add_pictures, asked_pictures, wrong_prompts

if TYPE_CHECKING:
    from pyllamaernie._upstream import Key
    from pyllamaernie.quant.importance import Importance
    from pyllamaernie.quant.job import Job
    from pyllamaernie.quant.source import ModelSource
    from pyllamaernie.quant.writer import Progress, WriteResult
    from pyllamaernie.quantize_hf import HfModel
    from pyllamaernie.quantize_size import Samples

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
    base: str = RECIPE_BASE,
    pins: Sequence[str] = (),
    pure: bool = False,
    imatrix: Path | None = None,
) -> Choice:
    """The types of a preset or type, or of the text of a recipe. `pins`, REGEX=TYPE, come first.

    Raises: InputError, QuantizeError.
    """
    from pyllamaernie._upstream import Key
    from pyllamaernie.quant import native, stock

    if (type is None) == (recipe is None):
        raise InputError("give a type or a recipe, one of both")
    for pin in pins:
        stock.check_recipe(pin)
    if type is not None and type.upper() in stock.presets():
        found = stock.stock_types(source, type, recipe="\n".join(pins) or None, imatrix=imatrix, pure=pure)
        number = Key("general.file_type", "u32", stock.presets()[type.upper()])
        return Choice(found.types, () if pins else (number,), found.warnings)
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


def planned_types(text: str, source: ModelSource, importance: Importance | None) -> dict[str, str]:
    """The types of a plan, as JSON. Raises: InputError for a plan of other files."""
    from pyllamaernie.quant.plan import ModelPlan

    plan = ModelPlan.from_json(text)
    if plan.fingerprint != source.fingerprint:
        raise InputError(f"the plan was made for {plan.model}, or for it as it was then; make a plan for {source.path}")
    if plan.importance != (None if importance is None else importance.digest()):
        raise InputError(
            "the plan was made with another importance matrix; give the same one with --imatrix"
            if plan.importance
            else "the plan was made without an importance matrix; leave --imatrix out"
        )
    return dict(plan.types)


def recipe_text(job: Job) -> str:
    """Lines for `llama-quantize --tensor-type-file`: the type of every tensor that was quantized, by its whole name."""
    from pyllamaernie.quant import native

    lines = [
        f"^{re.escape(t.weights.name)}$={t.type.lower()}\n"
        for t in job.tensors
        if t.type != t.weights.type or native.TYPES[t.type].is_quantized
    ]
    return "".join(sorted(lines))


# ---- the verb

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
or memory, 130 interrupted"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="MODEL", help="GGUF file, or Hugging Face folder")
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
    work.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    work.add_argument("--dry-run", action="store_true", help="print every tensor's type and the size, write nothing")
    work.add_argument("--no-resume", action="store_true", help="start again, and keep nothing when interrupted")
    work.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    work.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    if args.threads is not None and args.threads < 1:
        print(f"pyllamaernie quantize: --threads is a positive whole number, got {args.threads}", file=sys.stderr)
        return EXIT_USAGE
    if wrong := wrong_prompts(args):
        print(f"pyllamaernie quantize: {wrong}", file=sys.stderr)
        return EXIT_USAGE
    if (args.min or args.max or args.types) and (args.type or args.recipe or args.plan):
        print("pyllamaernie quantize: --min, --max and --types go with --size, --bpw and --fit", file=sys.stderr)
        return EXIT_USAGE
    if args.pin and args.plan:
        print("pyllamaernie quantize: --pin does not go with --plan, whose types are chosen", file=sys.stderr)
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
    from pyllamaernie.quant.writer import check_output

    model, folder = Path(args.model), None
    if model.is_dir():
        from pyllamaernie.quantize_hf import check_beside, hf_model

        options = {"type": args.via, "mmproj": not args.no_mmproj, "mmproj_type": args.mmproj_type}
        folder = hf_model(model, output, mtp=not args.no_mtp, **options)
        if not args.dry_run:
            check_beside(folder, args.overwrite)
    source = gguf_source(model) if folder is None else folder.source
    if not args.dry_run:
        check_output(output, (source.path,), args.overwrite)
        _check_beside(args, output)
    imatrix = None if args.imatrix is None else Path(args.imatrix)
    importance = None if imatrix is None else read_importance(imatrix)
    if _is_sized(args):
        choice, importance = _sized(args, source, folder, output)
    elif args.plan is not None:
        choice = Choice(planned_types(_read_text(args.plan), source, importance))
    else:
        recipe = None if args.recipe is None else _read_text(args.recipe)
        options = {"type": args.type, "recipe": recipe, "base": args.base, "pins": args.pin, "pure": args.pure}
        choice = choose_types(source, **options, imatrix=imatrix)
        if imatrix is None and not args.dry_run and (_has_samples(args) or needs_importance(choice.types)):
            imatrix, notes = _measured(args, source, folder, output)
            importance = read_importance(imatrix)
            choice = choose_types(source, **options, imatrix=imatrix)
            choice = Choice(choice.types, choice.keys, (*notes, *choice.warnings))
    allow = args.allow_requantize
    job = plan_job(source, choice.types, output, importance=importance, keys=choice.keys, allow_requantize=allow)
    for line in (*choice.warnings, *job.warnings):
        print(f"pyllamaernie quantize: warning: {line}", file=sys.stderr)
    if args.dry_run:
        _show(job)
        return 0
    return _write(args, job, folder)


def needs_importance(types: Mapping[str, str]) -> bool:
    """Whether some tensor gets a type that gives nothing usable without importance data."""
    from pyllamaernie.quant.job import OUTPUTS
    from pyllamaernie.quant.native import TYPES, WANT_IMPORTANCE

    return any(
        TYPES[t].needs_importance or (t in WANT_IMPORTANCE and name not in OUTPUTS)
        for name, t in types.items()
        if t in TYPES
    )


def _is_sized(args: argparse.Namespace) -> bool:
    return args.size is not None or args.bpw is not None or args.fit


def _has_samples(args: argparse.Namespace) -> bool:
    return bool(args.file or args.image or args.images)


def _check_beside(args: argparse.Namespace, output: Path) -> None:
    """Files beside the output are not replaced unasked, save for those of the run that is gone on with."""
    from pyllamaernie.quant.journal import part_path
    from pyllamaernie.quantize_size import beside

    if args.overwrite or part_path(output).is_file():
        return
    for suffix in (".recipe.txt", *((".plan.json", ".plan.md", ".imatrix.gguf") if _is_sized(args) else ())):
        if beside(output, suffix).exists():
            raise InputError(f"{beside(output, suffix)} exists; choose another name or allow overwriting (--overwrite)")


@contextmanager
def _samples(args: argparse.Namespace) -> Iterator[Samples]:
    """What the model is measured on: what was given, or this package's own text."""
    from pyllamaernie.quantize_size import Samples, packaged_text

    text = None if args.file is None else Path(args.file)
    if _has_samples(args):
        yield Samples(text, asked_pictures(args), False)
        return
    with tempfile.TemporaryDirectory(prefix="pyllamaernie-") as home:
        yield Samples(packaged_text(Path(home)), (), True)


def _shows_progress(args: argparse.Namespace) -> bool:
    return sys.stderr.isatty() and not args.no_progress


def _measured(
    args: argparse.Namespace, source: ModelSource, folder: HfModel | None, output: Path
) -> tuple[Path, list[str]]:
    from pyllamaernie.quantize_size import measured_importance, runnable

    options = {"n_threads": args.threads, "overwrite": args.overwrite, "progress": _shows_progress(args)}
    with _samples(args) as samples, runnable(source, folder, output) as seen:
        return measured_importance(seen.path, samples, output, **options)


def _sized(
    args: argparse.Namespace, source: ModelSource, folder: HfModel | None, output: Path
) -> tuple[Choice, Importance]:
    """Everything from a size to types: importance, unless given, and the plan."""
    from pyllamaernie.plan import parse_size, rules_of
    from pyllamaernie.quantize_size import kept_plan, make_plan, measured_importance, runnable

    rules, size_bytes = rules_of(args), None if args.size is None else parse_size(args.size)
    names = ("size", "bpw", "fit", "ctx", "kv_type", "reserve", "pin", "min", "max", "types", "file", "image", "images")
    request = json.dumps({name: getattr(args, name) for name in (*names, "prompt", "imatrix")})
    known = kept_plan(source, output, None if args.imatrix is None else Path(args.imatrix), request)
    if known is not None and not args.no_resume:
        return Choice(known[0].types, (), ("the plan is that of the interrupted run",)), known[1]
    options = {"n_threads": args.threads, "progress": _shows_progress(args)}
    with _samples(args) as samples, runnable(source, folder, output) as seen:
        if args.fit:
            size_bytes = _fitting_bytes(args, seen)
        imatrix, notes = None if args.imatrix is None else Path(args.imatrix), []
        if imatrix is None:
            imatrix, notes = measured_importance(seen.path, samples, output, overwrite=args.overwrite, **options)
        types = None if args.types is None else args.types.split(",")
        wanted = {"size_bytes": size_bytes, "bpw": args.bpw, "rules": rules, "types": types}
        plan, importance = make_plan(
            seen, output, imatrix=imatrix, samples=samples, request=request, **wanted, **options
        )
    return Choice(plan.types, (), (*notes, *plan.notes)), importance


def _fitting_bytes(args: argparse.Namespace, source: ModelSource) -> int:
    from pyllamaernie import _core
    from pyllamaernie.fit import file_budget
    from pyllamaernie.plan import parse_size

    reserve = None if args.reserve is None else parse_size(args.reserve)
    size_bytes, text = file_budget(source.path, n_ctx=args.ctx, kv_type=args.kv_type, reserve=reserve)
    print(f"pyllamaernie quantize: {text}", file=sys.stderr)
    if _core.gpu_devices(False):
        print("pyllamaernie quantize: warning: only the CPU's memory is planned for, no GPU's", file=sys.stderr)
    has = sum(w.n_bytes for w in source.weights)
    if has <= size_bytes:
        raise InputError(
            f"{args.model} fits as it is, with {has} bytes of weights; --size makes it smaller all the same"
        )
    return size_bytes


def _write(args: argparse.Namespace, job: Job, folder: HfModel | None) -> int:
    from pyllamaernie.quant.writer import run_job
    from pyllamaernie.quantize_size import beside, write_text

    bar, resume = _Bar(_shows_progress(args)), not args.no_resume
    try:
        result = run_job(job, n_threads=args.threads, overwrite=args.overwrite, resume=resume, on_progress=bar.show)
    except KeyboardInterrupt:
        bar.close()
        print(f"pyllamaernie quantize: {_interrupted(job.output, bar.share, resume)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        bar.close()
    if folder is not None:
        from pyllamaernie.quantize_hf import write_beside

        for path in write_beside(folder, args.overwrite):
            print(path)
    write_text(beside(job.output, ".recipe.txt"), recipe_text(job))
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
