"""Which files of a repository are meant, by their names alone: nothing is read and nothing fetched.

GGUF files are told apart by the type at the end of their names, as people name them (`NAME-Q4_K_M.gguf`,
`NAME.q8_0.gguf`, `Q4_K_M/NAME-00001-of-00003.gguf`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath

from pyllamaernie.errors import HubError
from pyllamaernie.hub.names import Name

RUNNABLE = ("Q4_K_M", "Q8_0", "F16")  # the best default to run, in this order
UNQUANTIZED = ("BF16", "F16", "F32")  # the best to quantize
_PROJECTOR = ("F16", "BF16", "F32", "Q8_0")

_TYPE = r"(?:UD-)?(?:I?Q[1-8](?:_[0-9A-Z]+)*|TQ[12]_0|CCQ[0-9](?:_?[0-9A-Z]+)*|BF16|FP?16|FP?32|MXFP4(?:_MOE)?|NVFP4)"
_TYPE_AT_END = re.compile(rf"(?:^|[-._])({_TYPE})$", re.IGNORECASE)
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})")
_FOLDER_FILES = re.compile(
    r"[^/]+\.json|(?!consolidated)[^/]+\.safetensors|[^/]+\.model|[^/]+\.jinja|additional_chat_templates/[^/]+\.jinja"
    r"|README\.md|merges\.txt",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Wish:
    """What a name leaves open. `prefer`: types to take without one; `folder_first`: before any GGUF file a folder.

    `filename`: a glob that the model's file fits; `more`: globs of files that are wanted as well.
    """

    prefer: tuple[str, ...] = RUNNABLE
    folder_first: bool = False
    filename: str | None = None
    more: tuple[str, ...] = ()


DEFAULT = Wish()


@dataclass(frozen=True)
class Model:
    """One model of a repository: its name without part and ending, its type ("" if it says none), its parts."""

    stem: str
    type: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Chosen:
    """The files of a GGUF model in order, and what goes beside it; or those of a Hugging Face folder."""

    parts: tuple[str, ...] = ()
    mmproj: str | None = None
    mtp: str | None = None
    folder: tuple[str, ...] = ()
    more: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """All of them, small ones and what goes beside a model first: where a model is whole, all is there."""
        beside = tuple(name for name in (self.mmproj, self.mtp) if name is not None)
        rest = sorted(self.folder, key=lambda name: (name.endswith(".safetensors"), name))
        return tuple(dict.fromkeys((*beside, *self.more, *rest, *self.parts)))


def choose(name: Name, files: Iterable[str], wish: Wish = DEFAULT) -> Chosen:
    """The files that a name means.

    Raises: HubError for a type that is not there, a missing part, or more than one that could be meant.
    """
    files = sorted(files)
    more = tuple(file for file in files if any(fnmatch(file, glob) for glob in wish.more))
    found = models(name.repo, files)
    folder = _folder(files)
    if folder and wish.filename is None and (not found or (wish.folder_first and name.type is None)):
        return Chosen(folder=folder, more=more)
    if not found:
        raise HubError(f"{name.repo}: holds neither GGUF files nor a folder with config.json and .safetensors files")
    if wish.filename is not None:
        model = _fitting(name, found, wish.filename)
    else:
        model = _asked(name, found) if name.type is not None else _default(name, found, wish.prefer)
    return Chosen(model.parts, _beside(model, files, is_mmproj), _beside(model, files, is_mtp), more=more)


def models(repo: str, files: Iterable[str]) -> list[Model]:
    """The GGUF models of a repository, in the order of their names. Raises: HubError for one with a missing part."""
    parts: dict[str, dict[int, str]] = {}
    totals: dict[str, int] = {}
    for file in sorted(files):
        path = PurePosixPath(file)
        if path.suffix.lower() != ".gguf" or is_mmproj(file) or is_mtp(file) or "imatrix" in path.name.lower():
            continue
        stem = str(path.with_suffix(""))
        split = _PART.fullmatch(stem)
        stem, number, total = (split[1], int(split[2]), int(split[3])) if split else (stem, 1, 1)
        parts.setdefault(stem, {})[number] = file
        totals[stem] = total
    for stem, numbered in parts.items():
        if missing := sorted(set(range(1, totals[stem] + 1)) - set(numbered)):
            raise HubError(f"{repo}: {stem} is in {totals[stem]} parts, and part {missing[0]} is not there")
    return [Model(stem, type_of(stem), tuple(file for _, file in sorted(p.items()))) for stem, p in parts.items()]


def type_of(stem: str) -> str:
    """The type that a name ends in, else its folder's, in capitals; "" for none."""
    path = PurePosixPath(stem)
    for text in (path.name, path.parent.name):
        if found := _TYPE_AT_END.search(text):
            return _plain(found[1])
    return ""


