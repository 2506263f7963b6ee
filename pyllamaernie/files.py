"""Files by name and size: sizes as people write them, and texts that appear only when they are whole."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from pyllamaernie.errors import InputError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{u}i": 1 << 10 * (i + 1) for i, u in enumerate("kmgt")}
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


def write_text(path: Path, text: str) -> None:
    """Write a text file, or nothing: it is written beside and renamed."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.absolute().parent) as folder:
        (Path(folder) / path.name).write_text(text, encoding="utf-8")
        os.replace(Path(folder) / path.name, path)
