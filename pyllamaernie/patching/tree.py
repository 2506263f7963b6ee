"""The patched tree that is built: what it must become, and `apply`, which writes it.

Upstream is never edited: the pinned tree is copied, the series applied to the copy in memory, `native/overlay/` laid
over it, and only files whose bytes differ are written, so that a rebuild compiles what changed. Not the git tree in
which patches are edited: that is `editing.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllamaernie.errors import PatchError
from pyllamaernie.patching.applying import Moved, apply_patch
from pyllamaernie.patching.files import Patch, load_series, series_digest
from pyllamaernie.patching.listing import Tree, scan_files, slow_notice
from pyllamaernie.patching.source import fetch, load_pin

log = logging.getLogger("pyllamaernie.patches")

STAMP = ".pyllamaernie-stamp.json"
OVERLAY = "native/overlay"


def overlay_files(root: Path) -> dict[str, bytes]:
    """Path and bytes of every file in `native/overlay/`.

    Raises: PatchError when the folder is missing or holds a link.
    """
    folder = root / OVERLAY
    if not folder.is_dir():
        raise PatchError(f"{folder}: the overlay is missing")
    out = {}
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if "__pycache__" in inner.parts or path.name.startswith("."):
            continue
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise PatchError(f"{path}: a link or special file; only plain files are allowed in the overlay")
        if path.is_file():
            out[inner.as_posix()] = path.read_bytes()
    return out


@dataclass(frozen=True)
class Plan:
    """The result of the series and the overlay, before a byte is written."""

    tree: Tree
    series: list[Patch]
    changed: dict[str, bytes | None]  # by the series; None: deleted
    modes: dict[str, str]  # of files that the series creates
    overlay: dict[str, bytes]
    moved: list[Moved]

    def stamp(self, root: Path) -> dict[str, Any]:
        """What the stamp file says when the tree is complete."""
        created = sorted({*self.overlay, *(p for p in self.changed if p not in self.tree.files)})
        return {**identity(root, self.series, self.overlay), "files_added": created}


def identity(root: Path, series: list[Patch], overlay: Mapping[str, bytes]) -> dict[str, Any]:
    """Pin, commit and digests: what names a build."""
    pin = load_pin(root)
    rows = "".join(f"{hashlib.sha256(data).hexdigest()} {name}\n" for name, data in sorted(overlay.items()))
    return {
        "commit": pin.commit,
        "build_number": pin.build_number,
        "upstream_version": pin.upstream_version,
        "source": f"{pin.package}=={pin.version}",
        "archive_sha256": pin.archive_sha256,
        "tree_sha256": pin.tree_sha256,
        "digest": series_digest(series),
        "overlay_sha256": hashlib.sha256(rows.encode()).hexdigest(),
    }


def reader(tree: Tree, changed: Mapping[str, bytes | None]) -> Callable[[str], bytes | None]:
    """A function that gives the bytes of a path, as changed so far, or None."""

    def read(path: str) -> bytes | None:
        if path in changed:
            return changed[path]
        return (tree.path / path).read_bytes() if path in tree.files else None

    return read


def make_plan(root: Path, tree: Tree) -> Plan:
    """The series applied to `tree` in memory, and the overlay checked against it.

    Raises: PatchError on the first defect.
    """
    series = load_series(root)
    changed: dict[str, bytes | None] = {}
    modes: dict[str, str] = {}
    moved: list[Moved] = []
    for patch in series:
        new, notes = apply_patch(reader(tree, changed), patch)
        changed.update(new)
        modes.update({d.path: d.mode for d in patch.diffs if d.mode})
        moved += notes
    overlay = overlay_files(root)
    if clash := overlay_clash(tree, changed, overlay):
        raise PatchError(clash)
    return Plan(tree, series, changed, modes, overlay, moved)


def overlay_clash(tree: Tree, changed: Mapping[str, bytes | None], overlay: Mapping[str, bytes]) -> str:
    """A sentence when an overlay path is already upstream's, as a file or as a folder; else empty."""
    taken = {*tree.files, *changed}
    folders = {"/".join(p.split("/")[:k]) for p in taken for k in range(1, p.count("/") + 1)}
    clash = [
        p
        for p in overlay
        if p in taken or p in folders or any("/".join(p.split("/")[:k]) in taken for k in range(1, p.count("/") + 1))
    ]
    return f"{OVERLAY}: {', '.join(clash)} exists upstream; the overlay may only hold new files" if clash else ""


