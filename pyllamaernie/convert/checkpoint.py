"""A Hugging Face checkpoint folder: its JSON files, and its tensors as memory-mapped rows.

Only a window of rows of one tensor is mapped at a time, so that reading a file of any size keeps little of it resident.
Source of the file layout: https://github.com/huggingface/safetensors (8-byte length, JSON header, data).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
INDEX = "model.safetensors.index.json"
FLOAT_TYPES = ("F32", "F16", "BF16")


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

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder, {} when there is none."""
        path = self.folder / name
        return _read_json(path) if path.is_file() else {}


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
    path = folder / "config.json"
    if not path.is_file():
        raise MissingFileError(f"{path}: missing; pass the folder of a Hugging Face checkpoint")
    return _read_json(path)


def read_tensors(
    folder: Path, *, need_weights: bool = True
) -> tuple[dict[str, StoredTensor] | None, frozenset[str] | None]:
    """The tensors of a folder's safetensors files by name; without them None, and the names in the index if any.

    With `need_weights=False` a header is enough of a file, and files may be missing.
    """
    index = folder / INDEX
    weight_map = _weight_map(index) if index.is_file() else None
    if not need_weights:
        files = set(weight_map.values()) if weight_map else {p.name for p in folder.glob("model*.safetensors")}
        if not files or not all((folder / file).is_file() for file in files):
            return None, frozenset(weight_map) if weight_map else None
    return _index_tensors(folder, weight_map, need_weights), None


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError(f"{index}: has no weight_map; download the file again")
    return weight_map


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
    size = path.stat().st_size
    with open(path, "rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        if size < 8 or n_header > size - 8:
            raise ConvertError(f"{path}: not a safetensors file or cut short ({size} bytes); download it again")
        try:
            header = json.loads(file.read(n_header))
        except ValueError as error:
            raise ConvertError(f"{path}: broken safetensors header ({error}); download it again") from error
    out = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        if whole and 8 + n_header + end > size:
            raise ConvertError(
                f"{path}: cut short, {name} ends at byte {8 + n_header + end} of {size}; download it again"
            )
        if dtype in _STORED and math.prod(shape) * np.dtype(_STORED[dtype]).itemsize != end - begin:
            raise ConvertError(
                f"{path}: {name} has {end - begin} bytes, not what {dtype} {list(shape)} takes; download it again"
            )
        out[name] = StoredTensor(name, path, dtype, shape, 8 + n_header + begin)
    return out


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConvertError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConvertError(f"{path}: holds a {type(value).__name__}, expected an object")
    return value


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
