"""What a quantizer reads: the metadata of a model, and its tensors piece by piece, in the type they are stored in.

Here GGUF files, whole or split; `convert/source.py` makes the same of a Hugging Face folder.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pyllamaernie.errors import CorruptModelError, UnsupportedInputError
from pyllamaernie.gguf.file import Key, TensorType, read_gguf
from pyllamaernie.gguf.header import Header, read_header
from pyllamaernie.quant.native import TYPES

PIECE_VALUES = 2 * 2**20  # at most in one piece: 8 MiB as float32

_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class Piece:
    """Rows of one matrix of a tensor, that is of one expert where there are experts. `load()` reads them.

    Shapes: load() -> (n_rows, row bytes) uint8
    """

    first_row: int
    n_rows: int
    load: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Weights:
    """A stored tensor: `shape` in numpy order, all dimensions but the last counted as rows.

    `pieces(n)` yields it in order, in pieces of about `n` values (PIECE_VALUES if left out). Whoever takes the next
    piece must be alone; `load` of a piece may run anywhere.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    n_bytes: int
    pieces: Callable[..., Iterator[Piece]]

    @property
    def n_cols(self) -> int:
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def n_matrices(self) -> int:
        return math.prod(self.shape[:-2])

    @property
    def rows_per_matrix(self) -> int:
        return self.shape[-2] if len(self.shape) > 1 else 1


@dataclass(frozen=True)
class ModelSource:
    """A model to be written again. `fingerprint` changes when the files do; `split.*` keys are left out of `keys`."""

    path: Path
    arch: str
    keys: Mapping[str, Key]
    weights: Sequence[Weights]
    fingerprint: str


def gguf_source(path: str | os.PathLike[str]) -> ModelSource:
    """A GGUF model, of one file or of all the parts that lie beside the one named.

    Raises: ModelNotFoundError, CorruptModelError, UnsupportedInputError for what is no model.
    """
    headers = [read_header(part) for part in gguf_parts(path)]
    arch = headers[0].arch
    if not arch or arch == "imatrix":
        raise UnsupportedInputError(f"{path} holds {arch or 'no model'!r}; a model's GGUF is needed")
    try:
        keys, _ = read_gguf(headers[0].path)
    except (ValueError, KeyError, IndexError) as error:
        raise CorruptModelError(f"{path} cannot be read: {error}") from None
    weights = [_weights(header, row) for header in headers for row in header.tensors]
    names = [w.name for w in weights]
    if twice := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        raise CorruptModelError(f"{path}: {twice[0]} is in more than one part")
    expected = int(headers[0].metadata.get("split.tensors.count", len(weights)))
    if expected != len(weights):
        raise CorruptModelError(f"{path}: its parts hold {len(weights)} tensors, they say {expected}")
    own = {name: key for name, key in keys.items() if not name.startswith("split.")}
    return ModelSource(Path(path), arch, own, weights, file_fingerprint([h.path for h in headers]))


def gguf_parts(path: str | os.PathLike[str]) -> list[Path]:
    """The files of a GGUF model, given any of them. Raises: the errors of `read_header`, for a missing part too."""
    path = Path(path)
    header = read_header(path)
    n_parts = int(header.metadata.get("split.count", 0))
    if n_parts <= 1:
        return [path]
    name = _SPLIT_NAME.fullmatch(path.name)
    if name is None or int(name[3]) != n_parts:
        raise UnsupportedInputError(
            f"{path} is one of {n_parts} parts, but is not named NAME-00001-of-{n_parts:05}.gguf"
        )
    return [path.with_name(f"{name[1]}-{i + 1:05}-of-{n_parts:05}.gguf") for i in range(n_parts)]


def file_fingerprint(paths: Sequence[Path]) -> str:
    """A hash of the names, sizes and times of files: enough to notice that one was replaced."""
    stats = [(path.name, path.stat()) for path in paths]
    return hashlib.sha256(repr([(name, s.st_size, s.st_mtime_ns) for name, s in stats]).encode()).hexdigest()


def cut(
    first_row: int, n_rows: int, n_cols: int, rows_per_matrix: int, n_values: int = PIECE_VALUES
) -> Iterator[tuple[int, int]]:
    """A range of rows in (first row, rows) of at most `n_values`, none of which crosses into the next matrix."""
    step = max(1, n_values // n_cols)
    row, end = first_row, first_row + n_rows
    while row < end:
        n = min(step, end - row, rows_per_matrix - row % rows_per_matrix)
        yield row, n
        row += n


def _weights(header: Header, row: tuple[str, tuple[int, int, int, int], str, int, int]) -> Weights:
    name, ne, type_name, offset, n_bytes = row
    n_dims = max((i + 1 for i, n in enumerate(ne) if n > 1), default=1)
    shape = tuple(reversed(ne[:n_dims]))
    n_cols, n_rows = shape[-1], math.prod(shape[:-1])
    row_bytes = n_bytes // n_rows
    path = header.path

    def load(first_row: int, n: int) -> np.ndarray:
        data = np.empty((n, row_bytes), np.uint8)
        with open(path, "rb", buffering=0) as file:
            file.seek(offset + first_row * row_bytes)
            view, done = data.data.cast("B"), 0
            while done < data.nbytes:
                n_read = file.readinto(view[done:])
                if not n_read:
                    raise CorruptModelError(f"{path} became shorter while it was read: {name} ends early")
                done += n_read
        return data

    def pieces(n_values: int = PIECE_VALUES) -> Iterator[Piece]:
        for first, n in cut(0, n_rows, n_cols, shape[-2] if n_dims > 1 else 1, n_values):
            yield Piece(first, n, partial(load, first, n))

    return Weights(name, shape, type_name.upper(), n_bytes, pieces)


def tensor_type(name: str) -> TensorType:
    """The gguf package's number of a type. Raises: UnsupportedInputError for one that the package does not know."""
    found = TensorType.__members__.get(name)
    if found is None and name in TYPES:
        raise UnsupportedInputError(f"type {name} is not known to the installed gguf package; a newer one may know it")
    if found is None:
        raise UnsupportedInputError(f"type {name} is not known; types are {', '.join(TYPES)}")
    return found
