"""From a size to a finished choice of types, in steps: what to measure on, importance of the columns, the plan.

What is made lies beside the output, so that an interrupted run goes on with the same importance and the same plan. The
order of the steps is `quantize.py`'s, the plan itself `planner.py`'s.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyllamaernie.convert.source import HfModel, write_beside
from pyllamaernie.errors import PyllamaernieError
from pyllamaernie.files import hidden_folder, write_text
from pyllamaernie.machine import installed
from pyllamaernie.plan.budget import Rule
from pyllamaernie.plan.model_plan import ModelPlan
from pyllamaernie.plan.planner import Planner
from pyllamaernie.quant.importance import Importance, read_importance
from pyllamaernie.quant.journal import part_path, request_path
from pyllamaernie.quant.source import ModelSource

log = logging.getLogger("pyllamaernie.quant")

_N_TEXT = 400_000  # characters of the packaged text
_N_CHUNKS = 64  # of it, of 512 tokens


@dataclass(frozen=True)
class Samples:
    """What a model is measured on. `is_ours`: nothing was given, so it is this package's own text."""

    text: Path | None
    pictures: Sequence[tuple[Any, str]]
    is_ours: bool


def packaged_text(folder: Path) -> Path:
    """A text out of this package, its sources and licences: better than nothing, and no more than that."""
    package = Path(__file__).parents[1]
    files = sorted(installed("licenses").glob("*.txt")) + sorted(package.rglob("*.py"))
    text = "\n\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)[:_N_TEXT]
    path = folder / "packaged.txt"
    path.write_text(text, encoding="utf-8")
    return path


@contextmanager
def runnable(source: ModelSource, folder: HfModel | None, output: Path) -> Iterator[ModelSource]:
    """The source with a GGUF as its path; a Hugging Face folder becomes one beside the output, while that is needed."""
    if folder is None:
        yield source
        return
    from pyllamaernie.quant.writer import write_quantized

    with hidden_folder(output) as home:
        path = home / f"{folder.source.path.resolve().name}.gguf"  # reports name the model by it
        log.info("%s: a 16-bit GGUF is made for measuring, and removed afterwards", folder.source.path)
        write_quantized(source, {}, path, resume=False)
        moved = tuple(replace(file, path=home / file.path.name) for file in folder.beside)
        for made in write_beside(replace(folder, beside=moved), overwrite=True):
            if made.name.startswith("mmproj-"):
                os.replace(made, path.with_name(f"mmproj-{path.name}"))
        yield replace(source, path=path)


def measured_importance(
    model: Path, samples: Samples, output: Path, *, n_threads: int | None, overwrite: bool, progress: bool
) -> tuple[Path, list[str]]:
    """An importance matrix beside the output, and what a person should know about it.

    That of an interrupted run is taken as it is: another would mean other bytes. Raises: as `compute_imatrix`.
    """
    from pyllamaernie.gguf.header import read_header
    from pyllamaernie.quant.imatrix import CHUNK, compute_imatrix, report

    path = beside(output, ".imatrix.gguf")
    if part_path(output).is_file() and path.is_file():
        return path, [f"importance is that of the interrupted run, {path.name}"]
    chunk = min(CHUNK, int(read_header(model).get("context_length") or CHUNK))
    result = compute_imatrix(
        model,
        samples.text,
        path,
        pictures=samples.pictures,
        chunk=chunk,
        n_chunks=_N_CHUNKS if samples.is_ours else None,
        n_threads=n_threads,
        overwrite=overwrite,
        progress=progress,
    )
    notes = report(result)
    if samples.is_ours:
        notes.insert(
            0,
            "importance is measured on this package's own sources and licences; a text of the kind that the model is "
            "used for is better (-f TEXT, or --imatrix)",
        )
    return path, notes


def written_plan(
    source: ModelSource,
    output: Path,
    *,
    size_bytes: int | None,
    bpw: float | None,
    imatrix: Path,
    samples: Samples,
    request: str,
    rules: Sequence[Rule] = (),
    types: Sequence[str] | None = None,
    n_threads: int | None = None,
    progress: bool = False,
) -> tuple[ModelPlan, Importance]:
    """The plan for a size; it and its report are written beside the output, and `request`, for `kept_plan`.

    Raises: BudgetError, InputError, QuantizeError.
    """
    from pyllamaernie.plan.report import write_report

    importance, path = read_importance(imatrix), beside(output, ".plan.json")
    with Planner(
        source,
        importance=importance,
        text=samples.text,
        pictures=samples.pictures,
        rules=rules,
        types=types,
        n_threads=n_threads,
        progress=progress,
    ) as planner:
        if size_bytes is None:
            assert bpw is not None
            size_bytes = planner.size_of(bpw)
        plan = planner.plan(size_bytes)
        write_text(path, plan.to_json())
        write_report(plan, planner, beside(output, ".plan.md"))
    write_text(request_path(output), request)
    return plan, importance


def beside(output: Path, suffix: str) -> Path:
    """A file that goes with an output: NAME.gguf -> NAME.recipe.txt."""
    return output.with_name(output.name.removesuffix(".gguf") + suffix)


def kept_plan(
    source: ModelSource, output: Path, imatrix: Path | None, request: str
) -> tuple[ModelPlan, Importance] | None:
    """Plan and importance of an interrupted run that was asked the same about the same files; None if there is none."""
    if not part_path(output).is_file():
        return None
    try:
        if request_path(output).read_text(encoding="utf-8") != request:
            return None
        plan = ModelPlan.from_json(beside(output, ".plan.json").read_text(encoding="utf-8"))
        importance = read_importance(imatrix or beside(output, ".imatrix.gguf"))
    except (OSError, PyllamaernieError):
        return None
    same = plan.fingerprint == source.fingerprint and plan.importance == importance.digest()
    return (plan, importance) if same else None