def write_if_other(path: Path, data: Callable[[], bytes], digest: str, mode: str) -> bool:
    """Makes `path` hold these bytes with this mode; a file that does already keeps its time. True when it was
    written."""
    executable = mode == "100755"
    try:
        same = hashlib.sha256(path.read_bytes()).hexdigest() == digest and not path.is_symlink()
    except OSError:
        same = False
    if same:
        if bool(path.stat().st_mode & 0o100) != executable:
            path.chmod(0o755 if executable else 0o644)
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data())
        part.chmod(0o755 if executable else 0o644)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return True


def write_bytes(path: Path, data: bytes, mode: str) -> bool:
    """`write_if_other` of bytes that are at hand."""
    return write_if_other(path, lambda: data, hashlib.sha256(data).hexdigest(), mode)


def read_stamp(folder: Path) -> dict[str, Any] | None:
    """The stamp of a tree that we made; None when there is no such tree yet.

    Raises: PatchError when the folder is something else, so that nothing foreign is overwritten.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if (folder / ".git").exists():
        raise PatchError(
            f"{folder} is a git tree: export what you edited there, or delete it, or choose another folder"
        )
    try:
        stamp: dict[str, Any] = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise PatchError(
            f"{folder} is not empty and was not made by this tool (it has no {STAMP}); choose another folder"
        ) from None
    return stamp


def write_tree(plan: Plan, folder: Path, stamp: dict[str, Any], old: dict[str, Any] | None) -> tuple[int, int]:
    """Brings `folder` to what the plan says; gives back how many files were written and removed."""
    folder.mkdir(parents=True, exist_ok=True)
    old_added = set((old or {}).get("files_added", ()))
    unfinished = {"unfinished": True, "files_added": sorted(old_added | set(stamp["files_added"]))}
    if old != stamp:
        (folder / STAMP).write_text(json.dumps(unfinished), encoding="utf-8")
    n_written = n_removed = 0
    tick = slow_notice(f"writing {folder}")
    for name, (mode, digest) in plan.tree.files.items():
        tick()
        if name not in plan.changed:
            n_written += write_if_other(folder / name, (plan.tree.path / name).read_bytes, digest, mode)
    for name, data in {**plan.changed, **plan.overlay}.items():
        if data is not None:
            mode = plan.modes.get(name) or plan.tree.files.get(name, ("100644",))[0]
            n_written += write_bytes(folder / name, data, mode)
    gone = {name for name, data in plan.changed.items() if data is None} | (
        old_added - set(stamp["files_added"]) - set(plan.tree.files)
    )
    for name in sorted(gone):
        if (folder / name).exists():
            (folder / name).unlink()
            n_removed += 1
    if old != stamp:
        part = folder / f"{STAMP}.{os.getpid()}"
        part.write_text(json.dumps(stamp, indent=1), encoding="utf-8")
        os.replace(part, folder / STAMP)
    return n_written, n_removed


def pristine(root: Path, source: Path | None) -> Tree:
    """The tree `source` as it is; without one the pinned tree, fetched if need be."""
    return fetch(root) if source is None else Tree(source, scan_files(source), "given")


def apply(root: Path, into: Path, *, source: Path | None = None) -> Plan:
    """Makes `into` the patched tree with the overlay in it; files that are right already keep their times.

    `source`: a pristine tree to use as it is; else the pinned one, fetched if need be.
    Raises: PatchError, before anything is written unless the disk fails.
    """
    tree = pristine(root, source)
    old = read_stamp(into)
    plan = make_plan(root, tree)
    n_written, n_removed = write_tree(plan, into, plan.stamp(root), old)
    log.info(
        "%s: %d patches and %d overlay files on llama.cpp %s, %d files written, %d removed",
        into,
        len(plan.series),
        len(plan.overlay),
        load_pin(root).commit[:12],
        n_written,
        n_removed,
    )
    for note in plan.moved:
        log.warning("%s; re-export the series", note)
    return plan
