"""A folder's files with mode and sha256: the list, its digest, and the id that git gives it.

Not where the files come from, nor what they should be: that is `source.py`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from pyllamaernie.errors import PatchError

log = logging.getLogger("pyllamaernie.patches")

Listing: TypeAlias = dict[str, tuple[str, str]]  # path -> (mode, sha256)


@dataclass(frozen=True)
class Tree:
    """A folder that holds upstream's files, with the mode and sha256 of each."""

    path: Path
    files: Listing
    origin: str  # one phrase for people


def slow_notice(text: str, after_s: float = 2.0) -> Callable[[], None]:
    """A function to call in a loop: logs `text` once when `after_s` seconds have passed."""
    end = [time.monotonic() + after_s]

    def tick() -> None:
        if end and time.monotonic() > end[0]:
            end.clear()
            log.info("%s ...", text)

    return tick


def scan_files(path: Path) -> Listing:
    """`{path: (mode, sha256)}` of every file below `path`, without `.git` at its top.

    Raises: PatchError for a link or anything else that is not a plain file.
    """
    if not path.is_dir():
        raise PatchError(f"{path}: no such folder")
    tick = slow_notice(f"reading {path}")
    out = {}
    for folder, dirs, names in os.walk(path):
        at_top = Path(folder) == path
        for name in dirs + names:
            if at_top and name == ".git":
                continue
            full = os.path.join(folder, name)
            if os.path.islink(full) or (name in names and not os.path.isfile(full)):
                raise PatchError(f"{full}: a link or special file; only plain files are allowed in upstream's tree")
        if at_top and ".git" in dirs:
            dirs.remove(".git")
        for name in names:
            if at_top and name == ".git":
                continue
            full = os.path.join(folder, name)
            with open(full, "rb") as f:
                digest = hashlib.sha256(f.read()).hexdigest()
            mode = "100755" if os.stat(full).st_mode & 0o100 else "100644"
            out[os.path.relpath(full, path).replace(os.sep, "/")] = (mode, digest)
            tick()
    return dict(sorted(out.items()))


def files_list(files: Mapping[str, tuple[str, str]]) -> bytes:
    """The list of files as text, one `mode sha256 path` per line, sorted by path."""
    return "".join(f"{mode} {digest} {name}\n" for name, (mode, digest) in sorted(files.items())).encode()


def tree_digest(files: Mapping[str, tuple[str, str]]) -> str:
    """sha256 of `files_list`: the digest that the pin records as `tree_sha256`."""
    return hashlib.sha256(files_list(files)).hexdigest()


def git_tree_id(path: Path, files: Mapping[str, tuple[str, str]]) -> str:
    """The id that git gives a tree of these files: the proof that they are the commit's.

    Source: git's object format, `blob SIZE\\0BYTES` and `tree SIZE\\0` + `MODE NAME\\0ID`... hashed with SHA-1.
    """
    root: dict[str, Any] = {}  # name -> (mode, id of the file), or such a dict for a folder
    for name, (mode, _) in files.items():
        *dirs, leaf = name.split("/")
        node = root
        for d in dirs:
            node = node.setdefault(d, {})
        data = (path / name).read_bytes()
        node[leaf] = (mode, hashlib.sha1(b"blob %d\0" % len(data) + data).digest())

    def tree_id(node: dict[str, Any]) -> bytes:
        rows = []
        for name, value in node.items():
            if isinstance(value, dict):
                rows.append((name.encode() + b"/", b"40000 " + name.encode() + b"\0" + tree_id(value)))
            else:
                rows.append((name.encode(), value[0].encode() + b" " + name.encode() + b"\0" + value[1]))
        body = b"".join(row for _, row in sorted(rows))
        return hashlib.sha1(b"tree %d\0" % len(body) + body).digest()

    return tree_id(root).hex()
