"""The pieces of a sentencepiece model file, with their scores, their types and how the model treats blanks.

Reads the protobuf itself: sentencepiece's Python package does not tell the piece types.
Source: google/sentencepiece `src/sentencepiece_model.proto`: 1 = pieces {1 text, 2 score, 3 type}, 2 = trainer
{3 model type}, 3 = normalizer {3 dummy prefix, 4 remove extra whitespaces}.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllamaernie.convert.json_file import read_whole
from pyllamaernie.errors import TokenizerError
from pyllamaernie.gguf.file import TokenType

_BPE = 2
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True)
class Pieces:
    """A vocabulary as its file has it: (text, score, type) by id, and what becomes of blanks.

    `adds_prefix`: a blank goes before each text; None where the file does not say.
    """

    path: Path
    rows: list[tuple[str, float, TokenType]]
    adds_prefix: bool | None
    removes_blanks: bool = False

    @property
    def ids(self) -> dict[str, int]:
        return {text: i for i, (text, _, _) in enumerate(self.rows)}


def read_sentencepiece(path: Path) -> Pieces:
    """Raises: TokenizerError for a file that is no sentencepiece model, or one that does not merge by BPE scores."""
    rows: list[tuple[str, float, TokenType]] = []
    model_type = 1
    normalizer: dict[int, Any] = {}
    data = read_whole(path)
    try:
        for field, value in _fields(data):
            if field == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
                rows.append((piece.get(1, b"").decode("utf-8"), score, TokenType(piece.get(3, 1))))
            elif field == 2:
                model_type = dict(_fields(value)).get(3, model_type)
            elif field == 3:
                normalizer = dict(_fields(value))
    except (IndexError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise TokenizerError(
            f"{path}: not a sentencepiece model ({error}); if the file is a Git LFS pointer, download it"
        ) from error
    if not rows:
        raise TokenizerError(f"{path}: holds no pieces; not a sentencepiece model")
    if model_type != _BPE:
        raise TokenizerError(
            f"{path}: model type {_MODEL_TYPES.get(model_type, model_type)}, "
            "but llama.cpp's tokenizer merges by BPE scores"
        )
    return Pieces(path, rows, bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1)))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message: an int or, by its wire type, bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError(f"a number of more than 64 bits at byte {at}")

    while at < len(data):
        key = varint()
        field, wire = key >> 3, key & 7
        if wire == 0:
            yield field, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire} at byte {at}")
        size = varint() if wire == 2 else 8 if wire == 1 else 4
        if at + size > len(data):
            raise ValueError(f"field {field} ends behind the file")
        yield field, data[at : at + size]
        at += size
