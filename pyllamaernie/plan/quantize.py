"""A model, GGUF or Hugging Face folder, in smaller types, in one go: `prepare`, `write`, `finish`.

Which types is asked elsewhere: of llama-quantize for a preset or a recipe (`quant.choice`), of a plan that was made
before (`model_plan`), of measurements for a size (`sized`). Here they become the job of the writer, with everything
checked before the long work starts. Nothing is printed; the verb `pyllamaernie quantize` speaks.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyllamaernie import _core
from pyllamaernie.compare.samples import ask_pictures, read_text
from pyllamaernie.convert.source import HfModel, check_beside, hf_model, write_beside
from pyllamaernie.errors import InputError
from pyllamaernie.files import check_output, parse_size, write_text
from pyllamaernie.plan.fit import file_budget
from pyllamaernie.plan.model_plan import planned_types
from pyllamaernie.plan.rules import parse_rules
from pyllamaernie.plan.sized import (
    Samples,
    beside,
    kept_plan,
    measured_importance,
    packaged_text,
    runnable,
    written_plan,
)
from pyllamaernie.quant import writer
from pyllamaernie.quant.choice import RECIPE_BASE, Choice, choose_types, needs_importance, recipe_text
from pyllamaernie.quant.importance import Importance, read_importance
from pyllamaernie.quant.job import Job, plan_job
from pyllamaernie.quant.journal import part_path
from pyllamaernie.quant.source import ModelSource, gguf_source
from pyllamaernie.quant.writer import Progress, WriteResult

log = logging.getLogger("pyllamaernie.quant")


@dataclass(frozen=True)
class Options:
    """What to make, one of the first six fields, and how. Paths and sizes are as a person writes them.

    `size`: bytes of the whole file (`files.parse_size`); `bpw`: bits per weight; `fit`: as large as this machine can
    run with a context of `n_ctx` tokens of `kv_type`, `reserve` bytes left free; `type`: a preset or one type;
    `recipe`, `plan`: files. `pins`, `at_least`, `at_most`: entries REGEX=TYPE; `types`: the only ones allowed.
    `imatrix`: importance of the columns, measured where it is needed and not given, on `text`, `images`, the pictures
    of the folder `image_folder` with `questions`, or on this package's own text. `via`, `mmproj`, `mmproj_type`, `mtp`
    are for Hugging Face folders. `resume`: go on where an interrupted run stopped, and keep what is done if this one
    is. `progress`: bars on stderr while measuring.
    """

    size: str | None = None
    bpw: float | None = None
    fit: bool = False
    type: str | None = None
    recipe: str | None = None
    plan: str | None = None
    pins: tuple[str, ...] = ()
    at_least: tuple[str, ...] = ()
    at_most: tuple[str, ...] = ()
    types: tuple[str, ...] | None = None
    pure: bool = False
    base: str = RECIPE_BASE
    allow_requantize: bool = False
    imatrix: str | None = None
    text: str | None = None
    images: tuple[str, ...] = ()
    image_folder: str | None = None
    questions: tuple[str, ...] = ()
    n_ctx: int = 4096
    kv_type: str = "f16"
    reserve: str | None = None
    via: str = "auto"
    mmproj: bool = True
    mmproj_type: str | None = None
    mtp: bool = True
    n_threads: int | None = None
    dry_run: bool = False
    resume: bool = True
    overwrite: bool = False
    progress: bool = False

    @property
    def is_sized(self) -> bool:
        """Whether a size decides the types."""
        return self.size is not None or self.bpw is not None or self.fit

    @property
    def has_samples(self) -> bool:
        """Whether something to measure on is given."""
        return bool(self.text or self.images or self.image_folder)

    def request(self) -> str:
        """All that decides a plan, as JSON: an interrupted run goes on with its plan only if this is the same."""
        return json.dumps(
            {
                "size": self.size,
                "bpw": self.bpw,
                "fit": self.fit,
                "ctx": self.n_ctx,
                "kv_type": self.kv_type,
                "reserve": self.reserve,
                "pin": self.pins,
                "min": self.at_least,
                "max": self.at_most,
                "types": None if self.types is None else ",".join(self.types),
                "file": self.text,
                "image": self.images,
                "images": self.image_folder,
                "prompt": self.questions,
                "imatrix": self.imatrix,
            }
        )


@dataclass(frozen=True)
class Prepared:
    """What is to be written, the Hugging Face folder it is made of, if any, and what a person should know about it."""

    job: Job
    folder: HfModel | None
    warnings: tuple[str, ...]


def prepare(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: Options,
    *,
    say: Callable[[str], None] = log.info,
) -> Prepared:
    """The job that makes `output` of `model`, after all checks; for a size after importance and plan are measured.

    `say` gets what a person should know while that is under way. With `dry_run` nothing is checked about the output,
    and importance for a type or a recipe is not measured.
    Raises: InputError, BudgetError, QuantizeError, ConvertError, MediaError, DiskSpaceError, OutOfMemoryError, the
        errors of reading a model.
    """
    model, output, folder = Path(model), Path(output), None
    if model.is_dir():
        folder = hf_model(
            model,
            output,
            type=options.via,
            mmproj=options.mmproj,
            mmproj_type=options.mmproj_type,
            mtp=options.mtp,
        )
        if not options.dry_run:
            check_beside(folder, options.overwrite)
    source = gguf_source(model) if folder is None else folder.source
    if not options.dry_run:
        writer.check_output(output, (source.path,), options.overwrite)
        _check_beside(output, options)
    importance = None if options.imatrix is None else read_importance(options.imatrix)
    if options.is_sized:
        choice, importance = _sized(model, source, folder, output, options, say)
    elif options.plan is not None:
        choice = Choice(planned_types(read_text(Path(options.plan)), source, importance))
    else:
        choice, importance = _chosen(source, folder, output, options, importance)
    job = plan_job(
        source,
        choice.types,
        output,
        importance=importance,
        keys=choice.keys,
        allow_requantize=options.allow_requantize,
    )
    return Prepared(job, folder, (*choice.warnings, *job.warnings))


def write(
    prepared: Prepared, options: Options, *, on_progress: Callable[[Progress], bool | None] | None = None
) -> WriteResult:
    """Write the file of the job. Interrupted with `resume`, it keeps what is done. Raises: as `writer.run_job`."""
    return writer.run_job(
        prepared.job,
        n_threads=options.n_threads,
        overwrite=options.overwrite,
        resume=options.resume,
        on_progress=on_progress,
    )


def finish(prepared: Prepared, options: Options) -> list[Path]:
    """Write what belongs beside the file: its recipe and, of a folder, the mmproj and mtp files; the paths of those.

    Raises: ConvertError, OSError.
    """
    paths = [] if prepared.folder is None else write_beside(prepared.folder, options.overwrite)
    write_text(beside(prepared.job.output, ".recipe.txt"), recipe_text(prepared.job))
    return paths


def _check_beside(output: Path, options: Options) -> None:
    """Files beside the output are not replaced unasked, save for those of the run that is gone on with."""
    if options.overwrite or part_path(output).is_file():
        return
    for suffix in (".recipe.txt", *((".plan.json", ".plan.md", ".imatrix.gguf") if options.is_sized else ())):
        check_output(beside(output, suffix), overwrite=False)


def _chosen(
    source: ModelSource, folder: HfModel | None, output: Path, options: Options, importance: Importance | None
) -> tuple[Choice, Importance | None]:
    """The types of a preset, a type or a recipe. Importance is measured where a type or given samples ask for it."""
    recipe = None if options.recipe is None else read_text(Path(options.recipe))

    def choose(imatrix: Path | None) -> Choice:
        return choose_types(
            source,
            type=options.type,
            recipe=recipe,
            base=options.base,
            pins=options.pins,
            pure=options.pure,
            imatrix=imatrix,
        )

    choice = choose(None if options.imatrix is None else Path(options.imatrix))
    if options.imatrix is not None or options.dry_run:
        return choice, importance
    if not options.has_samples and not needs_importance(choice.types):
        return choice, importance
    with _samples(options) as samples, runnable(source, folder, output) as seen:
        imatrix, notes = _measured(seen, samples, output, options)
    importance, choice = read_importance(imatrix), choose(imatrix)
    return Choice(choice.types, choice.keys, (*notes, *choice.warnings)), importance


def _sized(
    model: Path,
    source: ModelSource,
    folder: HfModel | None,
    output: Path,
    options: Options,
    say: Callable[[str], None],
) -> tuple[Choice, Importance]:
    """Everything from a size to types: importance, unless given, and the plan."""
    rules = parse_rules(pin=options.pins, min=options.at_least, max=options.at_most)
    size_bytes = None if options.size is None else parse_size(options.size)
    given = None if options.imatrix is None else Path(options.imatrix)
    known = kept_plan(source, output, given, options.request())
    if known is not None and options.resume:
        return Choice(known[0].types, (), ("the plan is that of the interrupted run",)), known[1]
    with _samples(options) as samples, runnable(source, folder, output) as seen:
        if options.fit:
            size_bytes = _fitting_bytes(model, seen, options, say)
        imatrix, notes = (given, []) if given is not None else _measured(seen, samples, output, options)
        plan, importance = written_plan(
            seen,
            output,
            size_bytes=size_bytes,
            bpw=options.bpw,
            imatrix=imatrix,
            samples=samples,
            request=options.request(),
            rules=rules,
            types=options.types,
            n_threads=options.n_threads,
            progress=options.progress,
        )
    return Choice(plan.types, (), (*notes, *plan.notes)), importance


@contextmanager
def _samples(options: Options) -> Iterator[Samples]:
    """What the model is measured on: what was given, or this package's own text."""
    if options.has_samples:
        text = None if options.text is None else Path(options.text)
        yield Samples(text, ask_pictures(options.images, options.image_folder, options.questions), False)
        return
    with tempfile.TemporaryDirectory(prefix="pyllamaernie-") as home:
        yield Samples(packaged_text(Path(home)), (), True)


def _measured(source: ModelSource, samples: Samples, output: Path, options: Options) -> tuple[Path, list[str]]:
    return measured_importance(
        source.path,
        samples,
        output,
        n_threads=options.n_threads,
        overwrite=options.overwrite,
        progress=options.progress,
    )


def _fitting_bytes(model: Path, source: ModelSource, options: Options, say: Callable[[str], None]) -> int:
    """The size that this machine can run. Raises: InputError when the model is no larger; as `file_budget`."""
    reserve = None if options.reserve is None else parse_size(options.reserve)
    size_bytes, text = file_budget(source.path, n_ctx=options.n_ctx, kv_type=options.kv_type, reserve=reserve)
    say(text)
    if _core.gpu_devices(False):
        say("warning: only the CPU's memory is planned for, no GPU's")
    has = sum(w.n_bytes for w in source.weights)
    if has <= size_bytes:
        raise InputError(f"{model} fits as it is, with {has} bytes of weights; --size makes it smaller all the same")
    return size_bytes
