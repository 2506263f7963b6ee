"""The series as a whole: `check` judges it, `status` names what is there, `new` starts a patch.

`source` gets and proves the pinned upstream, `files` reads patches, `applying` applies them, `tree` makes the patched
copy, `editing` a git tree to change patches in; the command line is `cli/patch.py`.
"""

from __future__ import annotations

import json
import logging
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pyllamaernie.errors import PatchError
from pyllamaernie.machine import installed
from pyllamaernie.patching.applying import apply_patch
from pyllamaernie.patching.files import (
    FIELDS,
    GROUPS,
    NAME,
    SUBJECT,
    ZERO_FROM,
    load_series,
    parse_patch,
    problems,
    read_series,
    series_text,
)
from pyllamaernie.patching.listing import Tree, scan_files
from pyllamaernie.patching.source import PIN_FILE, extract_folder, fetch, safe_member
from pyllamaernie.patching.tree import identity, overlay_clash, overlay_files, reader

log = logging.getLogger("pyllamaernie.patches")

SOURCES = Path(__file__).resolve().parents[2]  # the checkout that this file stands in, if it stands in one
BUILD_RECORD = "build.json"  # in the data of an installed wheel: what `status --json` said at build time
MARKERS = ("include/llama.h", "ggml/include/ggml.h")  # a folder with these is a llama.cpp tree


def find_root(given: Path | None = None) -> Path:
    """The source checkout: `given`, else the one this file stands in, else the first one from the working folder
    upwards.

    Raises: PatchError when there is none, as in an installed wheel.
    """
    cwd = Path.cwd()
    for folder in (given,) if given else (SOURCES, cwd, *cwd.parents):
        if (folder / PIN_FILE).is_file():
            return folder
    where = f"{given} is none" if given else "an installed wheel carries no patches"
    raise PatchError(f"this needs a source checkout of pyllamaernie, a folder with {PIN_FILE}; {where}")


@dataclass(frozen=True)
class Verdict:
    """What `check` says about one patch: `problems` fail the check, `notes` do not."""

    name: str
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def check(root: Path, against: Tree | None = None) -> tuple[list[Verdict], list[str]]:
    """A verdict for every patch, and what is wrong with the whole; both against the pin, or against another tree.

    Against another tree only the applying is judged, patch by patch: one that fails is left out and the next is tried.
    Raises: PatchError when there is no series, or the pin's tree cannot be had or is not the pin's.
    """
    series, wrong = read_series(root)
    overlay = overlay_files(root)
    tree = against or fetch(root)
    changed: dict[str, bytes | None] = {}
    verdicts = []
    for patch in series:
        bad, notes = ([] if against else problems(patch)), []
        try:
            new, moved = apply_patch(reader(tree, changed), patch)
            changed.update(new)
            notes = [str(note) for note in moved]
        except PatchError as e:
            bad += [text.removeprefix(f"patches/{patch.name}: ") for text in e.args]
        verdicts.append(Verdict(patch.name, tuple(dict.fromkeys(bad)), tuple(notes)))
    if clash := overlay_clash(tree, changed, overlay):
        wrong.append(clash)
    return verdicts, wrong


def open_tree(path: Path, scratch: Path) -> Tree:
    """The llama.cpp tree at `path`: a folder that is one or holds one, or an archive with one inside (unpacked below
    `scratch`).

    Raises: PatchError when there is none.
    """
    if path.is_dir():
        found = (
            [path]
            if all((path / m).is_file() for m in MARKERS)
            else [path / m for m in ("vendor/llama.cpp", "thirdparty/llama.cpp")]
        )
        for home in found:
            if all((home / m).is_file() for m in MARKERS):
                return Tree(home, scan_files(home), str(home))
        raise PatchError(f"{path}: no llama.cpp tree here ({' and '.join(MARKERS)} are missing)")
    if not path.is_file():
        raise PatchError(f"{path}: no such file or folder")
    try:
        with tarfile.open(path, "r:*") as tar:
            names = {str(safe_member(m, path)) for m in tar if m.isfile()}
    except (tarfile.TarError, EOFError, OSError) as e:
        raise PatchError(f"{path}: not a readable archive: {e}") from None
    roots = {n.removesuffix("/" + MARKERS[0]) for n in names if n.endswith("/" + MARKERS[0])}
    roots = {r for r in roots if f"{r}/{MARKERS[1]}" in names}
    if not roots:
        raise PatchError(f"{path}: no llama.cpp tree in this archive")
    folder = min(roots, key=lambda r: (len(PurePosixPath(r).parts), r))
    extract_folder(path, folder, scratch / "tree")
    return Tree(scratch / "tree", scan_files(scratch / "tree"), f"{path}:{folder}")


def status(root: Path | None = None) -> dict[str, Any]:
    """Pin, commit, digests and the patches; without a source checkout, what the installed package recorded when it
    was built.

    Raises: PatchError when there is neither, or the series is not in order.
    """
    record = installed("data") / BUILD_RECORD
    if root is None and not (SOURCES / PIN_FILE).is_file() and record.is_file():
        return {**json.loads(record.read_text(encoding="utf-8")), "from": "wheel"}
    root = find_root() if root is None else root
    series = load_series(root)
    rows = [
        {
            "name": p.name,
            "kind": p.kind,
            "group": p.group,
            "size_bytes": len(p.data),
            "files": len(p.diffs),
            "subject": p.fields.get("Subject", ""),
            "upstream_status": p.status,
            "drop_when": p.fields.get("Drop-when", ""),
        }
        for p in series
    ]
    return {
        **identity(root, series, overlay_files(root)),
        "patches": rows,
        "overlay_files": sorted(overlay_files(root)),
        "from": "checkout",
    }


def new(root: Path, name: str, subject: str, date: str, author: str | None = None) -> Path:
    """Starts a patch: a file with its header to fill in, listed at the end of its group. Gives back its path.

    Raises: PatchError for a bad or used name, or a subject that does not fit it.
    """
    name = name if name.endswith(".patch") else name + ".patch"
    if not NAME.fullmatch(name):
        raise PatchError(f"{name!r} is not <kind>-<area>-<what>.patch with kind hook, fix or feat, in lower case")
    if not SUBJECT.fullmatch(subject):
        raise PatchError(f"subject {subject!r} is not 'kind: area: what'")
    series = load_series(root) if list((root / "patches").glob("*")) else []
    if name in [p.name for p in series]:
        raise PatchError(f"patches/{name} is there already")
    author = author or (series[-1].fields["From"] if series else "pyllamaernie <patches@pyllamaernie>")
    fields = "".join(f"{field}:\n" for field in FIELDS)
    text = f"{ZERO_FROM}\nFrom: {author}\nDate: {date}\nSubject: {subject}\n\n{fields}---\n"
    patch = parse_patch(name, text.encode())
    if wrong := [w for w in problems(patch) if w.startswith("Subject")]:
        raise PatchError("; ".join(wrong))
    order = sorted([*series, patch], key=lambda p: GROUPS.index(p.group))
    path = root / "patches" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(patch.data)
    (path.parent / "series").write_text(series_text(order), encoding="utf-8")
    return path
