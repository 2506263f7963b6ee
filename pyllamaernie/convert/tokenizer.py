"""The vocabulary of a sentencepiece checkpoint as GGUF keys.

Follows upstream's sentencepiece path (`conversion/base.py` at the pin) and differs where that path loses information:
it reads the piece types from the model file itself, so that user-defined markers and digits are found as whole tokens.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllamaernie.convert.checkpoint import Checkpoint
from pyllamaernie.errors import TokenizerError
from pyllamaernie.gguf.file import Key, TokenType, special_token_keys

log = logging.getLogger("pyllamaernie.convert")

MODEL_FILES = ("tokenizer.model", "spm.model", "ernie_token_100k.model")
END_OF_TURN = "<|end_of_sentence|>"
VISIBLE = ("<think>", "</think>")  # special to Hugging Face, but part of the answer that a reasoning parser must see
_SPM_BPE = 2
_SPM_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True)
class Vocabulary:
    """Token texts, scores and types by id, padded to the rows of the embedding."""

    tokens: list[str]
    scores: list[float]
    types: list[TokenType]
    keys: list[Key]

    def find(self, text: str) -> int | None:
        """The id of a token that is not padding."""
        for i, token in enumerate(self.tokens):
            if token == text and self.types[i] != TokenType.UNUSED:
                return i
        return None


def read_vocabulary(checkpoint: Checkpoint, n_vocab: int) -> Vocabulary:
    """The vocabulary with all `tokenizer.*` keys.

    Raises: TokenizerError when the model file is missing, not BPE, or larger than the embedding.
    """
    folder = checkpoint.folder
    path = next((folder / name for name in MODEL_FILES if (folder / name).is_file()), None)
    if path is None:
        raise TokenizerError(
            f"{folder}: no sentencepiece model; expected one of {', '.join(MODEL_FILES)} beside config.json"
        )
    pieces, model_type = _read_sentencepiece(path)
    if model_type != _SPM_BPE:
        raise TokenizerError(
            f"{path}: model type {_SPM_MODEL_TYPES.get(model_type, model_type)}, "
            "but llama.cpp's tokenizer merges by BPE scores"
        )
    if len(pieces) > n_vocab:
        raise TokenizerError(
            f"{path}: {len(pieces)} pieces, but the embedding has {n_vocab} rows; the files are of different models"
        )
    tokens = [f"[PAD{i}]" for i in range(n_vocab)]
    scores = [-10000.0] * n_vocab
    types = [TokenType.UNUSED] * n_vocab
    for i, (text, score, kind) in enumerate(pieces):
        tokens[i], scores[i], types[i] = text, score, kind
        if kind == TokenType.USER_DEFINED:
            types[i] = TokenType.CONTROL if _looks_special(text) else TokenType.NORMAL if len(text) == 1 else kind
    for text, i in checkpoint.json("added_tokens.json").items():
        _set(i, text, TokenType.USER_DEFINED, tokens, scores, types)
    config = checkpoint.json("tokenizer_config.json")
    for key, entry in config.get("added_tokens_decoder", {}).items():
        text = entry["content"]
        special = entry.get("special") or _looks_special(text)
        _set(
            int(key),
            text if special else text.replace("\u2581", " "),
            TokenType.CONTROL if special else TokenType.USER_DEFINED,
            tokens,
            scores,
            types,
        )
    for i, text in enumerate(tokens):
        if text in VISIBLE:
            types[i] = TokenType.USER_DEFINED

    vocabulary = Vocabulary(tokens, scores, types, [])
    vocabulary.keys.extend(
        [
            Key("tokenizer.ggml.model", "str", "llama"),
            Key("tokenizer.ggml.pre", "str", "default"),
            Key("tokenizer.ggml.tokens", "list", tokens),
            Key("tokenizer.ggml.scores", "list", scores),
            Key("tokenizer.ggml.token_type", "list", [int(t) for t in types]),
            *_special_keys(folder, n_vocab, vocabulary),
            Key("tokenizer.ggml.add_space_prefix", "bool", bool(config.get("add_prefix_space", False))),
        ]
    )
    return vocabulary


def _special_keys(folder: Path, n_vocab: int, vocabulary: Vocabulary) -> list[Key]:
    """Special ids and the chat template; never a BOS or EOS that is added on its own."""
    keys = {key.name: key for key in special_token_keys(folder, n_vocab)}
    for name, text in (("bos_token_id", "<s>"), ("eos_token_id", "</s>")):
        found = vocabulary.find(text)
        if found is not None:
            keys.setdefault(f"tokenizer.ggml.{name}", Key(f"tokenizer.ggml.{name}", "u32", found))
    end_of_turn = vocabulary.find(END_OF_TURN)
    if end_of_turn is not None:
        keys["tokenizer.ggml.eot_token_id"] = Key("tokenizer.ggml.eot_token_id", "u32", end_of_turn)
    for name in ("add_bos_token", "add_eos_token"):
        keys[f"tokenizer.ggml.{name}"] = Key(f"tokenizer.ggml.{name}", "bool", False)
    return list(keys.values())


def _set(i: int, text: str, kind: TokenType, tokens: list[str], scores: list[float], types: list[TokenType]) -> None:
    if i >= len(tokens):
        raise TokenizerError(
            f"token {text!r} has id {i}, but the embedding has {len(tokens)} rows; correct tokenizer_config.json"
        )
    if types[i] != TokenType.UNUSED and tokens[i] != text:
        log.warning(
            "token %d: %r in the sentencepiece model, %r in the tokenizer's configuration; the latter is taken",
            i,
            tokens[i],
            text,
        )
    tokens[i], scores[i], types[i] = text, -1000.0, kind


def _looks_special(text: str) -> bool:
    return (
        (text.startswith("<|") and text.endswith("|>"))
        or text in ("<pad>", "<mask>")
        or (text.startswith("<unused") and text.endswith(">"))
    )


# sentencepiece's ModelProto: 1 = pieces {1 text, 2 score, 3 type}, 2 = trainer {3 model type}.
# Source: google/sentencepiece `src/sentencepiece_model.proto`. Its Python package does not tell the piece types.


def _read_sentencepiece(path: Path) -> tuple[list[tuple[str, float, TokenType]], int]:
    pieces: list[tuple[str, float, TokenType]] = []
    model_type = 1
    try:
        for field, value in _fields(path.read_bytes()):
            if field == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
                pieces.append((piece.get(1, b"").decode("utf-8"), score, TokenType(piece.get(3, 1))))
            elif field == 2:
                model_type = dict(_fields(value)).get(3, model_type)
    except (IndexError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise TokenizerError(
            f"{path}: not a sentencepiece model ({error}); if the file is a Git LFS pointer, download it"
        ) from error
    if not pieces:
        raise TokenizerError(f"{path}: holds no pieces; not a sentencepiece model")
    return pieces, model_type


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