def is_mmproj(file: str) -> bool:
    """Whether a file is a projector by its name."""
    return file.lower().endswith(".gguf") and "mmproj" in PurePosixPath(file).name.lower()


def is_mtp(file: str) -> bool:
    """Whether a file is a draft model by its name."""
    return file.lower().endswith(".gguf") and PurePosixPath(file).name.lower().startswith("mtp-")


def _plain(type: str) -> str:
    return re.sub(r"^FP(?=16|32)", "F", type.upper())


def _asked(name: Name, found: Sequence[Model]) -> Model:
    asked = str(name.type)
    same = [m for m in found if _plain(asked) == m.type]
    same = same or [m for m in found if PurePosixPath(m.stem).name.lower() == asked.lower()]
    if len(same) == 1:
        return same[0]
    if same:
        raise HubError(f"{name}: could be any of {_listed(same, by_name=True)}; say which instead of the type")
    raise HubError(f"{name.repo}: has no {asked}; there is {_listed(found)}")


def _fitting(name: Name, found: Sequence[Model], glob: str) -> Model:
    fitting = [m for m in found if any(fnmatch(part, glob) or part == glob for part in m.parts)]
    if len(fitting) == 1:
        return fitting[0]
    held = _listed(fitting or found, by_name=True)
    raise HubError(f"{name.repo}: {'several models fit' if fitting else 'no model fits'} {glob!r}: there is {held}")


def _default(name: Name, found: Sequence[Model], prefer: Sequence[str]) -> Model:
    if len(found) == 1:
        return found[0]
    for type in prefer:
        same = [m for m in found if m.type == type]
        if len(same) == 1:
            return same[0]
        if same:
            break
    raise HubError(f"{name}: which of its models? There is {_listed(found)}; say it as {name.repo}:TYPE")


def _listed(found: Sequence[Model], *, by_name: bool = False) -> str:
    types = [m.type for m in found]
    return ", ".join(
        PurePosixPath(m.stem).name if by_name or not m.type or types.count(m.type) > 1 else m.type for m in found
    )


def _beside(model: Model, files: Sequence[str], is_kind: Callable[[str], bool]) -> str | None:
    """The projector or draft model: the one named after this model, else the best type of those nearest to it."""
    others = [file for file in files if is_kind(file)]
    folder = PurePosixPath(model.stem).parent
    near = [file for file in others if PurePosixPath(file).parent == folder]
    top = [file for file in others if PurePosixPath(file).parent == PurePosixPath(".")]
    others = near or top or others
    tail = f"-{PurePosixPath(model.stem).name.lower()}"
    for file in others:
        if PurePosixPath(file).stem.lower().endswith(tail):
            return file

    def rank(file: str) -> int:
        type = type_of(str(PurePosixPath(file).with_suffix("")))
        return _PROJECTOR.index(type) if type in _PROJECTOR else len(_PROJECTOR)

    return min(others, key=rank, default=None)


def _folder(files: Sequence[str]) -> tuple[str, ...]:
    """The files of a Hugging Face folder that a conversion reads; none without configuration and weights."""
    wanted = tuple(file for file in files if _FOLDER_FILES.fullmatch(file))
    is_folder = "config.json" in wanted and any(file.endswith(".safetensors") for file in wanted)
    return wanted if is_folder else ()
