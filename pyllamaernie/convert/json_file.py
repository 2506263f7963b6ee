"""JSON that nobody vouches for: read within limits, its values taken by type and range.

What a downloaded folder says is bounded before it is believed. Every refusal is one line that names the file, the key,
the value and what is allowed.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from pyllamaernie.errors import ConvertError, MissingFileError

CONFIG = "config.json"
N_BYTES_MAX = 32 * 2**20  # a tokenizer.json of 100,000 pieces takes a third of it, an index of any release a tenth
N_CONTAINERS_MAX = 1_000_000  # objects and lists; each takes some hundred bytes of memory
DEPTH_MAX = 64
U32_MAX = 2**32 - 1
F32_MAX = 3.4e38

_KINDS = {stat.S_IFIFO: "pipe", stat.S_IFDIR: "folder", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NAMES = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}


def shown(value: Any) -> str:
    """A value as a message shows it: on one line, and not longer than a line. Depth and size do not matter."""
    if isinstance(value, (dict, list)):
        return f"{_NAMES[type(value)]} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**40:  # Python refuses to write very long ones
        return f"a number of {value.bit_length()} bits"
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-10:]}"


def open_regular(path: Path) -> IO[bytes]:
    """An existing file, opened to be read; never waits for the other end of a pipe. Raises: MissingFileError."""
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be read ({error.strerror})") from error
    kind = stat.S_IFMT(os.fstat(number).st_mode)
    if kind != stat.S_IFREG:
        os.close(number)
        raise MissingFileError(f"{path}: is a {_KINDS.get(kind, 'socket')}, expected a regular file")
    return open(number, "rb")


def read_whole(path: Path) -> bytes:
    """All of a file that is not large. Raises: MissingFileError, and ConvertError for one that is."""
    with open_regular(path) as file:
        data = file.read(N_BYTES_MAX + 1)
    if len(data) > N_BYTES_MAX:
        raise ConvertError(f"{path}: more than {N_BYTES_MAX} bytes, which no known model needs")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises: MissingFileError, and ConvertError saying what is wrong with it."""
    return parse_json(read_whole(path), str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """An object. `where` names the text in messages.

    Raises: ConvertError for what is not JSON in UTF-8, for NaN and numbers beyond a double, for keys that come twice,
    for lone surrogates, and for texts that are larger or nested deeper than any of a real model.
    """
    if len(data) > N_BYTES_MAX:
        raise ConvertError(f"{where}: more than {N_BYTES_MAX} bytes of JSON, which no known model needs")
    if data.count(b"{") + data.count(b"[") > N_CONTAINERS_MAX:
        raise ConvertError(f"{where}: more than {N_CONTAINERS_MAX} objects and lists, which no known model needs")
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_object, parse_float=_finite, parse_constant=_no_constant
        )
        check_depth(value)
        if _SURROGATE.search(data):
            _check_texts(value)
    except RecursionError:
        raise ConvertError(f"{where}: nested more than {DEPTH_MAX} deep") from None
    except ValueError as error:
        raise ConvertError(f"{where}: cannot be read as JSON ({_short(error)}); download it again") from error
    if not isinstance(value, dict):
        raise ConvertError(f"{where}: holds {_NAMES.get(type(value), 'a number')}, expected an object")
    return value


def _short(error: ValueError) -> str:
    text = str(error)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} comes twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is beyond a double")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def check_depth(value: Any) -> None:
    """Raises RecursionError for values that are nested more than DEPTH_MAX deep, without recursion."""
    level = [value]
    for _ in range(DEPTH_MAX):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, (dict, list))]
        if not level:
            return
    raise RecursionError


def _check_texts(value: Any) -> None:
    for inner in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
        if isinstance(inner, (dict, list)):
            _check_texts(inner)
        elif isinstance(inner, str) and not is_text(inner):
            raise ValueError(f"{shown(inner)} holds half of a surrogate pair")


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


# ---- values by type and range; `names` are spellings of one key, the first that is there and not null is taken


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    return next(((name, values[name]) for name in names if values.get(name) is not None), (names[0], None))


def _missing(names: tuple[str, ...], where: str) -> ConvertError:
    return ConvertError(f"{where}: no {' or '.join(names)}; it is required")


def as_whole(value: Any, name: str, low: int, high: int, where: str = CONFIG) -> int:
    """The value as a whole number from `low` to `high`. Raises: ConvertError."""
    if type(value) is not int or not low <= value <= high:  # a bool is no number here
        raise ConvertError(f"{where}: {name} is {shown(value)}; expected a whole number from {low} to {high}")
    return value


def whole(
    values: Mapping[str, Any], *names: str, low: int, high: int, default: int | None = None, where: str = CONFIG
) -> int:
    """A whole number. Raises: ConvertError for another value, and for none unless there is a default."""
    name, value = _first(values, names)
    if value is None:
        if default is None:
            raise _missing(names, where)
        return default
    return as_whole(value, name, low, high, where)


def number(
    values: Mapping[str, Any], *names: str, low: float, high: float, default: float | None = None, where: str = CONFIG
) -> float:
    """A number, whole or not. Raises: as `whole`."""
    name, value = _first(values, names)
    if value is None:
        if default is None:
            raise _missing(names, where)
        return default
    if type(value) not in (int, float) or not low <= value <= high:
        raise ConvertError(f"{where}: {name} is {shown(value)}; expected a number from {low:g} to {high:g}")
    return value  # type: ignore[no-any-return]


def flag(values: Mapping[str, Any], name: str, where: str = CONFIG) -> bool | None:
    """true, false or, where the key is missing or null, None. Raises: ConvertError for anything else."""
    value = values.get(name)
    if value is not None and type(value) is not bool:
        raise ConvertError(f"{where}: {name} is {shown(value)}; expected true or false")
    return value


def text(values: Mapping[str, Any], name: str, where: str = CONFIG) -> str | None:
    """A text, None where the key is missing or null. Raises: ConvertError for anything else."""
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise ConvertError(f"{where}: {name} is {shown(value)}; expected a text")
    return value


def section(values: Mapping[str, Any], name: str, where: str = CONFIG) -> dict[str, Any]:
    """An object inside, {} where the key is missing or null. Raises: ConvertError for anything else."""
    value = values.get(name)
    if value is not None and not isinstance(value, dict):
        raise ConvertError(f"{where}: {name} is {shown(value)}; expected an object")
    return value or {}
