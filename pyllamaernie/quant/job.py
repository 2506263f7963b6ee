"""What a writer is to do, checked before anything is written: each tensor's type, place and importance, the header.

Everything that can be wrong with the choice of types, the source or the importance matrix is found here, and the exact
size of the file is known afterwards.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyllamaernie.errors import InputError
from pyllamaernie.gguf.file import QUANTIZATION_VERSION, Key, file_type, gguf_header
from pyllamaernie.machine import installed
from pyllamaernie.quant import native
from pyllamaernie.quant.importance import Importance
from pyllamaernie.quant.source import ModelSource, Weights, tensor_type

_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
OUTPUTS = (*_EMBEDDINGS, "output.weight")


@dataclass(frozen=True)
class OutTensor:
    """One tensor of the output: where its bytes go, and what they are made with."""

    number: int
    weights: Weights
    type: str
    offset: int
    row_bytes: int
    columns: np.ndarray | None  # importance, (n_matrices, n_cols) float32

    @property
    def n_bytes(self) -> int:
        return self.row_bytes * self.weights.n_rows


@dataclass(frozen=True)
class Job:
    """A checked job: nothing is written yet, and the size of the file is known."""

    output: Path
    inputs: tuple[Path, ...]
    header: bytes
    tensors: tuple[OutTensor, ...]
    digest: str
    warnings: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        last = self.tensors[-1]
        return last.offset + -(-last.n_bytes // 32) * 32

    @property
    def n_params(self) -> int:
        return sum(math.prod(t.weights.shape) for t in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits of all tensors over their number of weights."""
        return 8 * sum(t.n_bytes for t in self.tensors) / self.n_params


def plan_job(
    source: ModelSource,
    types: Mapping[str, str],
    output: str | os.PathLike[str],
    *,
    importance: Importance | None = None,
    keys: Sequence[Key] = (),
    allow_requantize: bool = False,
) -> Job:
    """Everything that can be wrong is found here, and the exact size of the file is known afterwards.

    Raises: InputError, QuantizeError.
    """
    have = {weights.name for weights in source.weights}
    if unknown := sorted(set(types) - have):
        raise InputError(f"{source.path} has no tensor {unknown[0]!r} ({len(unknown)} such names among the types)")
    if not source.weights:
        raise InputError(f"{source.path} holds no tensors")
    warnings: list[str] = []
    chosen = [_checked_type(w, types.get(w.name, w.type).upper(), allow_requantize) for w in source.weights]
    columns = [_columns(w, t, importance, warnings) for w, t in zip(source.weights, chosen, strict=True)]
    if importance is not None:
        warnings += _coverage(source, chosen, importance)
    rows = [_row_bytes(w, t) for w, t in zip(source.weights, chosen, strict=True)]
    all_keys = _metadata(source, chosen, rows, importance, keys)
    table = [
        (w.name, w.shape, tensor_type(t), n * w.n_rows) for w, t, n in zip(source.weights, chosen, rows, strict=True)
    ]
    header, offsets = gguf_header(source.arch, all_keys, table)
    tensors = tuple(
        OutTensor(i, *row) for i, row in enumerate(zip(source.weights, chosen, offsets, rows, columns, strict=True))
    )
    about = [source.fingerprint, importance.digest() if importance else "", _encoder_version()]
    digest = hashlib.sha256(header + json.dumps(about).encode()).hexdigest()
    return Job(Path(output), (source.path,), header, tensors, digest, tuple(warnings))


def _checked_type(weights: Weights, name: str, allow_requantize: bool) -> str:
    if name == weights.type:
        return name
    row = native.TYPES.get(name)
    if row is None:
        raise InputError(f"{weights.name}: type {name} is not known; types are {', '.join(native.TYPES)}")
    if weights.type not in native.TYPES:
        raise InputError(f"{weights.name} is {weights.type}, which holds no weights; it can only stay as it is")
    if not row.fits(weights.n_cols):
        fits = [n for n, r in native.TYPES.items() if r.fits(weights.n_cols)]
        raise InputError(
            f"{weights.name}: rows of {weights.n_cols} values are not whole blocks of {row.block_size}, as {name} "
            f"takes them; it can be {', '.join(fits)}"
        )
    if native.TYPES[weights.type].is_quantized and not allow_requantize:
        raise InputError(
            f"{weights.name} is {weights.type} already; making {name} of it loses more than from a 16-bit file "
            "(--allow-requantize does it all the same)"
        )
    return name


