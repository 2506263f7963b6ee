"""An importance matrix as the quantizers take it: for each weight matrix the mean squared input of every column.

Reads the files of `imatrix` and of llama-imatrix, GGUF and the older binary form. Normalized as
llama-quantize does, in float32: sums over counts, ones where nothing was counted.
Source: llama.cpp tools/quantize/quantize.cpp `load_imatrix` and common/imatrix-loader.cpp at the pin.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pyllamaernie.errors import CorruptModelError, InputError, ModelNotFoundError
from pyllamaernie.gguf.file import Key, TensorType, read_gguf

_N_NAME_MAX = 4096
_N_ENTRIES_MAX = 10**6


@dataclass(frozen=True)
class Importance:
    """The entries of one file. Shapes: columns[name] (n_mat, n_cols) float32, counts[name] (n_mat,) or (1,) int64."""

    path: Path
    columns: Mapping[str, np.ndarray]
    counts: Mapping[str, np.ndarray]
    datasets: tuple[str, ...]
    n_chunks: int

    def digest(self) -> str:
        """A hash of all entries."""
        out = hashlib.sha256()
        for name in sorted(self.columns):
            out.update(f"{name} {self.columns[name].shape}\n".encode())
            out.update(np.ascontiguousarray(self.columns[name]).data)
        return out.hexdigest()

    def keys(self) -> list[Key]:
        """What llama-quantize says about the file in the metadata of its output; of its path only the name."""
        keys = [Key("quantize.imatrix.file", "str", self.path.name)]
        if self.datasets:
            keys.append(Key("quantize.imatrix.dataset", "str", Path(self.datasets[0]).name))
        keys.append(Key("quantize.imatrix.entries_count", "u32", len(self.columns)))
        if self.n_chunks > 0:
            keys.append(Key("quantize.imatrix.chunks_count", "u32", self.n_chunks))
        return keys


def read_importance(path: str | os.PathLike[str]) -> Importance:
    """The entries of an importance matrix.

    Raises: ModelNotFoundError, CorruptModelError for a broken file, InputError for a value that is no weight.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            is_gguf = file.read(4) == b"GGUF"
            file.seek(0)
            found = _read_gguf(path) if is_gguf else _read_legacy(path, file)
    except FileNotFoundError:
        raise ModelNotFoundError(f"no importance matrix at {path}") from None
    for name, columns in found.columns.items():
        bad = ~(np.isfinite(columns) & (columns >= 0))
        if bad.any():
            i, j = map(int, np.argwhere(bad)[0])
            raise InputError(
                f"{path}: {name} is {columns[i, j]} in column {j} of matrix {i}; expected a finite number from 0 up"
            )
    return found


def _read_gguf(path: Path) -> Importance:
    from pyllamaernie.gguf.header import read_header

    read_header(path)  # also finds a file that is cut short
    try:
        keys, tensors = read_gguf(path)
    except (ValueError, KeyError, IndexError) as error:
        raise CorruptModelError(f"{path} cannot be read: {error}") from None
    kind = keys["general.type"].value if "general.type" in keys else "a model"
    if kind != "imatrix" or "imatrix.chunk_count" not in keys:
        raise InputError(f"{path} holds {kind!r}; an importance matrix is needed (`pyllamaernie imatrix` makes one)")
    data = {t.name: t.data for t in tensors if t.type == TensorType.F32}
    names = sorted({n.removesuffix(".in_sum2") for n in data if n.endswith(".in_sum2")})
    columns, counts = {}, {}
    for name in names:
        if f"{name}.counts" not in data:
            raise CorruptModelError(f"{path}: {name} has sums but no counts")
        sums = np.array(data[f"{name}.in_sum2"], np.float32).reshape(-1)
        count = np.rint(np.asarray(data[f"{name}.counts"], np.float32).reshape(-1))
        if not np.isfinite(count).all() or (count < 0).any() or len(sums) % max(len(count), 1):
            raise CorruptModelError(f"{path}: {name} has {len(sums)} sums for the counts {count.tolist()[:4]}")
        rows = sums.reshape(len(count), -1)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = rows / count.astype(np.float32)[:, None]
        columns[name] = np.where(count[:, None] > 0, means, np.float32(1)).astype(np.float32)
        counts[name] = count.astype(np.int64)
    if not columns:
        raise InputError(f"{path} holds no entries")
    datasets = keys["imatrix.datasets"].value if "imatrix.datasets" in keys else []
    text = tuple(d.decode("utf-8", "replace") if isinstance(d, bytes) else str(d) for d in datasets)
    return Importance(path, columns, counts, text, int(keys["imatrix.chunk_count"].value))


def _read_legacy(path: Path, file: BinaryIO) -> Importance:
    """The form before GGUF: (name, calls, values) with values already divided by counts and multiplied by calls."""

    def number() -> int:
        return int(struct.unpack("<i", _exactly(file, 4))[0])

    columns, counts = {}, {}
    try:
        n_entries = number()
        if not 0 < n_entries <= _N_ENTRIES_MAX:
            raise ValueError(f"{n_entries} entries")
        for _ in range(n_entries):
            n_name = number()
            if not 0 < n_name <= _N_NAME_MAX:
                raise ValueError(f"a name of {n_name} bytes")
            name = _exactly(file, n_name).decode()
            n_calls, n_values = number(), number()
            if n_values < 1:
                raise ValueError(f"{name} has {n_values} values")
            values = np.frombuffer(_exactly(file, 4 * n_values), "<f4")
            columns[name] = (values / np.float32(n_calls) if n_calls > 0 else values).reshape(1, -1)
            counts[name] = np.array([n_calls])
    except (ValueError, EOFError) as error:
        raise CorruptModelError(f"{path} is not an importance matrix, in GGUF or older: {error}") from None
    tail = file.read(8)
    n_chunks, n_name = struct.unpack("<ii", tail) if len(tail) == 8 else (0, 0)
    dataset = file.read(n_name).decode("utf-8", "replace") if 0 < n_name <= _N_NAME_MAX else ""
    return Importance(path, columns, counts, (dataset,) if dataset else (), n_chunks)


def _exactly(file: BinaryIO, n: int) -> bytes:
    data = file.read(n)
    if len(data) != n:
        raise EOFError(f"it ends {n - len(data)} bytes early")
    return data
