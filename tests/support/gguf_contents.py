"""What is in a GGUF file, and copies of one with some of it changed. Not how any of it is made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf as gguf_py
import numpy as np

from pyllamaernie.gguf import file as gguf_file


def data_of(path: Path) -> dict[str, np.ndarray]:
    """The data of every tensor by name, mapped; a quantized one as its bytes."""
    return {t.name: t.data for t in gguf_file.read_gguf(path)[1]}


def payload(path: Path) -> dict[str, tuple]:
    """Every tensor by name as (dimensions above 1, type, bytes)."""
    return {
        t.name: (tuple(n for n in t.shape.tolist() if n > 1), t.tensor_type, t.data.tobytes())
        for t in gguf_py.GGUFReader(path).tensors
    }


def contents(path: Path) -> tuple[dict[str, tuple], dict[str, object]]:
    """Every tensor by name as (shape, type, bytes), and the metadata."""
    reader = gguf_py.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return {t.name: (tuple(t.shape), t.tensor_type, t.data.tobytes()) for t in reader.tensors}, fields


def rewrite(
    path: Path, out: Path, change: Mapping[str, np.ndarray], keys: Mapping[str, tuple[str, object]] | None = None
) -> Path:
    """A copy with some F32 tensors replaced, and keys set: name -> (kind, value)."""
    old_keys, tensors = gguf_file.read_gguf(path)
    assert change.keys() <= {t.name for t in tensors if t.type.name == "F32"}
    new = {name: gguf_file.Key(name, *kind_value) for name, kind_value in (keys or {}).items()}
    rest = [key for name, key in {**old_keys, **new}.items() if name != "general.architecture"]
    written = [
        gguf_file.OutTensor(t.name, t.shape, t.type, lambda t=t: iter((change.get(t.name, t.data),))) for t in tensors
    ]
    gguf_file.write_gguf(out, str(old_keys["general.architecture"].value), rest, written)
    return out


def write_imatrix(
    out: Path, data: Mapping[str, np.ndarray], keys: Mapping[str, tuple[str, object]] | None = None
) -> Path:
    """An importance matrix of these F32 tensors. `keys`: name -> (kind, value)."""
    written = [
        gguf_file.OutTensor(name, array.shape, gguf_file.TensorType.F32, lambda array=array: iter((array,)))
        for name, array in data.items()
    ]
    gguf_file.write_gguf(out, "imatrix", [gguf_file.Key(name, *kv) for name, kv in (keys or {}).items()], written)
    return out
