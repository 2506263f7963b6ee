"""The files of hub models on this machine: huggingface_hub's cache, and what we keep in it beside.

The layout is huggingface_hub's: `models--ORG--NAME/{blobs,refs,snapshots}`. Ours is `models--ORG--NAME/pyllamaernie/`:
the list of a repository's files (`listing.json`), so that a name is understood without a network, and for each revision
what was made of its folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyllamaernie.errors import HubError
from pyllamaernie.files import write_text
from pyllamaernie.hub.choice import Model, is_mmproj, is_mtp, models
from pyllamaernie.hub.library import cache_folder
from pyllamaernie.hub.names import Name

OURS = "pyllamaernie"
REVISION = "main"
N_HEX = 12  # of a commit in a name


@dataclass(frozen=True)
class RepoFile:
    """A file of a repository. `blob` is the name of its content in the cache, "" where that is not known."""

    name: str
    size_bytes: int
    blob: str = ""


@dataclass(frozen=True)
class Listing:
    """The files of a repository at a commit. `is_whole`: all that the hub has, not only those that lie here."""

    repo: str
    commit: str
    files: tuple[RepoFile, ...]
    is_whole: bool = True


@dataclass(frozen=True)
class Kept:
    """A model, a folder, or what else lies here of a repository. `used`: when last, in seconds since 1970."""

    name: Name
    kind: str
    n_files: int
    size_bytes: int
    used: float
    paths: tuple[Path, ...]


class Repo:
    """The place of one repository in the cache."""

    def __init__(self, repo: str, cache_dir: str | os.PathLike[str] | None = None) -> None:
        self.repo = repo
        self.cache = cache_folder(cache_dir)
        self.folder = self.cache / ("models--" + repo.replace("/", "--"))
        self.blobs = self.folder / "blobs"
        self.ours = self.folder / OURS

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def made(self, commit: str) -> Path:
        """Where the files made of a revision are."""
        return self.ours / commit[:N_HEX]

    def has(self, commit: str, file: RepoFile) -> bool:
        """Whether a file lies here, whole."""
        return self.snapshot(commit).joinpath(file.name).is_file()

    def n_bytes_here(self, file: RepoFile) -> int:
        """Bytes of a file that need not be fetched any more."""
        if not file.blob:
            return 0
        whole, part = self.blobs / file.blob, self.blobs / f"{file.blob}.incomplete"
        try:
            return min(file.size_bytes, (whole if whole.exists() else part).stat().st_size)
        except OSError:
            return 0

    def listing(self) -> Listing | None:
        """The listing that was kept, else one of the files that lie here, else None."""
        try:
            kept = json.loads((self.ours / "listing.json").read_text(encoding="utf-8"))
            files = tuple(RepoFile(str(name), int(size), str(blob)) for name, size, blob in kept["files"])
            return Listing(self.repo, str(kept["commit"]), files)
        except (OSError, ValueError, TypeError, KeyError):  # none, or not one of ours
            pass
        try:
            commit = (self.folder / "refs" / REVISION).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return None
        home = self.snapshot(commit)
        files = tuple(
            RepoFile(path.relative_to(home).as_posix(), path.stat().st_size)
            for path in sorted(home.rglob("*"))
            if path.is_file()
        )
        return Listing(self.repo, commit, files, is_whole=False) if files else None

    def keep(self, listing: Listing) -> None:
        """Keep a listing for the next time."""
        self.ours.mkdir(parents=True, exist_ok=True)
        files = [[file.name, file.size_bytes, file.blob] for file in listing.files]
        write_text(self.ours / "listing.json", json.dumps({"commit": listing.commit, "files": files}, indent=0))

    def point(self, commit: str) -> None:
        """Say that the main revision is this commit, as other programs on the same cache read it."""
        ref = self.folder / "refs" / REVISION
        ref.parent.mkdir(parents=True, exist_ok=True)
        write_text(ref, commit)


def kept(cache_dir: str | os.PathLike[str] | None = None) -> list[Kept]:
    """What lies in the cache, by repository and type."""
    home = cache_folder(cache_dir)
    names = sorted(path.name for path in home.glob("models--*--*") if path.is_dir())
    return [line for name in names for line in kept_of(name.removeprefix("models--").replace("--", "/", 1), home)]


def kept_of(repo: str, cache_dir: str | os.PathLike[str] | None = None) -> list[Kept]:
    """What lies in the cache of one repository: its models, its folder, what was made of it, and the rest."""
    place = Repo(repo, cache_dir)
    if not place.folder.is_dir():
        return []
    lines: list[Kept] = []
    for snapshot in sorted((place.folder / "snapshots").glob("*")):
        files = [path.relative_to(snapshot).as_posix() for path in sorted(snapshot.rglob("*")) if path.is_file()]
        for model in _whole_models(repo, files):
            lines.append(_line(repo, model.type or None, "GGUF", [snapshot / file for file in model.parts]))
        others = [f for f in files if not f.lower().endswith(".gguf") or is_mmproj(f) or is_mtp(f)]
        kind = "folder" if any(f.endswith(".safetensors") for f in others) else "beside"
        if others:
            lines.append(_line(repo, None, kind, [snapshot / file for file in others]))
    for folder in sorted(place.ours.glob("*/*")):
        if folder.is_dir() and not folder.is_symlink() and not folder.name.startswith("."):
            lines.append(_line(repo, folder.name, "converted", sorted(folder.glob("*.gguf"))))
    if unfinished := sorted(place.blobs.glob("*.incomplete")):
        lines.append(_line(repo, None, "unfinished", unfinished))
    return lines


def remove(name: Name, cache_dir: str | os.PathLike[str] | None = None) -> int:
    """Remove a repository, or with a type its files and what was converted to it; the bytes that were freed.

    Raises: HubError when there is nothing of it.
    """
    place, found = Repo(name.repo, cache_dir), removed_by(name, cache_dir)
    before = _disk_bytes(place.folder)
    if name.type is None:
        shutil.rmtree(place.folder)
        shutil.rmtree(place.cache / ".locks" / place.folder.name, ignore_errors=True)
        return before
    for line in found:
        for path in line.paths:
            _unlink(path, place)
    for folder in place.ours.glob("*/*"):  # what was converted to it
        if folder.name.upper() == name.type.upper():
            shutil.rmtree(folder, ignore_errors=True)
    return before - _disk_bytes(place.folder)


def removed_by(name: Name, cache_dir: str | os.PathLike[str] | None = None) -> list[Kept]:
    """What `remove` would remove. Raises: HubError when there is nothing of it."""
    lines = kept_of(name.repo, cache_dir)
    if name.type is not None:
        lines = [line for line in lines if (line.name.type or "").upper() == name.type.upper()]
    if not lines and not (name.type is None and Repo(name.repo, cache_dir).folder.is_dir()):
        raise HubError(f"{name}: nothing of it in {cache_folder(cache_dir)}; `pyllamaernie list` shows what is there")
    return lines


def _whole_models(repo: str, files: Sequence[str]) -> list[Model]:
    try:
        return models(repo, files)
    except HubError:  # a part is not there yet: each of the others stands for itself
        alone = (_one(repo, file) for file in files)
        return [model for model in alone if model is not None]


def _one(repo: str, file: str) -> Model | None:
    try:
        return next(iter(models(repo, [file])), None)
    except HubError:
        from_parts = file.rsplit("-", 3)[0]
        return Model(from_parts, "", (file,))


def _line(repo: str, type: str | None, kind: str, paths: Sequence[Path]) -> Kept:
    stats = [path.stat() for path in paths]
    used = max((max(s.st_atime, s.st_mtime) for s in stats), default=0.0)
    return Kept(Name(repo, type), kind, len(paths), sum(s.st_size for s in stats), used, tuple(paths))


def _unlink(path: Path, place: Repo) -> None:
    """Remove a file and, if no other snapshot has it, its content."""
    blob = path.resolve() if path.is_symlink() else None
    path.unlink()
    if blob is None or blob.parent != place.blobs.resolve():
        return
    others = (p.resolve() for p in (place.folder / "snapshots").rglob("*") if p.is_symlink())
    if blob not in others:
        blob.unlink(missing_ok=True)


def _disk_bytes(folder: Path) -> int:
    return sum(size for size in _sizes(folder))


def _sizes(folder: Path) -> Iterator[int]:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield path.stat().st_size
