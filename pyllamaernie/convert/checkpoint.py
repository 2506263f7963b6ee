"""A Hugging Face checkpoint folder: its JSON files, and its tensors as memory-mapped rows.

Only a window of rows of one tensor is mapped at a time, so that reading a file of any size keeps little of it resident.
Source of the file layout: https://github.com/huggingface/safetensors (8-byte length, JSON header, data).
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pyllamaernie.convert.json_file import CONFIG, N_BYTES_MAX, is_text, open_regular, parse_json, read_json, shown
from pyllamaernie.errors import ConvertError, MissingFileError, TensorMappingError

# BF16 rows are handed out as the bit patterns.
_STORED = {
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F64": "<f8",
    "I64": "<i8",
    "I32": "<i4",
    "U8": "u1",
    "I8": "i1",
    "BOOL": "?",
    "I16": "<i2",
    "U16": "<u2",
}
_SUFFIXES = (".json", ".safetensors", ".model", ".jinja", ".md", ".txt")
INDEX = "model.safetensors.index.json"
FLOAT_TYPES = ("F32", "F16", "BF16")
_N_DIMS_MAX, _DIM_MAX, _NAME_MAX = 8, 2**48, 512


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, seen as rows: all leading dimensions flattened, the last one is the row."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def n_cols(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[:-1])

    def rows(self, start: int, stop: int) -> np.ndarray:
        """A mapped window in the stored type; it is unmapped when the array goes.

        Shapes: -> (stop - start, n_cols)
        """
        kind = np.dtype(_STORED[self.dtype])
        offset = self.offset + start * self.n_cols * kind.itemsize
        return np.memmap(self.path, dtype=kind, mode="r", offset=offset, shape=(stop - start, self.n_cols))

    def rows_f32(self, start: int, stop: int) -> np.ndarray:
        """The same window as float32, in memory of its own."""
        data = self.rows(start, stop)
        if self.dtype == "BF16":
            return (data.astype(np.uint32) << 16).view(np.float32)
        return data.astype(np.float32)


@dataclass(frozen=True)
class Checkpoint:
    """A folder's configuration and tensors.

    Without weight files (only for a dry run) `tensors` is empty, and `names` are those of the index, None without one.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    has_weights: bool = True
    names: frozenset[str] | None = None
    _read: dict[str, dict[str, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder, {} when there is none; read once. Raises: MissingFileError, ConvertError."""
        if name not in self._read:
            path = self.folder / name
            self._read[name] = read_json(path) if os.path.lexists(path) else {}
        return self._read[name]


def open_checkpoint(folder: Path, *, need_weights: bool = True) -> Checkpoint:
    """Reads config.json and the headers of all safetensors files.

    With `need_weights=False` a header is enough of a file, and when files are missing the index, or nothing, will do.
    Raises: MissingFileError, and ConvertError for a broken file.
    """
    config = read_config(folder)
    tensors, names = read_tensors(folder, need_weights=need_weights)
    return Checkpoint(folder, config, tensors or {}, tensors is not None, names)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint's folder. Raises: MissingFileError, and ConvertError for a broken file."""
    if not folder.is_dir():
        raise MissingFileError(
            f"{folder}: no such folder; pass the folder that holds config.json and the .safetensors files"
        )
    path = folder / CONFIG
    if not os.path.lexists(path):
        raise MissingFileError(f"{path}: missing; pass the folder of a Hugging Face checkpoint")
    check_kinds(folder)
    return read_json(path)


def check_kinds(folder: Path) -> None:
    """That nothing with a checkpoint file's name is a pipe or device, which whoever opens it would wait for.

    Raises: MissingFileError.
    """
    for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        try:
            kind = path.stat().st_mode
        except OSError:  # a link to nowhere: named when the file is needed
            continue
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind) and path.suffix in _SUFFIXES:
            open_regular(path).close()


def read_tensors(
    folder: Path, *, need_weights: bool = True
) -> tuple[dict[str, StoredTensor] | None, frozenset[str] | None]:
    """The tensors of a folder's safetensors files by name; without them None, and the names in the index if any.

    With `need_weights=False` a header is enough of a file, and files may be missing.
    """
    index = folder / INDEX
    weight_map = _weight_map(index) if os.path.lexists(index) else None
    if not need_weights:
        files = set(weight_map.values()) if weight_map else {p.name for p in folder.glob("model*.safetensors")}
        if not files or not all((folder / file).is_file() for file in files):
            return None, frozenset(weight_map) if weight_map else None
    return _index_tensors(folder, weight_map, need_weights), None


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError(f"{index}: has no weight_map; download the file again")
    for name, file in weight_map.items():
        _check_name(name, index)
        if not isinstance(file, str) or not _stays_inside(file):
            raise ConvertError(
                f"{index}: {name} is in {shown(file)}; expected the name of a .safetensors file in this folder"
            )
    return weight_map


def _stays_inside(file: str) -> bool:
    """Whether it is the path of a safetensors file below the folder that it counts from."""
    parts = PurePosixPath(file).parts
    plain = file.isprintable() and is_text(file) and "\\" not in file
    return plain and file.endswith(".safetensors") and ".." not in parts and not PurePosixPath(file).is_absolute()


def _check_name(name: str, path: Path) -> None:
    if not name or len(name) > _NAME_MAX or not name.isprintable() or not is_text(name):
        raise ConvertError(f"{path}: a tensor is called {shown(name)}; expected 1 to {_NAME_MAX} printable characters")


def _index_tensors(folder: Path, weight_map: dict[str, str] | None, whole: bool) -> dict[str, StoredTensor]:
    if weight_map is not None:
        files = sorted(set(weight_map.values()))
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise MissingFileError(
                f"{folder}: {len(missing)} of {len(files)} weight files are missing: {_some(missing)}; "
                "finish the download"
            )
    else:
        files = sorted(p.name for p in folder.glob("model*.safetensors"))
        if not files:
            other = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pdparams", ".pt", ".safetensors"))
            hint = f"; found {_some(other)}, which cannot be converted" if other else ""
            raise MissingFileError(f"{folder}: no model.safetensors and no {INDEX}{hint}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _read_header(folder / file, whole).items():
            if weight_map is not None and weight_map.get(name) != file:
                continue  # a leftover shard may hold what the index takes from elsewhere
            if name in tensors:
                raise TensorMappingError(f"{name}: in {tensors[name].path.name} and in {file}; keep one of the files")
            tensors[name] = tensor
    if weight_map is not None:
        lost = sorted(set(weight_map) - set(tensors))
        if lost:
            raise TensorMappingError(
                f"{INDEX} names tensors that its files do not hold: {_some(lost)}; download the files again"
            )
    return tensors


def _read_header(path: Path, whole: bool) -> dict[str, StoredTensor]:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        n_header = int.from_bytes(file.read(8), "little")
        if size < 8 or n_header > size - 8:
            raise ConvertError(f"{path}: not a safetensors file or cut short ({size} bytes); download it again")
        header = parse_json(file.read(min(n_header, N_BYTES_MAX + 1)), f"{path}: broken safetensors header")
    out: dict[str, StoredTensor] = {}
    ends: dict[str, int] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        _check_name(name, path)
        dtype, shape, begin, end = _entry(name, entry, path)
        if whole and 8 + n_header + end > size:
            raise ConvertError(
                f"{path}: cut short, {name} ends at byte {8 + n_header + end} of {size}; download it again"
            )
        if dtype in _STORED and math.prod(shape) * np.dtype(_STORED[dtype]).itemsize != end - begin:
            raise ConvertError(
                f"{path}: {name} has {end - begin} bytes, not what {dtype} {list(shape)} takes; download it again"
            )
        out[name], ends[name] = StoredTensor(name, path, dtype, shape, 8 + n_header + begin), 8 + n_header + end
    _check_apart(out, ends)
    return out


def _entry(name: str, entry: Any, path: Path) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, begin and end of a header's entry. Raises: ConvertError for what the format does not allow."""
    if not isinstance(entry, Mapping):
        raise ConvertError(f"{path}: {name} is {shown(entry)}, expected an object; download it again")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not 0 < len(dtype) <= 32 or not dtype.isprintable():
        raise ConvertError(f"{path}: {name} has dtype {shown(dtype)}, expected one such as 'BF16'; download it again")
    if not isinstance(shape, list) or len(shape) > _N_DIMS_MAX or not all(_is_size(n, _DIM_MAX) for n in shape):
        seen = [shown(n) for n in shape[: _N_DIMS_MAX + 1]] if isinstance(shape, list) else shown(shape)
        raise ConvertError(
            f"{path}: {name} has shape {seen}, expected at most {_N_DIMS_MAX} whole numbers; download it again"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n, 2**62) for n in offsets):
        seen = [shown(n) for n in offsets[:3]] if isinstance(offsets, list) else shown(offsets)
        raise ConvertError(
            f"{path}: {name} has data_offsets {seen}, expected two whole numbers, none below 0; download it again"
        )
    begin, end = offsets
    if begin > end:
        raise ConvertError(f"{path}: {name} has data_offsets {offsets}, which end before they begin; download it again")
    return dtype, tuple(shape), begin, end


def _is_size(value: Any, high: int) -> bool:
    return type(value) is int and 0 <= value <= high


def _check_apart(tensors: Mapping[str, StoredTensor], ends: Mapping[str, int]) -> None:
    """Raises ConvertError where two tensors share bytes, which the format does not allow."""
    last: StoredTensor | None = None
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, ends[t.name])):
        if ends[tensor.name] == tensor.offset:
            continue
        if last is not None and tensor.offset < ends[last.name]:
            raise ConvertError(
                f"{tensor.path}: {last.name} ends at byte {ends[last.name]}, but {tensor.name} begins at byte "
                f"{tensor.offset}; expected data_offsets that do not overlap, download it again"
            )
        last = tensor


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
