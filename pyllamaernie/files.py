"""Files by name and size: sizes as people write them, and outputs that appear only when they are whole."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyllamaernie.errors import InputError, OutputError, OutputNameError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{u}i": 1 << 10 * (i + 1) for i, u in enumerate("kmgt")}
_HIDDEN = re.compile(r"\..+\.[0-9a-f]{8}\.partial")
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of "12GiB", "800 MB", "1.5g" or "123456"; with i powers of 1024, without powers of 1000.

    Raises: InputError naming what is allowed.
    """
    found = _SIZE.fullmatch(text)
    if found is None or found[2].lower() not in _UNITS or not float(found[1]) > 0:
        raise InputError(f"size {text!r}: expected bytes, as in 12GiB, 800MB (powers of 1000) or 123456")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def size_text(n_bytes: int) -> str:
    """Bytes as people read them: "1.50 GiB", "12.00 MiB", "3.00 KiB" or "17 B"."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if n_bytes >= 1 << power:
            return f"{n_bytes / (1 << power):.2f} {unit}"
    return f"{n_bytes} B"


def check_output(output: Path, overwrite: bool, inputs: Iterable[Path] = (), ending: str = "") -> None:
    """Whether a file may be written under a name, told alike by all verbs. `inputs` are read meanwhile.

    Raises: OutputError, OutputNameError.
    """
    folder = output.absolute().parent
    if ending and output.suffix != ending:
        raise OutputNameError(f"{output}: the output's name must end in {ending}")
    if not folder.is_dir():
        raise OutputError(f"{folder} is not a folder")
    if output.is_dir() or (os.path.lexists(output) and not overwrite):
        raise OutputError(f"{output} exists; choose another name or allow overwriting (--overwrite)")
    if output.exists() and any(output.samefile(path) for path in inputs):
        raise OutputError(f"{output} is what is read; choose another name")


def write_text(path: Path, text: str) -> None:
    """Write a text file, or nothing: it is written beside and renamed."""
    with hidden_file(path) as hidden:
        hidden.write_text(text, encoding="utf-8")
        os.replace(hidden, path)


@contextmanager
def hidden_file(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, to be written and renamed; what is still there at the end is removed.

    A lock on it tells other processes that it is in use. What no living process holds is removed first, so that a
    process that was killed leaves nothing for long. Raises: OSError.
    """
    with _held(path, lambda hidden: os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)) as hidden:
        yield hidden


@contextmanager
def hidden_folder(path: Path) -> Iterator[Path]:
    """The same as a folder, removed at the end with all that is in it."""

    def make(hidden: Path) -> int:
        hidden.mkdir()
        return os.open(hidden, os.O_RDONLY | os.O_DIRECTORY)

    with _held(path, make) as hidden:
        yield hidden


@contextmanager
def _held(path: Path, make: Callable[[Path], int]) -> Iterator[Path]:
    remove_stale(path.absolute().parent)
    while True:
        hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        number = make(hidden)
        with suppress(OSError):  # a file system without locks: then nobody removes what is left either
            fcntl.flock(number, fcntl.LOCK_EX)
        if hidden.exists():
            break
        os.close(number)  # another process took it for a dead one's, before it was locked
    try:
        yield hidden
    finally:
        _remove(hidden)
        os.close(number)


def remove_stale(folder: Path) -> None:
    """Removes the hidden files and folders of processes that are no more, as far as that is known and allowed."""
    for path in folder.glob(".*.partial"):
        if _HIDDEN.fullmatch(path.name) is None or path.is_symlink():
            continue
        with suppress(OSError):
            number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
            finally:
                os.close(number)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
