"""A Hugging Face folder as what a quantizer reads: the converter's own tensors, in the order and type it makes them.

No 16-bit GGUF in between, and the bytes of `convert` followed by `quantize` all the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyllamaernie.convert.checkpoint import open_checkpoint
from pyllamaernie.convert.families import family_of, own_type, vocabulary_of
from pyllamaernie.convert.outputs import OutFile, check_target, known_type, plan_files, write_files
from pyllamaernie.convert.progress import Bar
from pyllamaernie.gguf.file import OutTensor
from pyllamaernie.quant.source import PIECE_VALUES, ModelSource, Piece, Weights, cut, file_fingerprint


@dataclass(frozen=True)
class HfModel:
    """The text model, and the files that go beside it as they are (mmproj, mtp)."""

    source: ModelSource
    type: str
    beside: tuple[OutFile, ...]


def hf_model(
    folder: Path,
    output: Path,
    *,
    type: str = "auto",
    mmproj: bool = True,
    mmproj_type: str | None = None,
    mtp: bool = True,
) -> HfModel:
    """What `convert` would write of a folder, ready to be read. `type` is that of the matrices before quantization.

    Raises: ConvertError and its subclasses.
    """
    checkpoint = open_checkpoint(folder)
    family = family_of(checkpoint)
    chosen = own_type(checkpoint) if type.lower() == "auto" else known_type(type)
    vocabulary, _ = vocabulary_of(checkpoint)
    files = plan_files(checkpoint, family, vocabulary, output, chosen, (mmproj_type or "f16") * mmproj, mtp)
    text, *beside = files
    paths = sorted({t.path for t in checkpoint.tensors.values()}) + sorted(folder.glob("*.json"))
    source = ModelSource(
        folder, text.arch, {key.name: key for key in text.keys}, [_weights(t) for t in text.tensors],
        file_fingerprint(paths),
    )  # fmt: skip
    return HfModel(source, chosen, tuple(beside))


def check_beside(model: HfModel, overwrite: bool) -> None:
    """Raises ConvertError when the mmproj and mtp files cannot be written."""
    if model.beside:
        check_target(model.beside, overwrite)


def write_beside(model: HfModel, overwrite: bool) -> list[Path]:
    """The mmproj and mtp files, as `convert` writes them; returns their paths."""
    if model.beside:
        check_beside(model, overwrite)
        write_files(model.beside, Bar())
    return [file.path for file in model.beside]


def _weights(tensor: OutTensor) -> Weights:
    n_ones = next((i for i, n in enumerate(tensor.shape[:-1]) if n > 1), len(tensor.shape) - 1)
    shape = tensor.shape[n_ones:]  # a bias of one row is a vector, as for every reader of GGUF
    n_cols, n_rows = shape[-1], math.prod(shape[:-1])
    rows_per_matrix = shape[-2] if len(shape) > 1 else 1
    row_bytes = tensor.n_bytes // n_rows

    def pieces(n_values: int = PIECE_VALUES) -> Iterator[Piece]:
        row = 0
        for block in tensor.blocks():
            # a mapped block stays unread until a thread works on it
            data = np.ascontiguousarray(block).view(np.uint8).reshape(-1, row_bytes)
            for first, n in cut(row, len(data), n_cols, rows_per_matrix, n_values):
                yield _held(first, data[first - row : first - row + n])
            row += len(data)

    return Weights(tensor.name, shape, tensor.type.name, tensor.n_bytes, pieces)


def _held(first_row: int, rows: np.ndarray) -> Piece:
    return Piece(first_row, len(rows), lambda: rows)