def _columns(weights: Weights, name: str, importance: Importance | None, warnings: list[str]) -> np.ndarray | None:
    """Importance of each column of each matrix, None where there is none or where it is not used."""
    if name == weights.type or not native.TYPES[name].is_quantized:
        return None
    found = None if importance is None else importance.columns.get(weights.name)
    if importance is not None and found is not None and found.size != weights.n_cols * weights.n_matrices:
        text = (
            f"{importance.path}: {weights.name} has importance of {found.size} columns, the model has "
            f"{weights.n_matrices} x {weights.n_cols}; it was made with another model"
        )
        if weights.name not in _EMBEDDINGS:
            raise InputError(text)
        warnings.append(f"{text}; not used")
        found = None
    if found is None and (
        native.TYPES[name].needs_importance or (name in native.WANT_IMPORTANCE and weights.name not in OUTPUTS)
    ):
        reason = "none was given" if importance is None else f"{importance.path} has none"
        raise InputError(
            f"{weights.name}: {name} needs importance data for it, and {reason} (`pyllamaernie imatrix` measures them)"
        )
    return None if found is None else found.reshape(weights.n_matrices, weights.n_cols)


def _coverage(source: ModelSource, chosen: Sequence[str], importance: Importance) -> Iterator[str]:
    """What a person should know of importance data that do not cover the model, or cover another."""
    have = {weights.name for weights in source.weights}
    foreign = sorted(set(importance.columns) - have)
    if len(foreign) == len(importance.columns):
        raise InputError(
            f"{importance.path} was made with another model: it has {foreign[0]} and {len(foreign) - 1} more, "
            f"none of them in {source.path}"
        )
    if foreign:
        yield f"{importance.path}: {len(foreign)} entries, such as {foreign[0]}, are of no tensor of {source.path}"
    without = [
        w.name
        for w, t in zip(source.weights, chosen, strict=True)
        if t != w.type and native.TYPES[t].is_quantized and w.name not in importance.columns and w.name not in OUTPUTS
    ]
    if without:
        yield f"{importance.path} has nothing on {len(without)} tensors, such as {without[0]}: all columns count alike"
    empty = {
        name: int((counts == 0).sum())
        for name, counts in importance.counts.items()
        if name in have and (counts == 0).any()
    }
    if empty:
        n, worst = sum(empty.values()), max(empty, key=lambda name: empty[name])
        yield (
            f"{importance.path}: nothing reached {n} matrices of {len(empty)} tensors ({empty[worst]} experts of "
            f"{worst}): their columns count alike"
        )


def _row_bytes(weights: Weights, name: str) -> int:
    return weights.n_bytes // weights.n_rows if name == weights.type else native.TYPES[name].row_bytes(weights.n_cols)


def _metadata(
    source: ModelSource,
    chosen: Sequence[str],
    rows: Sequence[int],
    importance: Importance | None,
    extra: Sequence[Key],
) -> list[Key]:
    keys = {name: key for name, key in source.keys.items() if name != "general.architecture"}
    by_type: dict[str, int] = {}
    for weights, name, n in zip(source.weights, chosen, rows, strict=True):
        by_type[name] = by_type.get(name, 0) + n * weights.n_rows
    most = max(by_type, key=lambda name: (by_type[name], name))
    number = file_type(most)
    recipe = "".join(f"{w.name}={t}\n" for w, t in zip(source.weights, chosen, strict=True))
    bpw = 8 * sum(by_type.values()) / sum(math.prod(w.shape) for w in source.weights)
    new = [
        Key("general.quantization_version", "u32", QUANTIZATION_VERSION),
        *([] if number is None else [Key("general.file_type", "u32", number)]),
        *([] if importance is None else importance.keys()),
        Key("quantize.recipe.hash", "str", hashlib.sha256(recipe.encode()).hexdigest()),
        Key("quantize.recipe.tool", "str", f"pyllamaernie {_package_version()}"),
        Key("quantize.recipe.bpw", "f32", round(bpw, 4)),
        *extra,
    ]
    keys.update({key.name: key for key in new})
    return list(keys.values())


def _package_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pyllamaernie")
    except PackageNotFoundError:
        return "unknown"


def _encoder_version() -> str:
    """Changes with the compiled quantizers: pieces of two versions must not meet in one file."""
    path = installed("data") / "build.json"
    return path.read_text(encoding="utf-8") if path.is_file() else ""
